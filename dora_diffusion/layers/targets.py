"""Which layers of a model an adapter goes to."""

import re
from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from dora_diffusion.families import component_of_model, ends_with
from dora_diffusion.layers.config import DoRAConfig

Number = TypeVar("Number", int, float)


def by_pattern(name: str, patterns: Mapping[str, Number], paths: list[str], default: Number) -> dict[str, Number]:
    """Path -> the value of the first pattern that its end matches, or the default."""
    compiled = {pattern: _pattern(name, rf"(?:.*\.)?(?:{pattern})") for pattern in patterns}
    found = {
        path: next((pattern for pattern, regex in compiled.items() if regex.fullmatch(path)), None) for path in paths
    }
    if unused := [pattern for pattern in patterns if pattern not in found.values()]:
        raise ValueError(f"{name}: {unused[0]!r} decides for none of the {len(paths)} targeted layers")
    return {path: default if pattern is None else patterns[pattern] for path, pattern in found.items()}


def target_paths(model: nn.Module, config: DoRAConfig) -> list[str]:
    """The paths of the layers that `config.target_modules` names, in the model's order; a ValueError when none."""
    paths = [path for path, _ in model.named_modules() if path]
    endings = _endings(model, config.target_modules)
    if endings is None:
        pattern = _pattern("target_modules", str(config.target_modules))
        found = [path for path in paths if pattern.fullmatch(path)]
    else:
        unused = [end for end in endings if not any(ends_with(path, end) for path in paths)]
        if isinstance(config.target_modules, list) and unused:
            raise ValueError(f"target_modules: {unused[0]!r} matches no layer of {type(model).__name__}")
        found = [path for path in paths if any(ends_with(path, end) for end in endings)]
    if not found:
        raise ValueError(f"target_modules={config.target_modules!r} matches no layer of {type(model).__name__}")
    return found


def _pattern(name: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{name}: {text!r} is no regular expression ({error})") from None


def _endings(model: nn.Module, targets: str | list[str] | None) -> tuple[str, ...] | None:
    """Path endings for a preset or list; None when `targets` is a regular expression."""
    if isinstance(targets, list):
        return tuple(targets)
    component = component_of_model(model)
    if component is None and targets is None:
        raise ValueError(f"{type(model).__name__} is of no family known here: name its layers in target_modules")
    presets = component.presets if component else {}
    return presets.get(targets or "attention")
