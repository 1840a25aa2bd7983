"""Strength over a drawing's run, and which part of the picture an adapter draws."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
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
    distances = (timesteps.double().cpu() - here).abs()
    return int(distances.argmin()) / max(1, len(distances) - 1)


def timestep_of(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """The timestep in a call of a denoiser: named, or the second argument."""
    if "timestep" in keywords:
        return keywords["timestep"]
    return arguments[1]


def mask_of(mask: Image.Image | Tensor) -> Tensor:
    """A mask as (1, 1, h, w) fp32 in 0..1.

    Args:
        mask: a picture (its lightness counts) or a tensor (h, w), (1, h, w) or (1, 1, h, w); 1 where the adapter draws.

    Raises:
        ValueError: another shape, or values outside 0..1.
    """
    if isinstance(mask, Image.Image):
        mask = torch.from_numpy(np.asarray(mask.convert("L"), dtype=np.float32) / 255)
    if not isinstance(mask, Tensor):
        raise ValueError(f"mask: expected a PIL image or a tensor, got {type(mask).__name__}")
    if mask.dim() < 2 or mask.numel() == 0 or mask.shape[-2:].numel() != mask.numel():
        raise ValueError(f"mask: expected (height, width), got shape {tuple(mask.shape)}")
    values = mask.detach().float().cpu().reshape(1, 1, *mask.shape[-2:])
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError("mask: expected values from 0 (without the adapter) to 1 (with it)")
    return values


def prediction_of(output: Any) -> Tensor:
    """The tensor in a denoiser's answer: the first of a tuple, or `.sample`; a list of pictures becomes a batch."""
    answer = output[0] if isinstance(output, tuple) else output.sample
    prediction: Tensor = torch.stack(list(answer)) if isinstance(answer, list) else answer
    return prediction


def with_prediction(output: Any, prediction: Tensor) -> Any:
    """The same answer with another prediction in it."""
    was_list = isinstance(output[0] if isinstance(output, tuple) else output.sample, list)
    answer = list(prediction.unbind()) if was_list else prediction
    if isinstance(output, tuple):
        return (answer, *output[1:])
    return replace(output, sample=answer)


def mask_on(mask: Tensor, prediction: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """A mask (1, 1, H, W), resized so that it multiplies a prediction.

    Args:
        mask: in 0..1.
        prediction: maps (N, C, h, w) or (N, C, 1, h, w), or tokens (N, rows * columns, C).
        grid: rows and columns of the tokens; None for maps.
    """
    size = prediction.shape[-2:] if grid is None else torch.Size(grid)
    resized = F.interpolate(mask, size=size, mode="bilinear", antialias=True, align_corners=False).to(prediction)
    if grid is not None:
        return resized.reshape(1, -1, 1)
    return resized.reshape(1, *[1] * (prediction.dim() - 3), *size)


def added_inside(outside: Tensor, without: Tensor, inside: Tensor, mask: Tensor) -> Tensor:
    """outside + mask * (inside - without): predictions of one shape, and a mask from `mask_on`.

    Where the mask is 1 the whole change that the adapter makes counts, where it is 0 none.
    """
    return outside + mask * (inside - without)
