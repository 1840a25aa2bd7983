"""Adapters under their makers' names, for models that no family's record knows: as diffusers' own converter reads them.

A LoRA draws what it draws in diffusers; a DoRA, whose magnitudes diffusers' converters drop, has each layer's rows.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dora_diffusion.adapters.diffusers_names import locate_with
from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.formats import save_adapter
from tests.formats.adapters import place
from tests.parity.test_lora_pipelines import pipeline, predict
from tests.pipelines.adapters import trained
from tests.tolerances import assert_identical, assert_near

# Name in the file, # for a block's number -> diffusers' layers in the order of its rows.
Names = Mapping[str, tuple[str, ...]]


def _attention(original: str, path: str, **names: str) -> dict[str, tuple[str, ...]]:
    return {f"{original}.{name}": (f"{path}.{layer}",) for name, layer in names.items()}


_QKV = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0"}

KREA_2: Names = {
    **_attention("blocks.#.attn", "transformer_blocks.#.attn", wq="to_q", wk="to_k", wv="to_v", wo="to_out.0"),
    **_attention("blocks.#.attn", "transformer_blocks.#.attn", gate="to_gate"),
    **_attention("blocks.#.mlp", "transformer_blocks.#.ff", gate="gate", up="up", down="down"),
    **{"first": ("img_in",), "last.linear": ("final_layer.linear",), "txtmlp.1": ("txt_in.linear_1",)},
    **{"txtfusion.refiner_blocks.#.attn.wq": ("text_fusion.refiner_blocks.#.attn.to_q",)},
}
IDEOGRAM_4: Names = {
    "layers.#.attention.qkv": tuple(f"layers.#.attention.to_{part}" for part in "qkv"),
    "layers.#.attention.o": ("layers.#.attention.to_out.0",),
    **{f"layers.#.feed_forward.w{n}": (f"layers.#.feed_forward.w{n}",) for n in (1, 2, 3)},
    "layers.#.adaln_modulation": ("layers.#.adaln_modulation",),
}
FLUX_3: Names = {
    **_attention("content_mode_blocks.image.#", "mode_blocks.image.#.attn", q_proj="to_q", k_proj="to_k"),
    **_attention("content_mode_blocks.image.#", "mode_blocks.image.#.attn", v_proj="to_v", attn_out="to_out.0"),
    **_attention("single_blocks.#", "single_transformer_blocks.#.ff", mlp_in="linear_in", mlp_out="linear_out"),
}
ANIMA: Names = {
    **_attention("blocks.#.self_attn", "transformer_blocks.#.attn1", **_PROJECTIONS),
    **_attention("blocks.#.cross_attn", "transformer_blocks.#.attn2", **_PROJECTIONS),
    **_attention("blocks.#.mlp", "transformer_blocks.#.ff.net", layer1="0.proj", layer2="2"),
    **_attention("llm_adapter.blocks.#.self_attn", "text_conditioner.blocks.#.self_attn", q_proj="q_proj"),
}
WAN: Names = {
    **_attention("blocks.#.self_attn", "blocks.#.attn1", **_QKV),
    **_attention("blocks.#.cross_attn", "blocks.#.attn2", **_QKV),
    **_attention("blocks.#.ffn", "blocks.#.ffn.net", **{"0": "0.proj", "2": "2"}),
}
HUNYUAN_VIDEO: Names = {
    "double_blocks.#.img_attn_qkv": tuple(f"transformer_blocks.#.attn.to_{part}" for part in "qkv"),
    "double_blocks.#.txt_attn_qkv": tuple(f"transformer_blocks.#.attn.add_{part}_proj" for part in "qkv"),
    "double_blocks.#.img_mlp.fc1": ("transformer_blocks.#.ff.net.0.proj",),
    "double_blocks.#.img_mod.linear": ("transformer_blocks.#.norm1.linear",),
    "single_blocks.#.linear2": ("single_transformer_blocks.#.proj_out",),
}
HIDREAM: Names = {
    f"double_stream_blocks.#.block.attn1.to_{part}": (f"double_stream_blocks.#.block.attn1.to_{part}",)
    for part in ("q", "k", "v", "q_t", "k_t", "out")
}
LTX: Names = {f"transformer_blocks.#.attn1.to_{part}": (f"transformer_blocks.#.attn1.to_{part}",) for part in "qkv"}

# Case -> (pipeline, prefix in the file, names, how tools spell A and B).
AB, DOWN_UP = ("lora_A", "lora_B"), ("lora_down", "lora_up")
CASES: dict[str, tuple[str, str, Names, tuple[str, str]]] = {
    "Krea 2": ("Krea2Pipeline", "diffusion_model.", KREA_2, AB),
    "Krea 2, ai-toolkit": ("Krea2Pipeline", "base_model.model.", KREA_2, AB),
    "Krea 2, modular": ("Krea2ModularPipeline", "diffusion_model.", KREA_2, AB),
    "Ideogram 4": ("Ideogram4Pipeline", "diffusion_model.", IDEOGRAM_4, AB),
    "Ideogram 4, kohya's suffixes": ("Ideogram4Pipeline", "diffusion_model.", IDEOGRAM_4, DOWN_UP),
    "FLUX.3, modular": ("Flux3ModularPipeline", "diffusion_model.", FLUX_3, AB),
    "Anima, modular": ("AnimaModularPipeline", "diffusion_model.", ANIMA, AB),
    "Wan": ("WanPipeline", "diffusion_model.", WAN, AB),
    "Wan, kohya's suffixes": ("WanPipeline", "diffusion_model.", WAN, DOWN_UP),
    "Wan, flat": ("WanPipeline", "lora_unet_", WAN, DOWN_UP),
    "HunyuanVideo": ("HunyuanVideoPipeline", "transformer.", HUNYUAN_VIDEO, AB),
    "HiDream": ("HiDreamImagePipeline", "diffusion_model.", HIDREAM, AB),
    "LTX-Video": ("LTXPipeline", "diffusion_model.", LTX, AB),
}


def _layers(names: Names, models: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """Name in the file -> full paths, for every block there is."""
    found: dict[str, tuple[str, ...]] = {}
    for original, targets in names.items():
        for number in range(8) if "#" in original else [0]:
            paths = tuple(_full(path.replace("#", str(number)), models) for path in targets)
            if all(_layer(path, models) is not None for path in paths):
                found[original.replace("#", str(number))] = paths
    return found


def _full(path: str, models: Mapping[str, nn.Module]) -> str:
    return path if path.partition(".")[0] in models else f"transformer.{path}"


def _layer(path: str, models: Mapping[str, nn.Module]) -> Any:
    part, _, inner = path.partition(".")
    try:
        return models[part].get_submodule(inner)
    except AttributeError:
        return None


def _file(case: str, models: Mapping[str, nn.Module], *, use_dora: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a file, and the magnitudes of diffusers' layers."""
    _, prefix, names, (a, b) = CASES[case]
    generator, tensors, magnitudes = torch.Generator().manual_seed(1), {}, {}
    for original, paths in _layers(names, models).items():
        weight = torch.cat([_layer(path, models).weight for path in paths])
        name = prefix + (original.replace(".", "_") if prefix == "lora_unet_" else original)
        tensors[f"{name}.{a}.weight"] = torch.randn(2, weight.shape[1], generator=generator)
        tensors[f"{name}.{b}.weight"] = torch.randn(weight.shape[0], 2, generator=generator) / 4
        if b == "lora_up":
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
        if use_dora:
            scale = weight.norm(dim=1, keepdim=True) * (1 + torch.rand(len(weight), 1, generator=generator))
            tensors[f"{name}.dora_scale"] = scale
            sizes = [len(_layer(path, models).weight) for path in paths]
            magnitudes.update(zip(paths, scale.split(sizes), strict=True))
    return tensors, magnitudes


