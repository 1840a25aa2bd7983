"""Z-Image as single files name it (ComfyUI's, which are Lumina's names), beside ZImageTransformer2DModel.

Its makers' own code names the layers as diffusers does. Queries, keys and values have 30 heads each.
"""

from dora_diffusion.formats.layouts.patterns import proportions, renamed, table, under
from dora_diffusion.formats.layouts.record import Fusion

EMBEDDINGS = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "cap_embedder.0": "cap_embedder.0",
    "cap_embedder.1": "cap_embedder.1",
    "t_embedder.mlp.0": "t_embedder.mlp.0",
    "t_embedder.mlp.2": "t_embedder.mlp.2",
}
BLOCK = {
    "attention.out": "attention.to_out.0",
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
    "attention_norm1": "attention_norm1",
    "attention_norm2": "attention_norm2",
    "ffn_norm1": "ffn_norm1",
    "ffn_norm2": "ffn_norm2",
    "feed_forward.w1": "feed_forward.w1",
    "feed_forward.w2": "feed_forward.w2",
    "feed_forward.w3": "feed_forward.w3",
}
MODULATED = BLOCK | {"adaLN_modulation.0": "adaLN_modulation.0"}
BLOCKS = {"layers.#.": MODULATED, "noise_refiner.#.": MODULATED, "context_refiner.#.": BLOCK}
QKV = Fusion("attention.qkv", ("attention.to_q", "attention.to_k", "attention.to_v"), (1, 1, 1))

_TABLE = table(
    *renamed(EMBEDDINGS),
    *(fusion for block, names in BLOCKS.items() for fusion in renamed(names, original=block, path=block)),
    *(under(QKV, original=block, path=block) for block in BLOCKS),
)


# Unlike Lumina-Image 2.0, whose queries are wider than its keys.
_FITS = proportions({".attention.qkv": (3, 1)})

Z_IMAGE = _TABLE.layout("z-image", ("z-image",), "transformer", _FITS)
