"""Layouts as tables: fusions whose names hold `#` where a block's number stands, looked up from either side."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from dora_diffusion.formats.layouts.record import Fusion, Layout, any_shape

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

    def layout(
        self,
        name: str,
        families: tuple[str, ...],
        component: str,
        fits: Callable[[str, int, int], bool] = any_shape,
    ) -> Layout:
        """The layout of these names; the arguments are Layout's."""
        return Layout(name, families, component, self.of_original, self.of_path, fits, tuple(self.by_original))

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


def proportions(ratios: Mapping[str, tuple[int, int]]) -> Callable[[str, int, int], bool]:
    """As Layout.fits: end of an original name -> its rows to its columns, (4, 1) for four times as many."""

    def fits(original: str, rows: int, columns: int) -> bool:
        ends = (ratio for end, ratio in ratios.items() if original.endswith(end))
        high, wide = next(ends, (rows, columns))
        return rows * wide == columns * high

    return fits


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
