"""Lumina-Image 2.0 as its makers name it (github.com/Alpha-VLLM/Lumina-Image-2.0), beside Lumina2Transformer2DModel.

Queries have 24 heads of 96 channels, keys and values 8 each, so the rows of `qkv` are shared 3 to 1 to 1.
"""

from dora_diffusion.formats.layouts.patterns import proportions, renamed, table, under
from dora_diffusion.formats.layouts.record import Fusion

EMBEDDINGS = {
    "x_embedder": "x_embedder",
    "cap_embedder.0": "time_caption_embed.caption_embedder.0",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}
BLOCK = {
    "attention.out": "attn.to_out.0",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    "attention_norm2": "norm2",
    "ffn_norm1": "ffn_norm1",
    "ffn_norm2": "ffn_norm2",
    "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3",
}
MODULATED = BLOCK | {"attention_norm1": "norm1.norm", "adaLN_modulation.1": "norm1.linear"}
BLOCKS = {
    "layers.#.": MODULATED,
    "noise_refiner.#.": MODULATED,
    "context_refiner.#.": BLOCK | {"attention_norm1": "norm1"},
}
QKV = Fusion("attention.qkv", ("attn.to_q", "attn.to_k", "attn.to_v"), (3, 1, 1))

_TABLE = table(
    *renamed(EMBEDDINGS),
    *(fusion for block, names in BLOCKS.items() for fusion in renamed(names, original=block, path=block)),
    *(under(QKV, original=block, path=block) for block in BLOCKS),
)


# Unlike Z-Image, whose keys and values are as wide as its queries.
_FITS = proportions({".attention.qkv": (5, 3), ".feed_forward.w1": (4, 1), ".feed_forward.w3": (4, 1)})

LUMINA_2 = _TABLE.layout("lumina2", ("lumina2",), "transformer", _FITS)
