"""PixArt, Sana and Hunyuan-DiT, whose makers all call a block `blocks.N`: files under original names, spelt out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanDiT2DModel, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_diffusion.formats import detect_format, examine, load_adapter, save_adapter
from dora_diffusion.formats.family_detection import family_of
from tests.tolerances import assert_identical

Shapes = Mapping[str, tuple[int, int]]

# Rows and columns, as small as the layers of the tiny models below.
PIXART: Shapes = {
    **{"x_embedder.proj": (24, 4), "y_embedder.y_proj.fc1": (24, 16), "y_embedder.y_proj.fc2": (24, 24)},
    **{"t_embedder.mlp.0": (24, 256), "t_embedder.mlp.2": (24, 24), "t_block.1": (144, 24)},
    **{"csize_embedder.mlp.0": (8, 256), "csize_embedder.mlp.2": (8, 8)},
    **{"ar_embedder.mlp.0": (8, 256), "ar_embedder.mlp.2": (8, 8)},
    **{"blocks.0.attn.qkv": (72, 24), "blocks.0.attn.proj": (24, 24)},
    **{"blocks.0.cross_attn.q_linear": (24, 24), "blocks.0.cross_attn.kv_linear": (48, 24)},
    **{"blocks.1.cross_attn.proj": (24, 24), "blocks.1.mlp.fc1": (96, 24), "blocks.1.mlp.fc2": (24, 96)},
    **{"final_layer.linear": (32, 24)},
}
HUNYUAN_DIT: Shapes = {
    **{"x_embedder.proj": (16, 4), "t_embedder.mlp.0": (16, 256), "t_embedder.mlp.2": (16, 16)},
    **{"extra_embedder.0": (64, 2576), "extra_embedder.2": (16, 64)},
    **{"pooler.q_proj": (24, 24), "pooler.k_proj": (24, 24), "pooler.v_proj": (24, 24), "pooler.c_proj": (1024, 24)},
    **{"mlp_t5.0": (96, 24), "mlp_t5.2": (16, 96)},
    **{"blocks.0.attn1.Wqkv": (48, 16), "blocks.0.attn1.out_proj": (16, 16)},
    **{"blocks.0.attn2.q_proj": (16, 16), "blocks.0.attn2.kv_proj": (32, 16), "blocks.1.attn2.out_proj": (16, 16)},
    **{"blocks.1.mlp.fc1": (64, 16), "blocks.1.mlp.fc2": (16, 64), "blocks.1.default_modulation.1": (16, 16)},
    **{"blocks.3.skip_linear": (16, 32)},
    **{"final_layer.adaLN_modulation.1": (32, 16), "final_layer.linear": (32, 16)},
}


def pixart() -> nn.Module:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=128,
        use_additional_conditions=True,
    )


def hunyuan_dit() -> nn.Module:
    return HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=4,
        cross_attention_dim=16,
        cross_attention_dim_t5=24,
        use_style_cond_and_image_meta_size=True,
    )


CASES: dict[str, tuple[Shapes, Any, str]] = {
    "PixArt": (PIXART, pixart, "pixart-alpha"),
    "Hunyuan-DiT": (HUNYUAN_DIT, hunyuan_dit, "hunyuan-dit"),
}
EVERY = pytest.mark.parametrize(("shapes", "model", "family"), CASES.values(), ids=CASES)


def pair(layer: str, rows: int, columns: int, down: str, up: str) -> dict[str, Tensor]:
    """A DoRA of rank 2; a convolution's where the makers have one."""
    kernel = (2, 2) if layer.endswith("x_embedder.proj") or layer.endswith("x_embedder_proj") else ()
    ones = (1,) * len(kernel)
    return {
        f"{layer}.{down}.weight": torch.randn(2, columns, *kernel),
        f"{layer}.{up}.weight": torch.randn(rows, 2, *ones),
        f"{layer}.alpha": torch.tensor(1.0),
        f"{layer}.dora_scale": torch.rand(rows, 1, *ones),
    }


def theirs(shapes: Shapes, prefix: str, *, flat: bool = False, parts: tuple[str, str] = ("lora_A", "lora_B")) -> dict:
    names = {name: prefix + (name.replace(".", "_") if flat else name) for name in shapes}
    return {k: t for name, shape in shapes.items() for k, t in pair(names[name], *shape, *parts).items()}


@EVERY
@pytest.mark.parametrize(("format", "prefix"), [("comfyui", "diffusion_model."), ("original", "")])
def test_a_file_comes_back_bit_for_bit(
    tmp_path: Path, shapes: Shapes, model: Any, family: str, format: str, prefix: str
) -> None:
    tensors = theirs(shapes, prefix)
    save_file(tensors, tmp_path / "theirs.safetensors", {"modelspec.architecture": f"{family}/lora"})
    assert detect_format(tmp_path / "theirs.safetensors") == format
    read = load_adapter(tmp_path / "theirs.safetensors")
    assert family_of(read) == family
    assert_identical(load_file(save_adapter(read, tmp_path / "ours.safetensors", format=format)), tensors)


