"""A tiny pipeline with random weights for every family, and for every variant that takes another path."""

from tests.families.pipelines import (
    aura_flow,
    flux,
    flux2,
    hunyuan_dit,
    lumina2,
    pixart,
    qwen_image,
    sana,
    stable_diffusion,
    stable_diffusion_3,
    z_image,
)
from tests.families.pipelines.record import Tiny

PIPELINES: dict[str, Tiny] = {
    **lumina2.PIPELINES,
    **hunyuan_dit.PIPELINES,
    **pixart.PIPELINES,
    **sana.PIPELINES,
    **aura_flow.PIPELINES,
    **flux.PIPELINES,
    **flux2.PIPELINES,
    **qwen_image.PIPELINES,
    **z_image.PIPELINES,
    **stable_diffusion.PIPELINES,
    **stable_diffusion_3.PIPELINES,
}
