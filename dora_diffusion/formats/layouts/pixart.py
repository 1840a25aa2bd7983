"""PixArt-alpha and Sigma as their makers name them (github.com/PixArt-alpha), beside PixArtTransformer2DModel.

NVIDIA's Sana was made from this code: attention and captions have the same names in both, and the same paths.
"""

from dora_diffusion.formats.layouts.patterns import proportions, renamed, table
from dora_diffusion.formats.layouts.record import Fusion

THEIRS, PATH = "blocks.#.", "transformer_blocks.#."

EMBEDDINGS = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}
ATTENTION = {
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0",
}
BLOCK = ATTENTION | {
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
PROJECTIONS = (
    Fusion(f"{THEIRS}attn.qkv", tuple(f"{PATH}attn1.{name}" for name in ("to_q", "to_k", "to_v")), (1, 1, 1)),
    Fusion(f"{THEIRS}cross_attn.kv_linear", tuple(f"{PATH}attn2.{name}" for name in ("to_k", "to_v")), (1, 1)),
)

_TABLE = table(
    *renamed(EMBEDDINGS),
    *renamed(BLOCK, original=THEIRS, path=PATH),
    *PROJECTIONS,
)


_FEED_FORWARD = proportions({".mlp.fc1": (4, 1), ".mlp.fc2": (1, 4)})


def fits(original: str, rows: int, columns: int) -> bool:
    """Unlike Hunyuan-DiT, whose feed-forward is wider, and unlike Sana, whose latents have 32 channels."""
    return _FEED_FORWARD(original, rows, columns) and (original != "x_embedder.proj" or columns == 4)


PIXART = _TABLE.layout("pixart", ("pixart-alpha", "pixart-sigma"), "transformer", fits)
