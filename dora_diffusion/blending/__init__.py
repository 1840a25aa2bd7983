"""Several adapters made into one, saved like any other; and how far adapters get in each other's way."""

from dora_diffusion.blending.overlaps import Interference, block_of, interference
from dora_diffusion.blending.records import (
    BLEND_SENTENCES,
    Blended,
    BlendOptions,
    BlendReport,
    LayerReport,
    Progress,
)
from dora_diffusion.blending.whole import blend, blend_with_report, needs_base

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
