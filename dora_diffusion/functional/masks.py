"""Which part of a picture an adapter draws: masks, and predictions mixed by them."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


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
        prediction: maps (N, C, h, w) or (N, C, 1, h, w), or tokens (N, rows * columns or more, C).
        grid: rows and columns of the tokens; None for maps.
    """
    size = prediction.shape[-2:] if grid is None else torch.Size(grid)
    resized = F.interpolate(mask, size=size, mode="bilinear", antialias=True, align_corners=False).to(prediction)
    if grid is not None:
        # tokens behind the picture's are of reference pictures; what is predicted for them is thrown away
        return F.pad(resized.reshape(1, -1, 1), (0, 0, 0, prediction.shape[1] - size.numel()), value=1.0)
    return resized.reshape(1, *[1] * (prediction.dim() - 3), *size)


def added_inside(outside: Tensor, without: Tensor, inside: Tensor, mask: Tensor) -> Tensor:
    """outside + mask * (inside - without): predictions of one shape, and a mask from `mask_on`.

    Where the mask is 1 the whole change that the adapter makes counts, where it is 0 none.
    """
    return outside + mask * (inside - without)
