"""An adapter's strength on each layer: one number, or numbers by part of the pipeline."""

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence

from dora_diffusion.utils.text import shown_value

Weight = float | Mapping[str, float]
Weights = Mapping[str, Weight] | Sequence[str] | str
"""Strengths by adapter, or the names of adapters whose strengths come beside."""

WeightsOfNames = Weight | Sequence[Weight | None] | None
"""What comes beside names: one strength for all, or one for each; None is 1."""


def _under(path: str, part: str) -> bool:
    return path == part or path.startswith(part + ".")


def strength_at(path: str, weight: Weight) -> float:
    """The strength of a layer: the number, or that of the longest part that its path lies under, or 0."""
    if not isinstance(weight, Mapping):
        return float(weight)
    parts = [part for part in weight if _under(path, part)]
    return float(weight[max(parts, key=len)]) if parts else 0.0


def is_felt(weight: Weight) -> bool:
    """Whether a strength changes anything: it, or that of some part, is not 0."""
    return any(weight.values()) if isinstance(weight, Mapping) else weight != 0


def is_meant(path: str, weight: Weight) -> bool:
    """Whether a strength speaks of a layer at all, be it 0: a number always does, parts do where one of them fits."""
    return not isinstance(weight, Mapping) or any(_under(path, part) for part in weight)


def strengths_by_name(adapters: Weights, weights: WeightsOfNames = None) -> dict[str, Weight]:
    """Adapter -> strength, from a mapping alone, or from names and strengths as diffusers takes them.

    Args:
        adapters: strengths by adapter; or a name, or names.
        weights: beside names: one strength for all, or one for each; None is 1.

    Raises:
        ValueError: strengths beside a mapping, as many strengths as there are no names, a name twice, or what is
            neither.
    """
    if isinstance(adapters, Mapping):
        if weights is not None:
            raise ValueError('set_adapters: strengths twice; expected {"ink": 0.8}, or ["ink"] and [0.8]')
        return dict(adapters)
    if not isinstance(adapters, str | Sequence) or any(not isinstance(name, str) for name in adapters):
        got = f"{shown_value(adapters)} ({type(adapters).__name__})"
        raise ValueError(f'set_adapters: got {got}, expected {{"ink": 0.8}}, or ["ink"] and [0.8]')
    names = [adapters] if isinstance(adapters, str) else list(adapters)
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"set_adapters: {twice[0]!r} is named twice; expected every adapter once")
    given = list(weights) if isinstance(weights, Sequence) and not isinstance(weights, str) else [weights] * len(names)
    if len(given) != len(names):
        raise ValueError(f"set_adapters: {len(names)} adapters and {len(given)} weights; expected one each")
    return {name: 1.0 if weight is None else weight for name, weight in zip(names, given, strict=True)}


def check_strength(name: str, weight: Weight, paths: Iterable[str]) -> None:
    """A ValueError when a strength is no finite number, or a part holds none of the adapter's layers.

    A whole component may be named even if the adapter has nothing there.
    """
    for value in weight.values() if isinstance(weight, Mapping) else [weight]:
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"strength of {name!r} must be a finite number, got {value!r}")
    for part in weight if isinstance(weight, Mapping) else ():
        component = part.split(".")[0]
        elsewhere = part == component and component.startswith(("unet", "transformer", "text_encoder"))
        if not elsewhere and not any(_under(path, part) for path in paths):
            raise ValueError(f"strength of {name!r}: {part!r} holds none of its layers")
