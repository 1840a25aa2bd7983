"""Aspect-ratio buckets: the few sizes that pictures of many shapes are trained at, so that little of each is cut off.

Every function here is pure; sizes are (width, height) in pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

from dora_diffusion.training.data.examples import Example
from dora_diffusion.utils.text import shown_path

if TYPE_CHECKING:  # the doctor asks for shapes that are cut, and needs neither pydantic nor torch
    from dora_diffusion.training.base.sizes import Sizes
    from dora_diffusion.training.config import DataConfig

Size = tuple[int, int]

# A picture of a longer shape than 4:1 is cut to it; one longer than 8:1, of which that leaves half, is refused.
LONGEST_ASPECT = 4
SLIVER_ASPECT = 8
# Sides of buckets differ by this share of the resolution: 64 pixels at 1024, as is usual.
_STEPS = 16


def in_buckets(examples: Sequence[Example], data: "DataConfig", sizes: "Sizes") -> list[Example]:
    """Examples with the size that each is trained at; once for each resolution at which it has another.

    Raises:
        ValueError: a resolution that cannot be, or a picture too small for the least bucket, named.
    """
    return [replace(example, size=size) for example in examples for size in _sizes_of(example, data, sizes)]


def _sizes_of(example: Example, data: "DataConfig", sizes: "Sizes") -> list[Size]:
    resolutions = sizes.resolutions(data, example.resolutions)
    width, height = example.original
    if max(width, height) > SLIVER_ASPECT * min(width, height):
        raise ValueError(
            f"{shown_path(example.path)}: {width}x{height} pixels, a sliver of which little would be left; expected a "
            f"shape up to {SLIVER_ASPECT}:1, crop it or take it out"
        )
    if not data.buckets:
        return [(side, side) for side in resolutions]
    try:
        buckets = [
            bucket_of(example.original, resolution=side, multiple=sizes.multiple, upscale=data.upscale)
            for side in resolutions
        ]
    except ValueError as error:
        raise ValueError(f"{shown_path(example.path)}: {error}") from None
    return list(dict.fromkeys(buckets))


@lru_cache(maxsize=4096)
def bucket_of(picture: Size, *, resolution: int, multiple: int, upscale: bool = False) -> Size:
    """The size at which least of a picture is cut off, of no more pixels than a square of the resolution.

    Args:
        picture: its size.
        resolution: side of a square of as many pixels as a bucket may have.
        multiple: the base's, of which sides are multiples.
        upscale: whether pictures with fewer pixels are made larger; otherwise they have smaller buckets.

    Raises:
        ValueError: the picture is smaller than the least bucket.
    """
    if upscale:
        picture = _enlarged(picture, resolution)
    shorter = min(picture)
    if shorter < multiple:
        raise ValueError(
            f"{picture[0]}x{picture[1]} pixels, expected at least {multiple} on the shorter side; take a larger "
            "picture, or set data.upscale: true"
        )
    step = max(multiple, resolution // _STEPS // multiple * multiple)
    within = _buckets_within(picture, resolution, step if shorter >= step else multiple)
    return max(within, key=lambda size: (kept_share(picture, size), size[0] * size[1], size))


def _enlarged(picture: Size, resolution: int) -> Size:
    """A size of the same shape from which any bucket can be cut."""
    return picture[0] * 2 * resolution, picture[1] * 2 * resolution


def _buckets_within(picture: Size, resolution: int, step: int) -> Iterator[Size]:
    """For each side the longest other: no more pixels than the resolution's, no side longer than the picture's."""
    for first, second in ((0, 1), (1, 0)):
        for one in range(step, min(picture[first], LONGEST_ASPECT * resolution) + 1, step):
            other = min(resolution**2 // one, picture[second], LONGEST_ASPECT * one) // step * step
            if one <= LONGEST_ASPECT * other:
                yield (one, other) if first == 0 else (other, one)


def kept_share(picture: Size, size: Size) -> Fraction:
    """How much of a picture is left when it is scaled to cover a size and what lies over is cut off, 0..1."""
    one, other = size[0] * picture[1], size[1] * picture[0]
    return Fraction(min(one, other), max(one, other))
