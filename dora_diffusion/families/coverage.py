"""How many layers of a model each preset adapts, and that none is left out by oversight."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from torch import nn

from dora_diffusion.families.record import Component


@dataclass(frozen=True)
class Coverage:
    """The layers of a model that could carry an adapter.

    Attributes:
        matched: preset -> how many layers it adapts.
        total: linear, convolution and embedding layers in all.
        outside: how many are left alone on purpose.
        unmatched: paths that neither the preset `all` nor `outside` names; should be none.
    """

    matched: Mapping[str, int]
    total: int
    outside: int
    unmatched: tuple[str, ...]


def ends_with(path: str, ending: str) -> bool:
    """Whether a layer's path ends in whole names that fit; `*` fits any run of characters."""
    if "*" not in ending:
        return path == ending or path.endswith("." + ending)
    return _pattern(ending).search(path) is not None


@cache
def _pattern(ending: str) -> re.Pattern[str]:
    return re.compile(r"(?:^|\.)" + ".*".join(map(re.escape, ending.split("*"))) + "$")


def coverage(component: Component, model: nn.Module) -> Coverage:
    """Count a model's layers under the presets of the component that it is."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    paths = [path for path, module in model.named_modules() if isinstance(module, kinds)]
    adapted = set(_named(paths, component.presets["all"]))
    outside = set(_named(paths, component.outside))
    return Coverage(
        matched={preset: len(_named(paths, endings)) for preset, endings in component.presets.items()},
        total=len(paths),
        outside=len(outside - adapted),
        unmatched=tuple(path for path in paths if path not in adapted | outside),
    )


def _named(paths: Iterable[str], endings: tuple[str, ...]) -> list[str]:
    return [path for path in paths if any(ends_with(path, ending) for ending in endings)]
