"""Layouts as tables: fusions whose names hold `#` where a block's number stands, looked up from either side."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dora_diffusion.formats.layouts.record import Fusion

_BLOCK = re.compile(r"(\w+)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Table:
    """Fusions with `#` for the number of a block, the second word of its layers' names, on both sides.

    Attributes:
        by_original: a name in the original code -> its fusion.
        by_path: a path in diffusers -> the fusion that it is part of.
    """

    by_original: Mapping[str, Fusion]
    by_path: Mapping[str, Fusion]

    def of_original(self, original: str) -> Fusion | None:
        """As Layout.of_original."""
        return _found(self.by_original, original)

    def of_path(self, path: str) -> Fusion | None:
        """As Layout.of_path."""
        return _found(self.by_path, path)


def table(*fusions: Fusion) -> Table:
    """The fusions by both names, of which each occurs once."""
    by_original = {fusion.original: fusion for fusion in fusions}
    by_path = {path: fusion for fusion in fusions for path in fusion.paths}
    assert len(by_original) == len(fusions) and len(by_path) == sum(len(fusion.paths) for fusion in fusions)
    return Table(by_original, by_path)


def renamed(names: Mapping[str, str], *, original: str = "", path: str = "") -> tuple[Fusion, ...]:
    """Layers that only their names tell apart: the makers' -> diffusers', each side's prefix before them."""
    return tuple(Fusion(original + theirs, (path + ours,)) for theirs, ours in names.items())


def under(fusion: Fusion, *, original: str, path: str) -> Fusion:
    """The same fusion with each side's prefix before its names."""
    return replace(fusion, original=original + fusion.original, paths=tuple(path + each for each in fusion.paths))


def _found(fusions: Mapping[str, Fusion], name: str) -> Fusion | None:
    if name in fusions and "#" not in name:
        return fusions[name]
    if (parts := _BLOCK.fullmatch(name)) is None:
        return None
    block, number, rest = parts.groups()
    if (fusion := fusions.get(f"{block}.#.{rest}")) is None:
        return None
    paths = tuple(path.replace("#", number) for path in fusion.paths)
    return replace(fusion, original=fusion.original.replace("#", number), paths=paths)
