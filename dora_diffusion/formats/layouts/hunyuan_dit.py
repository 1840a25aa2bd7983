"""Hunyuan-DiT as Tencent name it (github.com/Tencent/HunyuanDiT), beside HunyuanDiT2DModel.

Both call a block `blocks.N`, and some layers of it alike; the second and the third normalisation have changed names.
"""

from dora_diffusion.formats.layouts.patterns import renamed, table
from dora_diffusion.formats.layouts.record import Fusion

_BLOCK = "blocks.#."

EMBEDDINGS = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_extra_emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_extra_emb.timestep_embedder.linear_2",
    "extra_embedder.0": "time_extra_emb.extra_embedder.linear_1",
    "extra_embedder.2": "time_extra_emb.extra_embedder.linear_2",
    "style_embedder": "time_extra_emb.style_embedder",
    "pooler.q_proj": "time_extra_emb.pooler.q_proj",
    "pooler.k_proj": "time_extra_emb.pooler.k_proj",
    "pooler.v_proj": "time_extra_emb.pooler.v_proj",
    "pooler.c_proj": "time_extra_emb.pooler.c_proj",
    "mlp_t5.0": "text_embedder.linear_1",
    "mlp_t5.2": "text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
BLOCK = {
    "attn1.q_norm": "attn1.norm_q",
    "attn1.k_norm": "attn1.norm_k",
    "attn1.out_proj": "attn1.to_out.0",
    "attn2.q_proj": "attn2.to_q",
    "attn2.q_norm": "attn2.norm_q",
    "attn2.k_norm": "attn2.norm_k",
    "attn2.out_proj": "attn2.to_out.0",
    "norm1": "norm1.norm",
    "norm2": "norm3",
    "norm3": "norm2",
    "default_modulation.1": "norm1.linear",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "skip_norm": "skip_norm",
    "skip_linear": "skip_linear",
}
_QKV = tuple(f"{_BLOCK}attn1.{name}" for name in ("to_q", "to_k", "to_v"))
_KV = tuple(f"{_BLOCK}attn2.{name}" for name in ("to_k", "to_v"))

_TABLE = table(
    *renamed(EMBEDDINGS),
    *renamed(BLOCK, original=_BLOCK, path=_BLOCK),
    Fusion(f"{_BLOCK}attn1.Wqkv", _QKV, (1, 1, 1)),
    Fusion(f"{_BLOCK}attn2.kv_proj", _KV, (1, 1)),
    Fusion("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
)

HUNYUAN_DIT = _TABLE.layout("hunyuan-dit", ("hunyuan-dit",), "transformer")
