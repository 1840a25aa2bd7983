"""Adapters of the published models' structure, narrow: every format that can name them writes names that come back."""

from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.full_size.models import pipeline_of
from benchmarks.full_size.published import PUBLISHED
from dora_diffusion.families import family_of_pipeline
from dora_diffusion.formats import FORMATS, detect_format, examine, load_adapter, save_adapter
from dora_diffusion.formats.family_detection import family_of
from dora_diffusion.state import AdapterState
from tests.formats.adapters import KINDS, adapter_of, dense, layers_of
from tests.tolerances import assert_close

NARROWER = 64
MODELS = (
    "SD 1.5",
    "SD 2.1",
    "SDXL base",
    "SD 3 medium",
    "FLUX.1 schnell",
    "AuraFlow 0.3",
    "Lumina-Image 2.0",
    "Z-Image",
    "PixArt-alpha 1024",
    "Hunyuan-DiT 1.1",
)
# Who has no name for what: the denoiser alone; texts that ComfyUI's names are not known of; plain LoRA.
WITHOUT_TEXTS = ("original",)
COMFYS = ("SD 1.5", "SD 2.1", "SDXL base", "SD 3 medium", "FLUX.1 schnell")
# A key that other tools' code or files show, for each format.
SEEN = {
    ("kohya", "SD 1.5"): "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
    ("kohya", "SDXL base"): "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
    ("kohya", "SD 3 medium"): "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight",
    ("kohya", "FLUX.1 schnell"): "lora_unet_single_blocks_0_linear1.lora_up.weight",
    ("comfyui", "FLUX.1 schnell"): "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
    ("comfyui", "SDXL base"): "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.lora_B.weight",
    ("lycoris", "FLUX.1 schnell"): "lycoris_transformer_blocks_0_attn_to_q.lora_down.weight",
    ("omi", "FLUX.1 schnell"): "transformer.double_blocks.0.img_attn.qkv.1.lora_down.weight",
    ("original", "FLUX.1 schnell"): "single_blocks.37.linear2.lora_A.weight",
    ("onetrainer-legacy", "FLUX.1 schnell"): "lora_transformer_single_transformer_blocks_0_attn_to_q.lora_up.weight",
    ("old-diffusers", "SD 1.5"): "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight",
    ("ai-toolkit", "FLUX.1 schnell"): "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    ("comfyui", "PixArt-alpha 1024"): "diffusion_model.blocks.27.cross_attn.kv_linear.lora_B.weight",
    ("comfyui", "Hunyuan-DiT 1.1"): "diffusion_model.blocks.39.attn1.Wqkv.lora_B.weight",
    ("diffusers", "SD 3 medium"): "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
}


@cache
def layers(name: str, *, texts: bool) -> dict[str, Tensor]:
    """Path -> a small random weight of the layer's proportions, for each layer that `all` adapts and the encoders'."""
    pipe = pipeline_of(next(model for model in PUBLISHED if model.name == name))
    family = family_of_pipeline(pipe)
    parts = family.components if texts else (family.denoiser,)
    found = {}
    for path, weight in layers_of(pipe, [part.name for part in parts if getattr(pipe, part.name, None) is not None]):
        out, inputs, *kernel = weight.shape
        found[path] = torch.ones(max(1, out // NARROWER), max(1, inputs // NARROWER), *kernel)
    generator = torch.Generator().manual_seed(0)
    return {path: torch.randn(weight.shape, generator=generator) for path, weight in found.items()}


def formats_of(name: str) -> list[tuple[str, bool, str]]:
    """(format, with text encoders, kind of adapter)."""
    found = []
    for format in FORMATS:
        if format in ("original", "comfyui", "omi") and name not in COMFYS:
            texts = False
        else:
            texts = format not in WITHOUT_TEXTS
        if format == "old-diffusers" and name in ("SD 3 medium", "FLUX.1 schnell"):
            continue  # nobody reads a transformer's so
        if format != "peft" and (name in COMFYS or format in ("kohya", "comfyui")):
            found.append((format, texts, "LoRA" if format == "old-diffusers" else "DoRA"))
    return found


def detected(format: str, name: str) -> str:
    """OneTrainer's older files of UNets cannot be told from kohya's: only the denoiser's names differ, for SDXL."""
    return "kohya" if format == "onetrainer-legacy" and name in ("SD 1.5", "SD 2.1", "SDXL base") else format


CASES = [(name, *case) for name in MODELS for case in formats_of(name)]


@pytest.mark.parametrize(("name", "format", "texts", "kind"), CASES)
def test_names_come_back_and_a_file_read_and_written_is_the_same_file(
    tmp_path, name: str, format: str, texts: bool, kind: str
) -> None:
    weights = layers(name, texts=texts)
    original = adapter_of(weights.items(), KINDS[kind])
    path = save_adapter(original, tmp_path / "a.safetensors", format=format)
    tensors = load_file(path)
    if (format, name) in SEEN:
        assert SEEN[format, name] in tensors
    assert detect_format(path) == detected(format, name)
    assert not examine(path).unknown
    read = load_adapter(path)
    assert read.modules.keys() == original.modules.keys()
    for layer in list(weights)[::7]:
        assert_close(dense(weights[layer], read.modules[layer]), dense(weights[layer], original.modules[layer]))
    again = load_file(save_adapter(read, tmp_path / "b.safetensors", format=format))
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("name", MODELS)
def test_the_family_is_told(name: str) -> None:
    weights = layers(name, texts=False)
    expected = next(model for model in PUBLISHED if model.name == name).family
    assert family_of(adapter_of(weights.items(), KINDS["LoRA"])) == expected


def test_from_format_to_format_all_around_nothing_is_lost(tmp_path) -> None:
    weights = layers("SDXL base", texts=True)
    original = adapter_of([*weights.items()][:400], KINDS["DoRA"])
    adapter: AdapterState = original
    for format in (
        "kohya",
        "comfyui",
        "lycoris",
        "omi",
        "onetrainer-legacy",
        "diffusers",
        "ai-toolkit",
        "peft",
        "kohya",
    ):
        target = tmp_path / (format if format == "peft" else f"{format}.safetensors")
        adapter = load_adapter(save_adapter(adapter, target, format=format))
        assert adapter.origin == detected(format, "SDXL base")
    assert adapter.modules.keys() == original.modules.keys()
    for layer, module in original.modules.items():
        assert_close(dense(weights[layer], adapter.modules[layer]), dense(weights[layer], module))
