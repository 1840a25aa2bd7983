"""Original names of models' layers: one file per architecture, one entry here."""

from dora_diffusion.formats.layouts.aura_flow import AURA_FLOW
from dora_diffusion.formats.layouts.clip import CLIP, CLIP_2, OPEN_CLIP_G, OPEN_CLIP_H
from dora_diffusion.formats.layouts.flux import FLUX
from dora_diffusion.formats.layouts.flux2 import FLUX_2
from dora_diffusion.formats.layouts.flux_xlabs import FLUX_XLABS
from dora_diffusion.formats.layouts.hunyuan_dit import HUNYUAN_DIT
from dora_diffusion.formats.layouts.lumina2 import LUMINA_2
from dora_diffusion.formats.layouts.pixart import PIXART
from dora_diffusion.formats.layouts.record import Fusion, Layout
from dora_diffusion.formats.layouts.sana import SANA
from dora_diffusion.formats.layouts.sd3 import SD3
from dora_diffusion.formats.layouts.unet import LDM, SGM
from dora_diffusion.formats.layouts.z_image import Z_IMAGE

__all__ = ["LAYOUTS", "OTHER_NAMES", "Fusion", "Layout"]

LAYOUTS: tuple[Layout, ...] = (
    LDM,
    SGM,
    CLIP,
    CLIP_2,
    OPEN_CLIP_H,
    OPEN_CLIP_G,
    FLUX,
    SD3,
    FLUX_2,
    AURA_FLOW,
    LUMINA_2,
    Z_IMAGE,
    SANA,
    PIXART,
    HUNYUAN_DIT,
)

OTHER_NAMES: tuple[Layout, ...] = (FLUX_XLABS,)
"""Further names of a component that has a layout, which are read and not written."""