def _by_diffusers(kind: Any, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Full path -> (A, B), the scale in them, as diffusers' converter has it."""
    converted = kind.lora_state_dict({key: t.clone() for key, t in tensors.items() if "dora_scale" not in key})
    ends = (".lora_A.weight", ".lora_B.weight")
    paths = dict.fromkeys(re.sub(r"\.lora_[AB]\.weight$", "", key) for key in converted)
    return {path: (converted[path + ends[0]], converted[path + ends[1]]) for path in paths}


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("case", CASES)
def test_names_are_read_as_diffusers_reads_them(case: str, use_dora: bool, tmp_path: Path) -> None:
    pipe, models = pipeline(CASES[case][0])
    before = predict(models)
    tensors, magnitudes = _file(case, models, use_dora=use_dora)
    assert tensors
    save_file(tensors, tmp_path / "adapter.safetensors")
    manager = AdapterManager(pipe)
    report = manager.load_adapter(tmp_path / "adapter.safetensors", name="a")
    assert report.extra == 0
    manager.set_adapters({"a": 1.0})
    ours = predict(models)
    manager.unload()
    assert_identical(predict(models), before)
    pairs = _by_diffusers(type(pipe), tensors)
    assert set(pairs) == set(path for paths in _layers(CASES[case][2], models).values() for path in paths)
    with torch.no_grad():
        for path, (down, up) in pairs.items():
            layer = _layer(path, models)
            changed = layer.weight + up @ down
            if use_dora:
                changed = magnitudes[path] * changed / changed.norm(dim=1, keepdim=True)
            layer.weight.copy_(changed)
    assert_near(ours, predict(models), 1e-5)


def test_rows_are_shared_as_the_converter_shares_them() -> None:
    """HunyuanVideo's knows the published model's width alone, and no tiny one."""
    pipe, _ = pipeline("HunyuanVideoPipeline")
    find = locate_with(pipe)
    assert find is not None
    name = "transformer.single_blocks.3.linear1"
    known = {"transformer.double_blocks.0.img_attn_qkv": (3 * 3072, 3072)}  # by which the converter knows the file
    place = find({**known, name: (3 * 3072 + 12288, 3072)})[name]
    assert place.component == "transformer"
    assert place.fusion.shares == (3072, 3072, 3072, 12288)
    assert [path.rpartition(".")[2] for path in place.fusion.paths] == ["to_q", "to_k", "to_v", "proj_mlp"]


def test_a_second_denoiser_s_layers_are_read_and_written(tmp_path: Path) -> None:
    pipe, models = pipeline("WanPipeline")
    assert set(models) == {"transformer", "transformer_2"}
    adapter = trained(pipe)
    for format in ("diffusers", "peft"):
        manager = AdapterManager(pipe)
        file = save_adapter(adapter, place(tmp_path, format), format=format)
        report = manager.load_adapter(file, name="a")
        assert report.components == ("transformer", "transformer_2")
        assert report.matched == len(adapter.modules)
        manager.unload()
    for format in ("kohya", "ai-toolkit"):  # nobody reads this model's layers so
        with pytest.raises(ValueError, match="transformer_2"):
            save_adapter(adapter, tmp_path / f"{format}.safetensors", format=format)


def test_a_model_by_itself_finds_its_loader(tmp_path: Path) -> None:
    _, models = pipeline("Krea2Pipeline")
    tensors, _ = _file("Krea 2", models, use_dora=False)
    save_file(tensors, tmp_path / "adapter.safetensors")
    report = AdapterManager(models["transformer"]).load_adapter(tmp_path / "adapter.safetensors", name="a")
    assert report.matched == len(tensors) // 2


def test_what_nobody_can_read_is_refused_as_before(tmp_path: Path) -> None:
    pipe, _ = pipeline("Krea2Pipeline")
    lost = {f"diffusion_model.blocks.0.attn.wx.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    save_file(lost, tmp_path / "lost.safetensors")
    with pytest.raises(ValueError, match="lost.safetensors: .*wx is not in this pipeline") as refused:
        AdapterManager(pipe).load_adapter(tmp_path / "lost.safetensors", name="a")
    assert "\n" not in str(refused.value)
