"""Files as strangers' tools write them, by their keys and shapes: read whole as what they are, or refused by name.

The lists in `strangers/` name their sources; their numbers are random. What else of each kind is tried is
spelt out here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_diffusion.formats import detect_format, examine, load_adapter, save_adapter
from dora_diffusion.formats.family_detection import family_of
from dora_diffusion.formats.fused_layers import split
from dora_diffusion.formats.layouts import Fusion
from dora_diffusion.state import ModuleState
from tests.tolerances import assert_identical

LISTS = {file.stem: json.loads(file.read_text()) for file in sorted((Path(__file__).parent / "strangers").iterdir())}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# list -> (family, its format, layers of diffusers' model)
READ: Mapping[str, tuple[str | None, str, int]] = {
    "flux-xlabs": ("flux", "xlabs", 14),
    "klein9b-lokr": ("flux2-klein", "comfyui", 28),
    "pixart-original": (None, "original", 18),  # alpha's and Sigma's alike
    "qwen-diffsynth": ("qwen-image", "bare", 8),
    "qwen-lightning-bare": ("qwen-image", "bare", 16),
    "sd1-doubled-prefix": (None, "kohya", 3),  # self-attention of SD 1, 2 and XL is alike there
    "z-image-bare": ("z-image", "bare", 8),
    "z-image-out": ("z-image", "comfyui", 8),
}
REFUSED = {
    "chroma-kohya": "a Chroma adapter, by its makers' names",
    "hunyuan-video-musubi": "a HunyuanVideo adapter, by its makers' names",
    "wan-comfyui": "a Wan adapter, by its makers' names",
    "peft-oft": r"PEFT's OFT \(3 tensors\), which is not computed here",
    "sd1-cloneofsimo": r"cloneofsimo's numbered LoRA \(8 tensors\)",
    "sdxl-glora": "GLoRA is made of the base's weight; load it with its base at hand",
    "sdxl-oft": "OFT is made of the base's weight; load it with its base at hand",
}


def numbers(keys: Mapping[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        key: (torch.randn(shape, generator=generator) if shape else torch.tensor(4.0)).to(DTYPES[dtype])
        for key, (dtype, shape) in keys.items()
    }


def written(path: Path, keys: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> Path:
    save_file(numbers(keys), path, dict(metadata or {}))
    return path


def pair(layer: str, out: int, columns: int, halves: tuple[str, str] = ("lora_down", "lora_up")) -> dict[str, Any]:
    return {
        f"{layer}.{halves[0]}.weight": ("fp32", (4, columns)),
        f"{layer}.{halves[1]}.weight": ("fp32", (out, 4)),
    }


def test_every_list_is_tried() -> None:
    assert LISTS.keys() == READ.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", READ)
def test_a_stranger_s_file_is_read_whole(tmp_path: Path, name: str) -> None:
    family, format, layers = READ[name]
    path = written(tmp_path / "theirs.safetensors", LISTS[name]["keys"])
    assert detect_format(path) == format
    read = load_adapter(path)
    assert (family_of(read), len(read.modules), dict(read.extra)) == (family, layers, {})
    again = load_adapter(save_adapter(read, tmp_path / "ours.safetensors", format="lycoris"))
    assert again.modules.keys() == read.modules.keys()
    for layer, module in read.modules.items():
        assert again.modules[layer].scale == module.scale
        assert_identical(dict(again.modules[layer].tensors), dict(module.tensors))


@pytest.mark.parametrize("name", REFUSED)
def test_a_stranger_s_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "theirs.safetensors", LISTS[name]["keys"])
    with pytest.raises(ValueError, match=REFUSED[name]) as refusal:
        load_adapter(path)
    assert "\n" not in str(refusal.value)


def test_xlabs_names_are_flux_s_attention(tmp_path: Path) -> None:
    keys = LISTS["flux-xlabs"]["keys"] | {
        **pair("single_blocks.3.processor.qkv_lora", 9216, 3072, ("down", "up")),
        **pair("single_blocks.3.processor.proj_lora", 3072, 15360, ("down", "up")),
    }
    path = written(tmp_path / "theirs.safetensors", keys)
    tensors, read = load_file(path), load_adapter(path)
    fused = {
        "double_blocks.18.processor.qkv_lora2": [f"transformer_blocks.18.attn.add_{q}_proj" for q in "qkv"],
        "single_blocks.3.processor.qkv_lora": [f"single_transformer_blocks.3.attn.to_{q}" for q in "qkv"],
        "single_blocks.3.processor.proj_lora": ["single_transformer_blocks.3.proj_out"],
        "double_blocks.0.processor.proj_lora1": ["transformer_blocks.0.attn.to_out.0"],
    }
    for name, paths in fused.items():
        down, up = tensors[f"{name}.down.weight"], tensors[f"{name}.up.weight"]
        expected = split(Fusion(name, tuple(paths), (1,) * len(paths)), ModuleState(down, up, down.shape[0]))
        for layer, module in expected.items():
            assert_identical(read.modules[f"transformer.{layer}"].delta(), module.delta())


TO_Q = "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("prefix", "layer"),
    [
        ("lora_unet_unet_", TO_Q),
        ("lora_unet_lora_unet_", TO_Q),
        ("lora_unet_unet_unet_", TO_Q),
        ("lora_te_text_encoder_", "text_model_encoder_layers_0_self_attn_q_proj"),
        ("lora_te1_te1_", "text_model_encoder_layers_0_self_attn_q_proj"),
        ("unet.unet.", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
        ("diffusion_model.diffusion_model.", "double_blocks.0.img_mod.lin"),
        ("transformer.diffusion_model.", "double_blocks.0.img_mod.lin"),
        ("text_encoder.text_encoder.", "text_model.encoder.layers.0.self_attn.q_proj"),
    ],
)
def test_a_prefix_twice_is_debris(tmp_path: Path, prefix: str, layer: str) -> None:
    path = written(tmp_path / "theirs.safetensors", pair(prefix + layer, 8, 8))
    (name,) = load_adapter(path).modules
    assert name.split(".", 1)[1] in (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "encoder.layers.0.self_attn.q_proj",
        "transformer_blocks.0.norm1.linear",
    )
    assert examine(path).debris == (prefix,)


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"unet.a.attn1.to_q.oft_R.weight": ("fp32", (4, 6))}, "PEFT's OFT"),
        ({"lora_unet_x.q_layer.weight": ("fp32", (4, 6)), "lora_unet_x.lambda_layer": ("fp32", (1, 4))}, "T-LoRA"),
        ({"base_model.model.x.vera_lambda_b": ("fp32", (4,)), "base_model.vera_A": ("fp32", (4, 4))}, "VeRA"),
        ({"base_model.model.to_q.hra_u": ("fp32", (4, 4))}, "HRA"),
        ({"base_model.model.to_q.ia3_l": ("fp32", (4, 1))}, r"PEFT's \(IA\)\^3"),
        ({"base_model.model.to_q.boft_R": ("fp32", (1, 4, 4, 4))}, "PEFT's BOFT"),
        ({"base_model.model.to_q.oft_r": ("fp32", (4, 6, 6))}, "PEFT's OFT"),
        ({"lora_unet_mid_block_x.oft_diag": ("fp32", (4, 8, 8))}, "LyCORIS' older OFT"),
        ({"ip_adapter.1.to_k_ip.weight": ("fp32", (4, 4)), "image_proj.proj.weight": ("fp32", (4, 4))}, "IP-Adapter"),
        ({"double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": ("fp32", (4, 4))}, "IP-Adapter"),
        ({"lllite_unet_input_blocks_1_1.down.0.weight": ("fp32", (4, 4))}, "ControlNet-LLLite"),
        ({"lora_controlnet": ("fp32", ()), "input_hint_block.0.weight": ("fp32", (4, 3, 3, 3))}, "Control-LoRA"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, keys: Mapping[str, Any], kind: str) -> None:
    path = written(tmp_path / "theirs.safetensors", keys)
    for read in (load_adapter, examine):
        with pytest.raises(ValueError, match=f"{kind} .*not computed here"):
            read(path)


@pytest.mark.parametrize(
    ("keys", "model"),
    [
        (pair("diffusion_model.blocks.3.ffn.0", 8, 8), "Wan"),
        (pair("lora_unet_blocks_3_cross_attn_k_img", 8, 8), "Wan"),
        (pair("diffusion_model.double_blocks.0.txt_mlp.fc2", 8, 8), "HunyuanVideo"),
        (pair("diffusion_model.double_stream_blocks.0.block.attn1.to_q", 8, 8), "HiDream"),
        (pair("lora_unet_blocks_0_self_attn_output_proj", 8, 8), "Anima or Cosmos"),
        (pair("diffusion_model.patchify_proj", 8, 8), "LTX"),
        (pair("lora_prior_unet_down_blocks_0_1_attention_attn_to_q", 8, 8), "Stable Cascade"),
        (pair("diffusion_model.blocks.0.attn.qkv_x", 8, 8), "Mochi"),
    ],
)
def test_other_models_are_named(tmp_path: Path, keys: Mapping[str, Any], model: str) -> None:
    path = written(tmp_path / "theirs.safetensors", keys)
    with pytest.raises(ValueError, match=f"a {model} adapter, by its makers' names; no {model} is drawn here"):
        load_adapter(path)


def test_a_file_of_which_a_part_can_be_computed_says_so(tmp_path: Path) -> None:
    layer = f"lora_unet_{TO_Q}"
    keys = pair(layer, 8, 8) | {"lora_unet_mid_block_attentions_0_proj_in.q_layer.weight": ("fp32", (4, 8))}
    path = written(tmp_path / "theirs.safetensors", keys)
    with pytest.raises(ValueError, match="1 of its tensors are T-LoRA, which is not computed here, beside layers"):
        load_adapter(path)
    read = load_adapter(path, strict=False)
    assert len(read.modules) == 1 and len(read.extra) == 1


def test_a_file_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "theirs.safetensors", {f"lora_unet_{TO_Q}.alpha": ("fp32", ())})
    with pytest.raises(ValueError, match="none of its 1 tensors changes a layer, such as lora_unet_down"):
        load_adapter(path)


def test_what_names_leave_open_is_asked(tmp_path: Path) -> None:
    path = written(tmp_path / "theirs.safetensors", pair("diffusion_model.time_in.in_layer", 3072, 256))
    with pytest.raises(ValueError, match=r"its 1 layers may be those of flux or .*flux2-klein: say which \(family="):
        load_adapter(path)
    for family, layer in (("flux", "time_text_embed"), ("flux2", "time_guidance_embed")):
        read = load_adapter(path, family=family)
        assert list(read.modules) == [f"transformer.{layer}.timestep_embedder.linear_1"]
        assert family_of(read) == family
    with pytest.raises(ValueError, match="family 'flux3' is unknown: expected one of sd1, "):
        load_adapter(path, family="flux3")


def test_names_of_two_families_whose_layers_are_the_same_are_read_and_leave_the_family_open(tmp_path: Path) -> None:
    keys = pair("diffusion_model.double_blocks.0.img_attn.qkv", 9216, 3072)
    read = load_adapter(written(tmp_path / "theirs.safetensors", keys))
    assert {name.rpartition(".")[2] for name in read.modules} == {"to_q", "to_k", "to_v"}
    assert family_of(read) is None  # FLUX.1, and FLUX.2 Klein of 4B
    keys |= pair("diffusion_model.double_blocks.18.img_attn.proj", 3072, 3072)
    assert family_of(load_adapter(written(tmp_path / "theirs.safetensors", keys))) == "flux"  # Klein has five blocks


@pytest.mark.parametrize(
    ("layer", "shape", "path"),
    [
        ("transformer.txt_in", (3072, 3584), "txt_in"),  # Qwen-Image's own name
        ("transformer.txt_in", (3072, 4096), "context_embedder"),  # FLUX.1's makers' name, as OMI writes it
        ("lora_unet_layers_20_feed_forward_w1", (9216, 2304), "layers.20.feed_forward.linear_1"),  # Lumina's makers'
        ("lora_unet_layers_20_feed_forward_w1", (10240, 3840), "layers.20.feed_forward.w1"),  # Z-Image's own
    ],
)
def test_names_of_one_s_makers_and_another_s_own_are_told_by_sizes(
    tmp_path: Path, layer: str, shape: tuple[int, int], path: str
) -> None:
    read = load_adapter(written(tmp_path / "theirs.safetensors", pair(layer, *shape)))
    assert list(read.modules) == [f"transformer.{path}"]


@pytest.mark.parametrize(("family", "path"), [("lumina2", "linear_1"), ("z-image", "w1")])
def test_the_same_names_are_told_by_people(tmp_path: Path, family: str, path: str) -> None:
    file = written(tmp_path / "theirs.safetensors", pair("transformer.layers.20.feed_forward.w1", 32, 8))
    with pytest.raises(ValueError, match=r"lumina2 or z-image: say which \(family="):
        load_adapter(file)
    assert list(load_adapter(file, family=family).modules) == [f"transformer.layers.20.feed_forward.{path}"]


@pytest.mark.parametrize("prefix", ["diffusion_model.", "", "transformer.", "lora_unet_"])
def test_a_layer_under_two_names_is_refused(tmp_path: Path, prefix: str) -> None:
    """Z-Image's fused `qkv` beside its own parts; of two layers each is read."""

    def named(layer: str) -> str:
        return prefix + (layer.replace(".", "_") if prefix.endswith("_") else layer)

    fused = pair(named("layers.0.attention.qkv"), 11520, 3840) | pair(named("layers.0.attention.out"), 3840, 3840)
    file = written(tmp_path / "theirs.safetensors", fused | pair(named("layers.1.attention.to_q"), 3840, 3840))
    assert {name.partition("attention.")[2] for name in load_adapter(file).modules} == {
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    }
    file = written(tmp_path / "theirs.safetensors", fused | pair(named("layers.0.attention.to_q"), 3840, 3840))
    with pytest.raises(ValueError, match=r"layers.0.attention.to_q: the file holds this layer twice, under two names"):
        load_adapter(file)
