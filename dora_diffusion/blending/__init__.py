"""Several adapters made into one, saved like any other; and how far adapters get in each other's way."""

from dora_diffusion.blending.blend import blend, blend_with_report, needs_base
from dora_diffusion.blending.interference import Interference, block_of, interference
from dora_diffusion.blending.reports import (
    BLEND_SENTENCES,
    Blended,
    BlendOptions,
    BlendReport,
    LayerReport,
)
from dora_diffusion.utils.progress import LayerProgress as Progress

__all__ = [
    "BLEND_SENTENCES",
    "BlendOptions",
    "BlendReport",
    "Blended",
    "Interference",
    "LayerReport",
    "Progress",
    "blend",
    "blend_with_report",
    "block_of",
    "interference",
    "needs_base",
]