@EVERY
@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_every_layer_of_it_is_one_that_diffusers_model_has(
    tmp_path: Path, shapes: Shapes, model: Any, family: str, prefix: str
) -> None:
    """The makers' words flat, too, as Tencent's trainer and OneTrainer write them."""
    is_flat = prefix.endswith("_")
    parts = ("lora_down", "lora_up") if is_flat else ("lora_A", "lora_B")
    save_file(theirs(shapes, prefix, flat=is_flat, parts=parts), tmp_path / "theirs.safetensors")
    assert not examine(tmp_path / "theirs.safetensors").unknown
    read = load_adapter(tmp_path / "theirs.safetensors")
    layers = dict(model().named_modules())
    for path, module in read.modules.items():
        weight = layers[path.removeprefix("transformer.")].weight
        assert tuple(module.shape) == (len(weight), weight[0].numel()), path
    assert len(read.modules) == len(shapes) + 3  # q, k, v for one; k, v for one
    keys = load_file(save_adapter(read, tmp_path / "ours.safetensors", format="diffusers"))
    written = {key.partition(".lora_")[0].removeprefix("transformer.") for key in keys}
    assert written == {path.removeprefix("transformer.") for path in read.modules} <= layers.keys()


def test_the_second_and_third_normalisation_of_hunyuan_dit_change_names(tmp_path: Path) -> None:
    names = ("norm1", "norm2", "norm3", "attn1.q_norm", "attn2.k_norm")
    vectors = {f"diffusion_model.blocks.2.{name}.w_norm": torch.randn(16) for name in names}
    tensors = theirs({"blocks.2.attn1.Wqkv": (48, 16)}, "diffusion_model.") | vectors
    save_file(tensors, tmp_path / "theirs.safetensors")
    read = load_adapter(tmp_path / "theirs.safetensors")
    for original, path in (
        ("norm1", "norm1.norm"),
        ("norm2", "norm3"),
        ("norm3", "norm2"),
        ("attn1.q_norm", "attn1.norm_q"),
    ):
        found = read.vectors[f"transformer.blocks.2.{path}.weight"]
        assert torch.equal(found, vectors[f"diffusion_model.blocks.2.{original}.w_norm"])
    assert_identical(load_file(save_adapter(read, tmp_path / "ours.safetensors", format="comfyui")), tensors)


def test_halves_of_the_last_modulation_change_places(tmp_path: Path) -> None:
    tensors = theirs({"final_layer.adaLN_modulation.1": (32, 16), "blocks.0.attn1.Wqkv": (48, 16)}, "")
    save_file(tensors, tmp_path / "theirs.safetensors")
    module = load_adapter(tmp_path / "theirs.safetensors").modules["transformer.norm_out.linear"]
    shift, scale = tensors["final_layer.adaLN_modulation.1.lora_B.weight"].chunk(2)
    assert_identical({"up": module.tensors["up"]}, {"up": torch.cat([scale, shift])})


ATTENTION: Shapes = {"blocks.0.attn.qkv": (3456, 1152), "blocks.0.cross_attn.kv_linear": (2304, 1152)}
MARKS: dict[str, tuple[Shapes, str]] = {
    "PixArt by its latents": ({"x_embedder.proj": (1152, 4)}, "pos_embed.proj"),
    "Sana by its latents": ({"x_embedder.proj": (1152, 32)}, "patch_embed.proj"),
    "PixArt by its captions": (
        {"y_embedder.y_proj.fc1": (1152, 4096), "t_block.1": (6912, 1152)},
        "adaln_single.linear",
    ),
    "Sana by its captions": ({"y_embedder.y_proj.fc1": (1152, 2304), "t_block.1": (6912, 1152)}, "time_embed.linear"),
    "PixArt by its feed-forward": (
        {"blocks.0.mlp.fc1": (4608, 1152), "t_block.1": (6912, 1152)},
        "adaln_single.linear",
    ),
}


@pytest.mark.parametrize(("marks", "path"), MARKS.values(), ids=MARKS)
def test_sana_and_pixart_are_told_apart_by_what_they_do_not_share(tmp_path: Path, marks: Shapes, path: str) -> None:
    shapes = ATTENTION | marks
    save_file(theirs(shapes, "diffusion_model."), tmp_path / "theirs.safetensors")
    modules = load_adapter(tmp_path / "theirs.safetensors").modules
    assert f"transformer.{path}" in modules
    assert "transformer.transformer_blocks.0.attn2.to_v" in modules


FEED_FORWARDS: dict[str, tuple[Shapes, str]] = {
    "PixArt": ({"blocks.0.mlp.fc1": (4608, 1152), "blocks.0.mlp.fc2": (1152, 4608)}, "transformer_blocks.0.ff.net.2"),
    "Hunyuan-DiT": ({"blocks.0.mlp.fc1": (6144, 1408), "blocks.0.mlp.fc2": (1408, 6144)}, "blocks.0.ff.net.2"),
}


@pytest.mark.parametrize(("shapes", "path"), FEED_FORWARDS.values(), ids=FEED_FORWARDS)
def test_feed_forwards_alone_are_told_apart_by_their_width(tmp_path: Path, shapes: Shapes, path: str) -> None:
    save_file(theirs(shapes, ""), tmp_path / "theirs.safetensors")
    assert f"transformer.{path}" in load_adapter(tmp_path / "theirs.safetensors").modules
