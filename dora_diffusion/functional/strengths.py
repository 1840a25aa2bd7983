"""An adapter's strength on each layer: one number, or numbers by part of the pipeline."""

import math
import numbers
from collections.abc import Iterable, Mapping

Weight = float | Mapping[str, float]


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
