"""FLUX.2 as Black Forest Labs name it (github.com/black-forest-labs/flux2), beside Flux2Transformer2DModel.

Its normalisations of queries and keys keep their weight as `scale` there. `linear1` is one layer in diffusers too.
"""

from dora_diffusion.formats.layouts.patterns import proportions, renamed, table
from dora_diffusion.formats.layouts.record import Fusion

_DOUBLE, _BLOCK = "double_blocks.#.", "transformer_blocks.#."
_SINGLE, _SINGLE_BLOCK = "single_blocks.#.", "single_transformer_blocks.#."

EMBEDDINGS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}
DOUBLE = {
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
SINGLE = {
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_IMAGE_QKV = tuple(f"{_BLOCK}attn.{name}" for name in ("to_q", "to_k", "to_v"))
_TEXT_QKV = tuple(f"{_BLOCK}attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj"))

_TABLE = table(
    *renamed(EMBEDDINGS),
    *renamed(DOUBLE, original=_DOUBLE, path=_BLOCK),
    *renamed(SINGLE, original=_SINGLE, path=_SINGLE_BLOCK),
    Fusion(f"{_DOUBLE}img_attn.qkv", _IMAGE_QKV, (1, 1, 1)),
    Fusion(f"{_DOUBLE}txt_attn.qkv", _TEXT_QKV, (1, 1, 1)),
    Fusion("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
)


# Unlike FLUX.1, whose feed-forward is four times as wide, and not gated.
_FITS = proportions({"_mlp.0": (6, 1), "_mlp.2": (1, 3), ".linear1": (9, 1), ".linear2": (1, 4)})

FLUX_2 = _TABLE.layout("flux2", ("flux2", "flux2-klein"), "transformer", _FITS)
