"""Strength over a drawing's run: piecewise-linear factors, and how far a run is."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """A piecewise-linear factor on an adapter's strength.

    Attributes:
        points: (progress, factor) pairs; progress rises in 0..1 from the run's first denoising step to its last. Before
            the first point and after the last the factor is theirs.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("a schedule needs at least one (progress, factor) point")
        for progress, factor in self.points:
            if not (0 <= progress <= 1 and math.isfinite(factor)):
                raise ValueError(
                    f"schedule point ({progress}, {factor}): expected progress in 0..1 and a finite factor"
                )
        for (before, _), (after, _) in pairwise(self.points):
            if after < before:
                raise ValueError(f"schedule: progress falls from {before:g} to {after:g}; expected it to rise")

    def at(self, progress: float) -> float:
        """The factor at a progress in 0..1."""
        places, factors = zip(*self.points, strict=True)
        return float(np.interp(progress, places, factors))


def schedule_of(points: Sequence[Sequence[float]]) -> Schedule:
    """A schedule from pairs of numbers; a ValueError of one line when they are something else."""
    try:
        pairs = tuple((float(progress), float(factor)) for progress, factor in points)
    except (TypeError, ValueError):
        raise ValueError(f"schedule {points!r}: expected pairs of numbers such as [(0.0, 0.0), (0.3, 1.0)]") from None
    return Schedule(pairs)


def progress_of(timestep: Tensor | float, timesteps: Tensor) -> float:
    """How far a run is, 0 at its scheduler's first timestep and 1 at its last, by the timestep and not by counting.

    Samplers that visit a timestep twice, or call the denoiser twice a step, so find the same progress each time.
    """
    here = float(torch.as_tensor(timestep).flatten()[0])
    distances = (timesteps.cpu().double() - here).abs()
    return int(distances.argmin()) / max(1, len(distances) - 1)


Reading = Callable[[float], float]
READINGS: tuple[Reading, ...] = (
    lambda told: 1000 * told,
    lambda told: told,
    lambda told: 1000 - 1000 * told,
    lambda told: 1000 - told,
)
"""What a denoiser is told -> the scheduler's timestep: a thousandth of it, itself, or either from the far end."""


def reading_of(timestep: Tensor | float, timesteps: Tensor, known: Reading | None = None) -> Reading:
    """In which unit a denoiser is told the time, where nobody knows: the reading nearest to one of the timesteps.

    A 1.0 may be the first step's thousand or the last step's one: then the reading that was right before counts (a run
    that is told timesteps themselves starts high), or, at the start of a run, a thousandth.

    Args:
        timestep: what the denoiser was told; its first number counts.
        timesteps: the scheduler's.
        known: the reading of the call before, or None.
    """
    told = float(torch.as_tensor(timestep).flatten()[0])
    times = timesteps.cpu().double()
    candidates = (known, *READINGS) if known is not None else READINGS
    return min(candidates, key=lambda reading: round(float((times - reading(told)).abs().min()), 3))


TIME_NAMES = ("timestep", "timesteps", "timestep_ratio", "t")
"""What denoisers' forwards call the time."""


def timestep_of(arguments: Sequence[Any], keywords: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The time in a call of a denoiser, named or in its place.

    Args:
        arguments: by place.
        keywords: by name.
        names: of the forward's parameters, in order.

    Raises:
        ValueError: the call gives none.
    """
    given = {**dict(zip(names, arguments, strict=False)), **keywords}
    found = next((given[name] for name in TIME_NAMES if given.get(name) is not None), None)
    if found is None:
        raise ValueError(f"a schedule needs the time of a step, and this call has none; expected one of {TIME_NAMES}")
    return found
