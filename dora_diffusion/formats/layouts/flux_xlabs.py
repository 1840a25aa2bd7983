"""FLUX.1's attention as XLabs' processors call it (github.com/XLabs-AI/x-flux), beside FluxTransformer2DModel."""

from dora_diffusion.formats.layouts.patterns import table
from dora_diffusion.formats.layouts.record import Fusion

_DOUBLE, _BLOCK = "double_blocks.#.processor.", "transformer_blocks.#.attn."
_SINGLE, _SINGLE_BLOCK = "single_blocks.#.processor.", "single_transformer_blocks.#."

_TABLE = table(
    Fusion(f"{_DOUBLE}qkv_lora1", tuple(f"{_BLOCK}{name}" for name in ("to_q", "to_k", "to_v")), (1, 1, 1)),
    Fusion(f"{_DOUBLE}proj_lora1", (f"{_BLOCK}to_out.0",)),
    Fusion(
        f"{_DOUBLE}qkv_lora2",
        tuple(f"{_BLOCK}{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")),
        (1, 1, 1),
    ),
    Fusion(f"{_DOUBLE}proj_lora2", (f"{_BLOCK}to_add_out",)),
    Fusion(f"{_SINGLE}qkv_lora", tuple(f"{_SINGLE_BLOCK}attn.{name}" for name in ("to_q", "to_k", "to_v")), (1, 1, 1)),
    Fusion(f"{_SINGLE}proj_lora", (f"{_SINGLE_BLOCK}proj_out",)),
)

FLUX_XLABS = _TABLE.layout("flux-xlabs", ("flux",), "transformer")
