"""What is done with adapters beside drawing, on a model that no family's record knows: Krea 2's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dora_diffusion as dd
from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.cli import main
from dora_diffusion.conversion import Extraction
from tests.parity.test_lora_pipelines import pipeline, predict
from tests.pipelines.adapters import trained
from tests.tolerances import assert_identical, assert_near


@pytest.fixture
def base() -> tuple[Any, dict[str, nn.Module]]:
    return pipeline("Krea2Pipeline")


def drawn_with(base: tuple[Any, dict[str, nn.Module]], adapter: dd.AdapterState, strength: float = 1.0) -> torch.Tensor:
    manager = AdapterManager(base[0])
    manager.load_adapter(adapter, name="a")
    manager.set_adapters({"a": strength})
    drawn = predict(base[1])
    manager.unload()
    return drawn


@pytest.mark.parametrize("preset", ["attention", "all-linear", "all"])
def test_a_tuned_model_s_difference_is_taken_out(base, preset: str) -> None:
    tuned, models = pipeline("Krea2Pipeline")
    adapter = trained(tuned, use_dora=False)
    manager = AdapterManager(tuned)
    manager.load_adapter(adapter, name="a")
    manager.set_adapters({"a": 1.0})
    manager.fuse()
    found = dd.extract(tuned_weights(models), base[0], rank=2, options=Extraction(preset, use_dora=False))
    assert set(adapter.modules) <= set(found.modules)
    assert_near(drawn_with(base, found), predict(models), 1e-4)


def tuned_weights(models: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """A model's weights as a mapping: a pipeline with fused adapters is no base."""
    return {f"{part}.{name}": t.detach() for part, model in models.items() for name, t in model.named_parameters()}


def test_adapters_are_resized_blended_and_written(base, tmp_path: Path) -> None:
    first, second = trained(base[0], 1), trained(base[0], 2, use_dora=False)
    mix = dd.blend({"a": first, "b": second}, {"a": 0.7, "b": 0.4}, base=base[0], mode="additive")
    manager = AdapterManager(base[0])
    for name, adapter in (("a", first), ("b", second)):
        manager.load_adapter(adapter, name=name)
    manager.set_adapters({"a": 0.7, "b": 0.4})
    both = predict(base[1])
    manager.unload()
    assert_near(drawn_with(base, mix), both, 1e-4)
    small = dd.resize(first, rank=1, base=base[0])
    assert small.ranks == (1,)
    for format in ("diffusers", "peft"):
        file = dd.save_adapter(
            first, tmp_path / f"a-{format}{'' if format == 'peft' else '.safetensors'}", format=format
        )
        assert_near(drawn_with(base, dd.load_adapter(file)), drawn_with(base, first), 1e-5)


def test_a_file_is_inspected(base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = dd.save_adapter(trained(base[0]), tmp_path / "a.safetensors")
    for part, model in base[1].items():
        model.save_pretrained(tmp_path / "base" / part)
    assert main(["inspect", str(file), "--model", str(tmp_path / "base")]) == 0
    told = capsys.readouterr().out
    assert "transformer" in told and "Traceback" not in told


def test_a_base_on_disk_is_baked(base, tmp_path: Path) -> None:
    adapter = trained(base[0])
    for part, model in base[1].items():
        model.save_pretrained(tmp_path / "base" / part)
    dd.bake(tmp_path / "base", {"a": adapter}, {"a": 1.0}, tmp_path / "baked")
    loaded = type(base[1]["transformer"]).from_pretrained(tmp_path / "baked" / "transformer")
    assert_near(predict({"transformer": loaded.eval()}), drawn_with(base, adapter), 1e-4)
    assert_identical(predict(base[1]), predict(pipeline("Krea2Pipeline")[1]))


def test_training_and_our_own_drawing_say_in_one_line_what_works(base) -> None:
    with pytest.raises(ValueError, match=r"Krea2Pipeline belongs to no family .* AdapterManager\(pipe\)") as refused:
        dd.generate(base[0], dd.GenerationSettings("a cat"))
    assert "\n" not in str(refused.value)
