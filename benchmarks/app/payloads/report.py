"""Figures of a run, as a record for JSON and as a page."""

import platform
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from benchmarks.app.payloads.browser import Seen
from benchmarks.app.payloads.kinds import KINDS
from benchmarks.app.payloads.run import Outcome

COMMAND = "python -m benchmarks.app.payloads"
_WHAT = """A random pocket base and two small adapters are served as `dora-diffusion ui` serves them, in the process
that also watches itself: a canary lies in files beside the app's own, a server on loopback notes who calls, an audit
hook notes every address that is looked up or connected to, and the folders are listed before and after each payload. A
payload broke its promise if it did not come to what it must, if anything of a file was given that is not the app's to
give, if anything was fetched, if a file appeared outside the folders for pictures and runs, or if /health was not ok
afterwards. Payloads that go to many handlers count once."""


def summary(
    outcomes: Sequence[Outcome], healths: Sequence[Mapping[str, Any]], seen: Seen | None, times: tuple[float, float]
) -> dict[str, Any]:
    """Everything that the page says.

    Args:
        outcomes: of all payloads.
        healths: what `health_and_drawing` answered before the first and after the last.
        seen: what a browser made of the app afterwards; None without one.
        times: seconds of all of it, by the clock and of this process's processor.
    """
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.kind].append(outcome)
    slowest = max(outcomes, key=_slowest)
    versions = {name: version(name) for name in ("torch", "gradio", "httpx")}
    machine = {"system": platform.system(), "python": platform.python_version(), "threads": torch.get_num_threads()}
    return {
        "command": COMMAND,
        "seconds": round(times[0], 1),
        "processor_seconds": round(times[1], 1),
        "machine": machine | versions,
        "payloads": len(outcomes),
        "requests": sum(len(outcome.answers) for outcome in outcomes),
        "broken": sum(bool(outcome.faults) for outcome in outcomes),
        "kinds": [_row(kind.name, kind.must, groups[kind.name]) for kind in KINDS if kind.name in groups],
        "slowest": {"kind": slowest.kind, "payload": slowest.payload, "seconds": round(_slowest(slowest), 2)},
        "health": {"before": dict(healths[0]), "after": dict(healths[-1])},
        "browser": None if seen is None else seen.record(),
        "faults": [
            {"kind": outcome.kind, "payload": outcome.payload, "faults": list(outcome.faults)}
            for outcome in outcomes
            if outcome.faults
        ],
    }


def _slowest(outcome: Outcome) -> float:
    return max((answer.seconds for answer in outcome.answers), default=0.0)


def _row(name: str, must: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "kind": name,
        "payloads": len(outcomes),
        "must": must,
        "came_to": dict(Counter(answer.what for outcome in outcomes for answer in outcome.answers).most_common()),
        "slowest_seconds": round(max(map(_slowest, outcomes)), 4),
        "broken": sum(bool(outcome.faults) for outcome in outcomes),
    }


def report(found: Mapping[str, Any]) -> str:
    """The page."""
    machine = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    slowest = found["slowest"]
    lines = [
        "# Hostile payloads",
        "",
        f"`{found['command']}` ({found['seconds']} s, {found['processor_seconds']} s of the processor; {machine})",
        "",
        _WHAT,
        "",
        f"**{found['payloads']} payloads in {found['requests']:,} requests, {found['broken']} broke a promise.**",
        "",
        "| payloads | number | must come to | requests came to | slowest answer, ms | broke it |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["kinds"]:
        came = ", ".join(f"{what} x {number}" for what, number in row["came_to"].items())
        figures = (row["kind"], row["payloads"], row["must"], came, round(1000 * row["slowest_seconds"]), row["broken"])
        lines.append(f"| {' | '.join(map(str, figures))} |")
    lines += [
        "",
        "Numbers are statuses; a call through the queue ends with an answer or an error. "
        f"The slowest answer took {slowest['seconds']} s ({slowest['kind']}: `{slowest['payload']}`).",
        "",
        *_health(found["health"]),
        "",
        _browser(found["browser"]),
    ]
    if found["faults"]:
        lines += ["", "## Broken promises", ""]
        lines += [f"- {fault['kind']}, `{fault['payload']}`: {'; '.join(fault['faults'])}" for fault in found["faults"]]
    return "\n".join(lines) + "\n"


def _health(healths: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["| /health | status | busy | queue | adapters usable, broken | process, MB | a sound call |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name, health in healths.items():
        adapters = f"{health['adapters']['usable']}, {health['adapters']['broken']}"
        held = health["memory"]["process_bytes"]
        figures = (
            name,
            health["status"],
            health["busy"],
            health["queue"],
            adapters,
            held and held >> 20,
            health["sound_call"],
        )
        lines.append(f"| {' | '.join(map(str, figures))} |")
    return lines


def _browser(seen: Mapping[str, Any] | None) -> str:
    if seen is None:
        return "No Chromium was there to open the page over these files with."
    hosts = ", ".join(seen["hosts"])
    return (
        f"Chromium then opened the page over these files: {len(seen['dialogs'])} scripts of theirs ran, "
        f"{seen['handlers']} elements carried a handler of theirs, {len(seen['errors'])} errors; it asked {hosts} only."
    )
