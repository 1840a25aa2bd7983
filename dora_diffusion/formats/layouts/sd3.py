"""Stable Diffusion 3 and 3.5 as Stability AI name them (github.com/Stability-AI/sd3.5), beside SD3Transformer2DModel.

The last block's context is normalised as a final layer is, by a shift and a scale, which diffusers swaps. No name says
which block is the last: number 23 is it in SD 3 and SD 3.5 medium (24 blocks), but is like any other in SD 3.5 large
(38). The shape says it at every depth: the last one's adaLN has two rows for each column, the others' six.
"""

from dora_diffusion.formats.layouts.patterns import renamed, table
from dora_diffusion.formats.layouts.record import Fusion

_JOINT, _BLOCK = "joint_blocks.#.", "transformer_blocks.#."

EMBEDDINGS = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
JOINT = {
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
QKV = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}

_TABLE = table(
    *renamed(EMBEDDINGS),
    *renamed(JOINT, original=_JOINT, path=_BLOCK),
    *(Fusion(_JOINT + fused, tuple(_BLOCK + path for path in paths), (1, 1, 1)) for fused, paths in QKV.items()),
    Fusion(f"{_JOINT}context_block.adaLN_modulation.1", (f"{_BLOCK}norm1_context.linear",), swapped_by_shape=True),
    Fusion("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
)

SD3 = _TABLE.layout("sd3", ("sd3",), "transformer")
