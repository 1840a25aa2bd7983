"""Manners in a notebook: what holds tensors, or thousands of names, says what it is on one short line."""

import torch

import dora_diffusion as dd
from dora_diffusion.blending import blend_with_report, interference
from dora_diffusion.conversion.reports import Report
from dora_diffusion.state import FactoredState, rank_in_words
from tests.pocket_random import random_adapter, random_pocket_pipeline


def test_an_adapter_is_one_line() -> None:
    adapter = random_adapter(random_pocket_pipeline())
    parameters = sum(t.numel() for module in adapter.modules.values() for t in module.tensors.values()) / 1e6
    layers, rank = len(adapter.modules), adapter.ranks[0]
    told = dd.AdapterState(adapter.modules, {"dora_diffusion.family": "sd1"})
    assert repr(told) == f"AdapterState({layers} DoRA layers, rank {rank}, {parameters:.1f} M parameters, family sd1)"
    untold = dd.AdapterState(adapter.modules, {}, {"unet.norm.bias": torch.ones(3)})
    assert "1 vectors" in repr(untold) and repr(untold).endswith("unet and text_encoder)")
    assert repr(dd.AdapterState({})) == "AdapterState(0.0 M parameters)"


def test_layers_are_one_line_each() -> None:
    down, up = torch.ones(2, 5), torch.ones(3, 2, dtype=torch.float16)
    assert repr(dd.ModuleState(down, up, 1)) == "ModuleState(LoRA, rank 2, 3 x 5, scale 0.5, float16, float32)"
    dora = dd.ModuleState(down, up.float(), 1, torch.ones(3))
    assert repr(dora) == "ModuleState(DoRA, rank 2, 3 x 5, scale 0.5, axis out, float32)"
    whole = FactoredState("full", {"diff": torch.ones(3, 5)})
    assert repr(whole) == "FactoredState(whole difference, rank 3, 3 x 5, scale 1, float32)"
    assert [rank_in_words(ranks) for ranks in ((), (4,), (16, 4, 8))] == ["", "rank 4", "ranks 4 to 16"]


def test_what_changes_a_pipeline_says_how_much() -> None:
    pipe = random_pocket_pipeline()
    manager = dd.AdapterManager(pipe)
    assert repr(manager) == "AdapterManager(sd1: no adapters)"
    adapter = random_adapter(pipe)
    report = manager.load_adapter(adapter, name="ink")
    layers, rank = len(adapter.modules), adapter.ranks[0]
    assert repr(report) == f"LoadReport(ink: DoRA, rank {rank}, {layers} of {layers} layers)"
    assert repr(manager) == "AdapterManager(sd1: ink 0.0)"
    manager.load_adapter(adapter, name="lego")
    manager.set_adapters({"ink": 0.8, "lego": {"unet": 0.5}})
    assert repr(manager) == "AdapterManager(sd1: ink 0.8, lego {'unet': 0.5})"
    manager.fuse()
    assert repr(manager) == "AdapterManager(sd1: ink 0.8, lego {'unet': 0.5}; fused)"
    manager.unfuse()
    manager.set_adapters({"ink": 0.8}, blend="comfyui")
    assert repr(manager) == "AdapterManager(sd1: ink 0.8, lego 0.0; comfyui)"
    manager.unload()
    injection = dd.inject(pipe.unet, dd.DoRAConfig(rank=4))
    assert repr(injection) == f"Injection(UNet2DConditionModel, {len(injection.matched)} layers, rank 4)"
    injection.eject()
    assert repr(injection) == "Injection(UNet2DConditionModel, 0 layers)"


def test_new_words_and_reports_are_one_line(tmp_path) -> None:
    pipe = random_pocket_pipeline()
    words = dd.add_words(pipe, {"<zqx>": "robot"})
    width = words.parameters()[0].shape[1]
    assert repr(words) == "Words(<zqx>; read by text_encoder)"
    assert repr(words.state()) == f"[WordState('<zqx>', vectors 1 x {width})]"
    words.remove()
    assert repr(words) == "Words(<zqx>; read by no encoder any more)"
    one, other = random_adapter(pipe), random_adapter(pipe, 1)
    blended = blend_with_report({"a": one, "b": other}, {"a": 1, "b": 1}, base=pipe)
    assert repr(blended) == f"Blended(adapter={blended.adapter!r}, report=BlendReport({blended.report.sentence()}))"
    assert repr(interference({"a": one, "b": other}, base=pipe)).startswith("Interference(2 adapters; a ~ b ")
    assert repr(Report({"x": 0.1}, {"x": 4})).startswith("Report(1 layers, ")
    path = dd.save_adapter(one, tmp_path / "ink.safetensors")
    found = dd.examine(path)
    assert (
        repr(found)
        == f"Examined(diffusers, {len(one.modules)} layers, {found.matched} of {found.matched} keys understood)"
    )
