"""Sana as NVIDIA name it (github.com/NVlabs/Sana), beside SanaTransformer2DModel.

It was made from PixArt's code: what is in both has the same names, and in blocks the same paths.
"""

from dora_diffusion.formats.layouts.patterns import renamed, table
from dora_diffusion.formats.layouts.pixart import ATTENTION, PATH, PROJECTIONS, THEIRS

EMBEDDINGS = {
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
    "cfg_embedder.mlp.0": "time_embed.guidance_embedder.linear_1",
    "cfg_embedder.mlp.2": "time_embed.guidance_embedder.linear_2",
    "t_block.1": "time_embed.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "attention_y_norm": "caption_norm",
    "final_layer.linear": "proj_out",
}
BLOCK = ATTENTION | {
    "attn.q_norm": "attn1.norm_q",
    "attn.k_norm": "attn1.norm_k",
    "cross_attn.q_norm": "attn2.norm_q",
    "cross_attn.k_norm": "attn2.norm_k",
    "mlp.inverted_conv.conv": "ff.conv_inverted",
    "mlp.depth_conv.conv": "ff.conv_depth",
    "mlp.point_conv.conv": "ff.conv_point",
}

_TABLE = table(
    *renamed(EMBEDDINGS),
    *renamed(BLOCK, original=THEIRS, path=PATH),
    *PROJECTIONS,
)


def fits(original: str, rows: int, columns: int) -> bool:
    """Unlike PixArt, whose latents have 4 channels and whose captions are T5's."""
    return (original, columns) not in (("x_embedder.proj", 4), ("y_embedder.y_proj.fc1", 4096))


SANA = _TABLE.layout("sana", ("sana",), "transformer", fits)
