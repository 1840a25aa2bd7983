"""Figures of a run, as a record for JSON and as a page."""

import platform
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from benchmarks.fuzz.run import Case
from benchmarks.fuzz.watch import MEMORY, SECONDS, Outcome
from dora_diffusion.formats import FORMATS


def summary(cases: Sequence[Case], command: str, seconds: float) -> dict[str, Any]:
    """Everything that the page says."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.group].append(case)
    return {
        "command": command,
        "minutes": round(seconds / 60, 1),
        "machine": {
            "system": platform.system(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "safetensors")},
        },
        "formats": list(FORMATS),
        "files": len(cases),
        "broken": sum(bool(case.faults) for case in cases),
        "readers": {name: _figures([_of(case, name) for case in cases], cases) for name in _readers(cases)},
        "groups": {
            group: {
                "files": len(found),
                **Counter(case.outcomes[0].kind for case in found),
                "faults": sum(bool(case.faults) for case in found),
            }
            for group, found in groups.items()
        },
        "special": [_row(case) for case in groups["special"]],
        "faults": [{"file": case.name, **case.faults} for case in cases if case.faults],
    }


def _readers(cases: Sequence[Case]) -> list[str]:
    return [outcome.reader for outcome in cases[0].outcomes]


def _of(case: Case, reader: str) -> Outcome:
    return next(outcome for outcome in case.outcomes if outcome.reader == reader)


def _figures(outcomes: Sequence[Outcome], cases: Sequence[Case]) -> dict[str, Any]:
    refused = sorted(1000 * outcome.seconds for outcome in outcomes if outcome.kind == "refused")
    over = [
        (outcome.memory - case.size) / 2**20
        for outcome, case in zip(outcomes, cases, strict=True)
        if outcome.memory is not None
    ]
    return {
        **Counter(outcome.kind for outcome in outcomes),
        "refused_ms": {"p50": _at(refused, 0.5), "p99": _at(refused, 0.99), "max": _at(refused, 1.0)},
        "memory_over_file_mb": round(max(over), 1) if over else None,
        "longest_message": max((len(outcome.message) for outcome in outcomes if outcome.kind == "refused"), default=0),
    }


def _at(ordered: Sequence[float], share: float) -> float | None:
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2) if ordered else None


def _row(case: Case) -> dict[str, Any]:
    first = case.outcomes[0]
    return {
        "file": case.name,
        "mb": round(case.size / 2**20, 2),
        "outcome": first.kind,
        "ms": round(1000 * max(outcome.seconds for outcome in case.outcomes), 1),
        "memory_mb": round(max(outcome.memory or 0 for outcome in case.outcomes) / 2**20, 1),
        "faults": case.faults,
    }


def report(found: dict[str, Any]) -> str:
    """The page."""
    machine = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    lines = [
        "# Broken adapter files",
        "",
        f"`make fuzz` (`{found['command']}`, {found['minutes']} minutes; {machine}). Sound files of every format "
        f"({', '.join(found['formats'])}) and of other tools' spellings are broken by a seeded generator, and read by "
        "`load_adapter`, `detect_format` and `inspect_adapter` in a process under watch. It must be read, or refused "
        f"with a `ValueError` of one line that names it; refusing it may take {1000 * SECONDS:.0f} ms of the processor "
        f"and no more memory than the file's size and {MEMORY // 2**20} MB; it may never hang or kill the process.",
        "",
        f"**{found['files']:,} files, {found['broken']} broke a promise.**",
        "",
        "| reader | read | refused | crash, hang, died | refused: ms p50 / p99 / max | most memory beyond the file | "
        "longest message |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, figures in found["readers"].items():
        ms = figures["refused_ms"]
        bad = ", ".join(str(figures.get(kind, 0)) for kind in ("crash", "hang", "died"))
        lines.append(
            f"| {name} | {figures.get('read', 0)} | {figures.get('refused', 0)} | {bad} | {ms['p50']} / {ms['p99']} / "
            f"{ms['max']} | {figures['memory_over_file_mb']} MB | {figures['longest_message']} |"
        )
    lines += ["", "| what was done | files | read | refused | faults |", "| --- | --- | --- | --- | --- |"]
    for group, counts in found["groups"].items():
        row = (counts["files"], counts.get("read", 0), counts.get("refused", 0), counts["faults"])
        lines.append(f"| {group.replace('_', ' ')} | {' | '.join(map(str, row))} |")
    lines += [
        "",
        "## The special files",
        "",
        "| file | MB | outcome | ms | memory, MB |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['file']} | {row['mb']} | {row['outcome']} | {row['ms']} | {row['memory_mb']} |"
        for row in found["special"]
    ]
    if found["faults"]:
        lines += ["", "## Broken promises", ""]
        lines += [f"- {fault.pop('file')}: {fault}" for fault in map(dict, found["faults"][:50])]
    return "\n".join(lines) + "\n"
