"""What was read of a folder's adapters, kept across starts: a JSON file that may be deleted at any time."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dora_diffusion.inspection.header import DeclaredMetadata, HeaderSummary, Structure
from dora_diffusion.utils.atomic import write_atomically
from ui.library.shelf import Stamp

_VERSION = 2


@dataclass(frozen=True)
class Known:
    """What reading a header came to: a glance, or a problem; and the state of the file then."""

    stamp: Stamp
    problem: str | None
    seen: HeaderSummary | None


def default_index(folder: Path) -> Path:
    """Where the index of a folder is kept: in the user's cache folder, under a hash of the folder's path."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "dora-diffusion" / f"adapters-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}.json"


def read_index(path: Path) -> dict[str, Known]:
    """Name -> what was read; nothing when there is no index, or none that can be understood."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["version"] != _VERSION:
            return {}
        structures = [_structure(row) for row in found["structures"]]
        return {name: _known(row, structures) for name, row in found["files"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def write_index(path: Path, files: Mapping[str, Known]) -> None:
    """Keep what was read, atomically.

    Raises:
        OSError: the folder cannot be written to.
    """
    structures = list(dict.fromkeys(known.seen.structure for known in files.values() if known.seen))
    numbers = {structure: number for number, structure in enumerate(structures)}
    rows = {name: _row(known, numbers) for name, known in files.items()}
    whole = {"version": _VERSION, "structures": [asdict(structure) for structure in structures], "files": rows}
    write_atomically(path, json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode())


def _row(known: Known, numbers: Mapping[Structure, int]) -> list[Any]:
    """Date, size, then the problem, or the number of the structure and what the metadata say."""
    if known.seen is None:
        return [*known.stamp, known.problem]
    declared = known.seen.declared
    return [
        *known.stamp,
        numbers[known.seen.structure],
        declared.title,
        declared.author,
        declared.base,
        declared.triggers,
        declared.tags,
    ]


def _known(row: list[Any], structures: list[Structure]) -> Known:
    modified, size, *rest = row
    stamp = Stamp(int(modified), int(size))
    if len(rest) == 1:
        return Known(stamp, str(rest[0]), None)
    number, title, author, base, triggers, tags = rest
    declared = DeclaredMetadata(str(title), str(author), str(base), _texts(triggers), _texts(tags))
    return Known(stamp, None, HeaderSummary(structures[number], declared))


def _structure(row: Mapping[str, Any]) -> Structure:
    return Structure(
        format=str(row["format"]),
        kind=str(row["kind"]),
        family=str(row["family"]),
        ranks=tuple(map(int, row["ranks"])),
        axis=str(row["axis"]),
        layers=int(row["layers"]),
        components=_texts(row["components"]),
        words=_texts(row["words"]),
    )


def _texts(values: Iterable[Any]) -> tuple[str, ...]:
    return tuple(str(value) for value in values)
