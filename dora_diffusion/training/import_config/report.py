"""What is said of an import: a line for each key of theirs."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from dora_diffusion.training.import_config.convert import Imported, Line, without_values
from dora_diffusion.utils.text import encodable, shown

NO_COUNTERPART = "no counterpart"
_LONGEST = 80


def report(imported: Imported) -> str:
    """`network_dim: 16 -> adapter.rank: 16`, `noise_offset: 0.1 -> no counterpart: why`, and what is not here."""
    said = [line for line in imported.lines if line.entry.is_said]
    unsaid = [line for line in imported.lines if not line.entry.is_said]
    blocks = [
        "\n".join(map(line_of, said)),
        "\n".join([f"not in the file, so as {imported.tool.name} does it:", *map(line_of, unsaid)]) if unsaid else "",
        "\n".join(f"not on this machine: {key}: {shown(path, 300)}" for key, path in imported.missing.items()),
        "\n".join(imported.notes),
        _counts(said),
    ]
    return encodable("\n\n".join(block for block in blocks if block))


def line_of(line: Line) -> str:
    """One line of the report."""
    line = without_values(line)
    entry, answer = line.entry, line.answer
    theirs = f"{shown(entry.key)}: {_value(entry.value)}"
    if answer.kind == "unknown":
        return f"{theirs} -> not known here: no such key of that trainer that this version has heard of"
    if answer.kind == "lost":
        says = answer.says if answer.says.startswith(NO_COUNTERPART) else f"{NO_COUNTERPART}: {answer.says}"
        return f"{theirs} -> {says}"
    if answer.kind == "needless":
        return f"{theirs} -> nothing to set: {answer.says}"
    ours = ", ".join(_settings(answer.settings))
    return f"{theirs} -> {ours}" + (f"; {answer.says}" if answer.says else "")


def _settings(settings: Mapping[str, Any]) -> Iterator[str]:
    for key, value in settings.items():
        yield f"{key}: {_value(value)}"


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return shown(value, _LONGEST)


def _counts(lines: list[Line]) -> str:
    kinds = Counter(line.answer.kind for line in lines)
    unknown = f", {kinds['unknown']} not known" if kinds["unknown"] else ""
    return (
        f"{len(lines)} keys: {kinds['taken']} taken over, {kinds['needless']} need nothing, "
        f"{kinds['lost']} without a counterpart{unknown}"
    )
