"""FLUX.1 as Black Forest Labs name it (github.com/black-forest-labs/flux), beside FluxTransformer2DModel.

Its normalisations of queries and keys keep their weight as `scale` there.
"""

from dora_diffusion.formats.layouts.patterns import proportions, renamed, table
from dora_diffusion.formats.layouts.record import Fusion

_DOUBLE, _BLOCK = "double_blocks.#.", "transformer_blocks.#."
_SINGLE, _SINGLE_BLOCK = "single_blocks.#.", "single_transformer_blocks.#."

EMBEDDINGS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
DOUBLE = {
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
SINGLE = {
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_IMAGE_QKV = tuple(f"{_BLOCK}attn.{name}" for name in ("to_q", "to_k", "to_v"))
_TEXT_QKV = tuple(f"{_BLOCK}attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj"))
_LINEAR_1 = tuple(f"{_SINGLE_BLOCK}{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))

_TABLE = table(
    *renamed(EMBEDDINGS),
    *renamed(DOUBLE, original=_DOUBLE, path=_BLOCK),
    *renamed(SINGLE, original=_SINGLE, path=_SINGLE_BLOCK),
    Fusion(f"{_DOUBLE}img_attn.qkv", _IMAGE_QKV, (1, 1, 1)),
    Fusion(f"{_DOUBLE}txt_attn.qkv", _TEXT_QKV, (1, 1, 1)),
    Fusion(f"{_SINGLE}linear1", _LINEAR_1, (1, 1, 1, 4)),  # the feed-forward is four times as wide
    Fusion("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
)


# Unlike FLUX.2, whose feed-forward is three times as wide, not four, and gated.
_FITS = proportions({"_mlp.0": (4, 1), "_mlp.2": (1, 4), ".linear1": (7, 1), ".linear2": (1, 5)})

FLUX = _TABLE.layout("flux", ("flux",), "transformer", _FITS)
