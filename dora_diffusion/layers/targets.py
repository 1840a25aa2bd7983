"""Which layers of a model an adapter goes to."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from dora_diffusion.families import component_of_model, ends_with
from dora_diffusion.layers.generic_presets import GENERIC

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


def target_paths(model: nn.Module, targets: str | list[str] | None) -> list[str]:
    """The paths of a model's layers that `DoRAConfig.target_modules` names, in its order; a ValueError when none."""
    if targets is None or isinstance(targets, str):
        found = preset_paths(model, targets or "attention")
        if found is not None:
            return _some(found, targets, model)
    paths = [path for path, _ in model.named_modules() if path]
    return _some(named_paths(paths, targets or (), owner=type(model).__name__), targets, model)


def _some(found: list[str], targets: str | list[str] | None, model: nn.Module) -> list[str]:
    if not found:
        hint = "" if isinstance(targets, list) else ": name its layers in target_modules"
        raise ValueError(f"target_modules={targets!r} matches no layer of {type(model).__name__}{hint}")
    return found


def preset_paths(model: nn.Module, preset: str) -> list[str] | None:
    """The paths of the layers in a preset, by the model's family or, without one, by `generic_presets`.

    None when this is no preset of the model's, but a regular expression.
    """
    component = component_of_model(model)
    if component is None:
        return GENERIC[preset](model) if preset in GENERIC else None
    if preset not in component.presets:
        return None
    endings = component.presets[preset]
    return [path for path, _ in model.named_modules() if path and any(ends_with(path, end) for end in endings)]


def named_paths(
    paths: Sequence[str], targets: str | Sequence[str], *, owner: str, inner: Callable[[str], str] = str
) -> list[str]:
    """The paths that a regular expression matches whole, or that end in one of several names.

    Args:
        paths: of a model's layers.
        targets: a regular expression, or ends of paths.
        owner: what an error calls the model.
        inner: a path -> what the regular expression is matched with.

    Raises:
        ValueError: no regular expression, or an ending that fits nothing.
    """
    if isinstance(targets, str):
        pattern = _pattern("target_modules", targets)
        return [path for path in paths if pattern.fullmatch(inner(path))]
    if unused := [end for end in targets if not any(ends_with(path, end) for path in paths)]:
        raise ValueError(f"target_modules: {unused[0]!r} matches no layer of {owner}")
    return [path for path in paths if any(ends_with(path, end) for end in targets)]


def _pattern(name: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{name}: {text!r} is no regular expression ({error})") from None
