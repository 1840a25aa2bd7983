"""Views: how a picture is cropped and mirrored each time that it is trained, and its pixels."""

from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dora_diffusion.training.config import DataConfig
from dora_diffusion.training.data.captions import unit_of
from dora_diffusion.training.data.examples import Example
from dora_diffusion.training.data.masks import read_mask
from dora_diffusion.utils.images import Crop, fit, frame_of, read_image


@dataclass(frozen=True)
class View:
    """One way to show a picture.

    Attributes:
        flip: mirrored left to right.
        offset: (x, y), each 0..1, of what is cut off how much is cut left and above; None = the centre is kept.
    """

    flip: bool = False
    offset: tuple[float, float] | None = None


def are_few(data: DataConfig) -> bool:
    """Whether pictures have so few views that each is worth keeping."""
    return data.has_few_views


def fresh_view(data: DataConfig, rng: Random) -> View:
    """Another view each time, drawn from `rng`; what is not random is not drawn."""
    flip = data.flip and rng.random() < 0.5
    return View(flip, (rng.random(), rng.random()) if data.crop == "random" else None)


def variant(data: DataConfig, example: Example, number: int, *, seed: int) -> View:
    """View `number` of the few that a picture has in a run; where pictures are mirrored, every second one is."""
    name = f"{seed}/{example.path.name}/variant {number}"
    offset = (unit_of(f"{name}/x"), unit_of(f"{name}/y")) if data.crop == "random" else None
    return View(data.flip and number % 2 == 1, offset)


def view_at(data: DataConfig, example: Example, rng: Random, *, seed: int, place: str) -> View:
    """The view of one sample: one of a picture's few by `place` alone, or a fresh one.

    Args:
        data: crop, flip and how many variants there are.
        example: the picture.
        rng: of fresh views.
        seed: of the run.
        place: what tells the sample from all others.
    """
    if not data.cache_variants:
        return fresh_view(data, rng)
    return variant(data, example, int(unit_of(f"{seed}/{place}/view") * data.cache_variants), seed=seed)


class Sample(NamedTuple):
    """A picture as it is trained.

    Attributes:
        pixels: fp32 (3, height, width) in [-1, 1].
        frame: fp32 (6,); see `frame_of`.
        mask: fp32 (1, height, width) in [0, 1], 1 where the picture counts; None = all of it does.
    """

    pixels: Tensor
    frame: Tensor
    mask: Tensor | None = None


def load_sample(example: Example, view: View, *, with_mask: bool = False) -> Sample:
    """Read a picture anew, at the size that it is trained at.

    Args:
        example: it has a `size`.
        view: how it is shown.
        with_mask: read its mask, or take its alpha channel for one.

    Raises:
        ValueError: the picture or its mask cannot be read.
    """
    original = read_image(example.path)
    mask = read_mask(example.path, example.mask, original.size) if with_mask else None
    pixels = _pixels(original, example.size, view).div_(127.5).sub_(1)
    offset = view.offset
    if view.flip and offset is not None:  # mirrored, what was cut off on the right is cut off on the left
        offset = (1 - offset[0], offset[1])
    frame = torch.tensor(frame_of(original.size, size=example.size, offset=offset), dtype=torch.float32)
    return Sample(pixels, frame, None if mask is None else _pixels(mask, example.size, view).div_(255))


def _pixels(picture: Image.Image, size: tuple[int, int], view: View) -> Tensor:
    """(channels, height, width) fp32, 0..255."""
    crop: Crop = "center" if view.offset is None else "random"
    fitted = fit(picture, size=size, crop=crop, offset=view.offset)
    if view.flip:
        fitted = fitted.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    values = torch.from_numpy(np.array(fitted)).reshape(size[1], size[0], -1).permute(2, 0, 1)
    return values.to(torch.float32, memory_format=torch.contiguous_format)
