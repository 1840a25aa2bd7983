"""What diffusers' conversion scripts do to the checkpoints of models that diffusers reads from no single file.

The scripts are not in diffusers' wheel. Written down from github.com/huggingface/diffusers, `scripts/`:
`convert_pixart_alpha_to_diffusers.py`, `convert_pixart_sigma_to_diffusers.py` and `convert_hunyuandit_to_diffusers.py`.
Each function empties the checkpoint that it is given, and raises a KeyError for a tensor that is not there.
"""

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
BOTH = ("weight", "bias")
PIXART_BLOCKS, HUNYUAN_BLOCKS = 28, 40


def _move(left: Tensors, found: Tensors, theirs: str, ours: str) -> None:
    found.update({f"{ours}.{kind}": left.pop(f"{theirs}.{kind}") for kind in BOTH})


def _chunk(left: Tensors, found: Tensors, theirs: str, ours: tuple[str, ...]) -> None:
    for kind in BOTH:
        pieces = torch.chunk(left.pop(f"{theirs}.{kind}"), len(ours), dim=0)
        found.update({f"{path}.{kind}": piece for path, piece in zip(ours, pieces, strict=True)})


def pixart(left: Tensors) -> Tensors:
    """PixArt-alpha and Sigma; with sizes (`--micro_condition`, alpha's 1024) where the checkpoint has them."""
    found: Tensors = {}
    _move(left, found, "x_embedder.proj", "pos_embed.proj")
    _move(left, found, "y_embedder.y_proj.fc1", "caption_projection.linear_1")
    _move(left, found, "y_embedder.y_proj.fc2", "caption_projection.linear_2")
    embedders = {"t_embedder": "timestep_embedder"}
    if "csize_embedder.mlp.0.weight" in left:
        embedders |= {"csize_embedder": "resolution_embedder", "ar_embedder": "aspect_ratio_embedder"}
    for theirs, ours in embedders.items():
        _move(left, found, f"{theirs}.mlp.0", f"adaln_single.emb.{ours}.linear_1")
        _move(left, found, f"{theirs}.mlp.2", f"adaln_single.emb.{ours}.linear_2")
    _move(left, found, "t_block.1", "adaln_single.linear")
    for depth in range(PIXART_BLOCKS):
        theirs, ours = f"blocks.{depth}", f"transformer_blocks.{depth}"
        found[f"{ours}.scale_shift_table"] = left.pop(f"{theirs}.scale_shift_table")
        _chunk(left, found, f"{theirs}.attn.qkv", (f"{ours}.attn1.to_q", f"{ours}.attn1.to_k", f"{ours}.attn1.to_v"))
        _move(left, found, f"{theirs}.attn.proj", f"{ours}.attn1.to_out.0")
        _move(left, found, f"{theirs}.mlp.fc1", f"{ours}.ff.net.0.proj")
        _move(left, found, f"{theirs}.mlp.fc2", f"{ours}.ff.net.2")
        _move(left, found, f"{theirs}.cross_attn.q_linear", f"{ours}.attn2.to_q")
        _chunk(left, found, f"{theirs}.cross_attn.kv_linear", (f"{ours}.attn2.to_k", f"{ours}.attn2.to_v"))
        _move(left, found, f"{theirs}.cross_attn.proj", f"{ours}.attn2.to_out.0")
    _move(left, found, "final_layer.linear", "proj_out")
    found["scale_shift_table"] = left.pop("final_layer.scale_shift_table")
    for unread in ("y_embedder.y_embedding", "pos_embed"):
        left.pop(unread)
    return found


def hunyuan_dit(left: Tensors) -> Tensors:
    """Hunyuan-DiT; with styles and sizes (1.1 and before) where the checkpoint has them."""
    found: Tensors = {}
    for number in range(HUNYUAN_BLOCKS):
        _hunyuan_block(left, found, f"blocks.{number}")
    pooler = "time_extra_emb.pooler"
    found[f"{pooler}.positional_embedding"] = left.pop("pooler.positional_embedding")
    for name in ("k_proj", "q_proj", "v_proj", "c_proj"):
        _move(left, found, f"pooler.{name}", f"{pooler}.{name}")
    _move(left, found, "t_embedder.mlp.0", "time_extra_emb.timestep_embedder.linear_1")
    _move(left, found, "t_embedder.mlp.2", "time_extra_emb.timestep_embedder.linear_2")
    _move(left, found, "x_embedder.proj", "pos_embed.proj")
    _move(left, found, "mlp_t5.0", "text_embedder.linear_1")
    _move(left, found, "mlp_t5.2", "text_embedder.linear_2")
    _move(left, found, "extra_embedder.0", "time_extra_emb.extra_embedder.linear_1")
    _move(left, found, "extra_embedder.2", "time_extra_emb.extra_embedder.linear_2")
    for kind in BOTH:
        shift, scale = left.pop(f"final_layer.adaLN_modulation.1.{kind}").chunk(2, dim=0)
        found[f"norm_out.linear.{kind}"] = torch.cat([scale, shift], dim=0)
    _move(left, found, "final_layer.linear", "proj_out")
    if "style_embedder.weight" in left:
        found["time_extra_emb.style_embedder.weight"] = left.pop("style_embedder.weight")[0:1]
    found["text_embedding_padding"] = left.pop("text_embedding_padding")
    return found


def _hunyuan_block(left: Tensors, found: Tensors, block: str) -> None:
    """Its names on both sides begin with `blocks.N`; what the script does not touch keeps its name."""
    _chunk(left, found, f"{block}.attn1.Wqkv", tuple(f"{block}.attn1.{name}" for name in ("to_q", "to_k", "to_v")))
    _chunk(left, found, f"{block}.attn2.kv_proj", tuple(f"{block}.attn2.{name}" for name in ("to_k", "to_v")))
    _move(left, found, f"{block}.attn2.q_proj", f"{block}.attn2.to_q")
    for attention in ("attn1", "attn2"):
        _move(left, found, f"{block}.{attention}.q_norm", f"{block}.{attention}.norm_q")
        _move(left, found, f"{block}.{attention}.k_norm", f"{block}.{attention}.norm_k")
        _move(left, found, f"{block}.{attention}.out_proj", f"{block}.{attention}.to_out.0")
    _move(left, found, f"{block}.norm2", f"{block}.norm3")
    _move(left, found, f"{block}.norm3", f"{block}.norm2")
    _move(left, found, f"{block}.norm1", f"{block}.norm1.norm")
    _move(left, found, f"{block}.default_modulation.1", f"{block}.norm1.linear")
    _move(left, found, f"{block}.mlp.fc1", f"{block}.ff.net.0.proj")
    _move(left, found, f"{block}.mlp.fc2", f"{block}.ff.net.2")
    if f"{block}.skip_linear.weight" in left:
        _move(left, found, f"{block}.skip_norm", f"{block}.skip_norm")
        _move(left, found, f"{block}.skip_linear", f"{block}.skip_linear")
