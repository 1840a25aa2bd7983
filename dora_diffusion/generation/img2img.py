"""Drawing from a picture, all of it or inside a mask: the pipeline that does it, and what stays outside the mask."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from dora_diffusion.families import Family
from dora_diffusion.functional.masks import mask_of
from dora_diffusion.utils.checks import check_fields

DEFAULT_STRENGTH = 0.75


@dataclass(frozen=True)
class Canvas:
    """A picture to start from.

    Attributes:
        image: RGB; scaled and cropped about its middle to the size that is drawn.
        mask: L, white where the picture is drawn anew; outside it the picture is kept. None draws all of it anew.
    """

    image: Image.Image
    mask: Image.Image | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def fitted(self, width: int, height: int) -> "Canvas":
        """Scaled and cropped about the middle to a size in pixels, both in their modes."""
        mask = None if self.mask is None else _fitted(self.mask.convert("L"), (width, height))
        return Canvas(_fitted(self.image.convert("RGB"), (width, height)), mask)

    def kept_outside(self, picture: Image.Image) -> Image.Image:
        """A picture of the canvas's size, with the canvas's own pixels outside the mask."""
        return picture if self.mask is None else Image.composite(picture, self.image, self.mask)


def _fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class KeptRegion:
    """What stays outside a mask, in latents: (1, C, h, w) each, the mask (1, 1, h, w) and 1 inside."""

    clean: Tensor
    noise: Tensor
    mask: Tensor

    def kept(self, latents: Tensor, scheduler: Any, index: int, total: int) -> Tensor:
        """Latents after step `index` of `total`, with the canvas outside, as noisy as the next step expects it."""
        outside = self.clean
        if index + 1 < total:
            outside = scheduler.add_noise(self.clean, self.noise, scheduler.timesteps[-total:][index + 1 : index + 2])
        return (outside + self.mask * (latents - outside)).to(latents.dtype)


@dataclass(frozen=True)
class Start:
    """Where a drawing begins.

    Attributes:
        pipe: the pipeline that draws, of the very components of the one given.
        arguments: its arguments for canvas, strength and size.
        outside: what is put back after every step; None without a mask, or where the pipeline does it itself.
    """

    pipe: Any
    arguments: Mapping[str, Any]
    outside: KeptRegion | None = None


def start_on(pipe: Any, family: Family, canvas: Canvas, *, strength: float, seed: int) -> Start:
    """How to draw on a canvas.

    Args:
        pipe: the pipeline whose components draw.
        family: its family.
        canvas: fitted to the size that is drawn.
        strength: how much is drawn anew, above 0 up to 1.
        seed: of the noise over what stays.

    Raises:
        ValueError: diffusers has no such pipeline for the family.
    """
    by_hand = canvas.mask is not None and _has_other_channels(pipe, family)
    drawing = _sibling(pipe, family, has_mask=canvas.mask is not None and not by_hand)
    known = inspect.signature(drawing.__call__).parameters
    sides = {name: side for name, side in (("width", canvas.image.width), ("height", canvas.image.height))}
    arguments = {"image": canvas.image, "strength": strength, **{name: sides[name] for name in sides if name in known}}
    if canvas.mask is None:
        return Start(drawing, arguments)
    if by_hand:
        return Start(drawing, arguments, _outside(pipe, family, canvas.image, canvas.mask, seed))
    return Start(drawing, {**arguments, "mask_image": canvas.mask})


def _has_other_channels(pipe: Any, family: Family) -> bool:
    """Whether diffusers' inpainting refuses the model: that of UNets wants 4 channels of latents, or 9 with a mask."""
    denoiser = getattr(pipe, family.denoiser.name)
    return family.denoiser.name == "unet" and denoiser.config.in_channels not in (4, 9)


def _sibling(pipe: Any, family: Family, *, has_mask: bool) -> Any:
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    maker, way = (AutoPipelineForInpainting, "inside a mask") if has_mask else (AutoPipelineForImage2Image, "a picture")
    try:
        sibling = maker.from_pipe(pipe)
    except ValueError:
        sibling = None
    # some pipelines take pictures to look at, not to start from
    if sibling is None or "strength" not in inspect.signature(sibling.__call__).parameters:
        raise ValueError(f"canvas: diffusers cannot draw from {way} with {family.name}; draw without it")
    assert getattr(sibling, family.denoiser.name) is getattr(pipe, family.denoiser.name)
    return sibling


@torch.no_grad()
def _outside(pipe: Any, family: Family, image: Image.Image, mask: Image.Image, seed: int) -> KeptRegion:
    denoiser = getattr(pipe, family.denoiser.name)
    pixels = pipe.image_processor.preprocess(image).to(denoiser.device, denoiser.dtype)
    clean = family.codec.encode(pipe, pixels)
    generator = torch.Generator().manual_seed(seed)
    # the pipeline takes from its seed a sample of the encoder's posterior first, and then this very noise
    _, noise = (torch.randn(clean.shape, generator=generator) for _ in range(2))
    small = interpolate(mask_of(mask), size=clean.shape[-2:], mode="area")
    return KeptRegion(clean, noise.to(clean), small.to(clean))
