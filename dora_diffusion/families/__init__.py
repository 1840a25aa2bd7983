"""The registry of model families. Adding one: a file with a `Family` record, an entry here, a tiny-pipeline test."""

from typing import Any

from torch import nn

from dora_diffusion.families.aura_flow import AURA_FLOW
from dora_diffusion.families.coverage import Coverage, coverage, ends_with
from dora_diffusion.families.flux import FLUX
from dora_diffusion.families.flux2 import FLUX_2, FLUX_2_KLEIN
from dora_diffusion.families.hunyuan_dit import HUNYUAN_DIT
from dora_diffusion.families.lumina2 import LUMINA_2
from dora_diffusion.families.pixart import PIXART_ALPHA, PIXART_SIGMA
from dora_diffusion.families.qwen_image import QWEN_IMAGE
from dora_diffusion.families.record import Component, Drawing, Family
from dora_diffusion.families.sana import SANA
from dora_diffusion.families.stable_diffusion import STABLE_DIFFUSION_1, STABLE_DIFFUSION_2, STABLE_DIFFUSION_XL
from dora_diffusion.families.stable_diffusion_3 import STABLE_DIFFUSION_3
from dora_diffusion.families.z_image import Z_IMAGE

__all__ = [
    "FAMILIES",
    "Component",
    "Coverage",
    "Drawing",
    "Family",
    "component_of_model",
    "coverage",
    "ends_with",
    "family_named",
    "family_of_denoiser",
    "family_of_pipeline",
    "pixel_multiple",
]

FAMILIES: tuple[Family, ...] = (
    STABLE_DIFFUSION_1,
    STABLE_DIFFUSION_2,
    STABLE_DIFFUSION_XL,
    STABLE_DIFFUSION_3,
    AURA_FLOW,
    FLUX,
    FLUX_2,
    FLUX_2_KLEIN,
    SANA,
    PIXART_ALPHA,
    PIXART_SIGMA,
    HUNYUAN_DIT,
    QWEN_IMAGE,
    LUMINA_2,
    Z_IMAGE,
)


def family_named(name: str | None) -> Family | None:
    """The family of a name, as adapters' metadata have it; None for one that is not known here."""
    return next((family for family in FAMILIES if family.name == name), None)


def family_of_pipeline(pipe: Any) -> Family:
    """The family of a diffusers pipeline that can be trained and drawn with here.

    Told by its class, or one that it derives from, and its denoiser's config.

    Raises:
        ValueError: there is none; the line says what works with such a pipeline all the same.
    """
    for kind in _names_of(type(pipe)):
        for family in FAMILIES:
            denoiser = getattr(pipe, family.denoiser.name, None)
            if kind in family.pipeline_classes and denoiser is not None and family.is_mine(denoiser.config):
                return family
    known = ", ".join(family.name for family in FAMILIES)
    raise ValueError(
        f"{type(pipe).__name__} belongs to no family that can be trained or drawn with here ({known}); adapters load "
        "into any pipeline: AdapterManager(pipe), then call the pipeline itself to draw"
    )


def family_of_denoiser(model: nn.Module) -> Family | None:
    """The family that a denoiser is of, by its class, or one that it derives from, and its config; None if unknown."""
    config = getattr(model, "config", {})
    for kind in _names_of(type(model)):
        for family in FAMILIES:
            if kind in family.denoiser.model_classes and family.is_mine(config):
                return family
    return None


def pixel_multiple(pipe: Any, family: Family) -> int:
    """Sides of pictures are multiples of this many pixels: the VAE's factor times the side of a token."""
    return int(pipe.vae_scale_factor * family.patch)


def component_of_model(model: nn.Module) -> Component | None:
    """The component a bare model can be, by its class or one that it derives from, or None."""
    components = [component for family in FAMILIES for component in family.components]
    for kind in _names_of(type(model)):
        for component in components:
            if kind in component.model_classes:
                return component
    return None


def _names_of(kind: type) -> tuple[str, ...]:
    """The names of a class and of those that it derives from, itself first."""
    return tuple(base.__name__ for base in kind.__mro__)
