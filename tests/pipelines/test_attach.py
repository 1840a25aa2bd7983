"""diffusers' verbs on one pipeline: as diffusers does with a LoRA, and for a DoRA as we draw it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dora_diffusion as dd
from tests.families.pipelines import PIPELINES
from tests.pipelines.adapters import trained
from tests.pipelines.test_habits import ROUNDED, draw
from tests.tolerances import assert_identical, assert_near


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, pipe = tmp_path_factory.mktemp("adapters"), PIPELINES["sd1"].build()
    return {
        name: str(dd.save_adapter(trained(pipe, seed, use_dora=False), folder / f"{name}.safetensors"))
        for seed, name in enumerate("ab")
    }


def _walk(pipe: Any, files: dict[str, str]) -> list[tuple[str, Any, torch.Tensor]]:
    """What code that is written for diffusers does, and what it draws and is told after each step."""
    steps = {
        "load": lambda: pipe.load_lora_weights(files["a"], adapter_name="a"),
        "load another": lambda: pipe.load_lora_weights(files["b"], adapter_name="b"),
        "both": lambda: pipe.set_adapters(["a", "b"], adapter_weights=[0.7, -0.4]),
        "one weight for all": lambda: pipe.set_adapters(["a", "b"], 0.5),
        "one": lambda: pipe.set_adapters("a"),
        "by part": lambda: pipe.set_adapters("a", [{"unet": 0.3, "text_encoder": 1.0}]),
        "disable": lambda: pipe.disable_lora(),
        "enable": lambda: pipe.enable_lora(),
        "fuse": lambda: pipe.fuse_lora(lora_scale=1.0),
        "unfuse": lambda: pipe.unfuse_lora(),
        "delete": lambda: pipe.delete_adapters("b"),
        "unload": lambda: pipe.unload_lora_weights(),
        "tensors": lambda: pipe.load_lora_weights(load_file(files["b"])),
    }
    seen = []
    for name, step in steps.items():
        step()
        seen.append((name, (pipe.get_active_adapters(), pipe.get_list_adapters()), draw(pipe)))
    return seen


@pytest.mark.filterwarnings("ignore:Already found a .peft_config:UserWarning")
def test_the_verbs_do_what_diffusers_do(files) -> None:
    theirs, ours = PIPELINES["sd1"].build(), PIPELINES["sd1"].build()
    manager = dd.attach(ours)
    assert dd.attach(ours) is manager
    for (name, expected, drawn), (_, told, got) in zip(_walk(theirs, files), _walk(ours, files), strict=True):
        assert told == expected, name
        assert_near(got, drawn, ROUNDED)


def test_other_pipelines_and_classes_stay_as_they_are(files) -> None:
    pipe, other = PIPELINES["sd1"].build(), PIPELINES["sd1"].build()
    before = draw(pipe)
    dd.attach(pipe)
    pipe.load_lora_weights(files["a"])
    assert pipe.get_active_adapters() == ["default_0"]
    assert "load_lora_weights" not in vars(other) and "load_lora_weights" not in vars(type(pipe))
    dd.detach(pipe)
    dd.detach(pipe)
    assert not [name for name in vars(pipe) if "lora" in name or "adapters" in name]
    assert_identical(draw(pipe), before)


def test_mistakes_are_one_line(files) -> None:
    pipe = PIPELINES["sd1"].build()
    dd.attach(pipe)
    for call, line in (
        (lambda: pipe.load_lora_weights("nowhere.safetensors"), "nowhere.safetensors"),
        (lambda: pipe.set_adapters(["a"]), "no adapter named 'a' is loaded"),
        (lambda: pipe.set_adapters(["a", "b"], [1.0]), "2 adapters and 1 weights; expected one each"),
        (lambda: pipe.fuse_lora(["unet"]), "all components are fused"),
    ):
        with pytest.raises(ValueError, match=line) as refused:
            call()
        assert "\n" not in str(refused.value)


def test_strengths_survive_fusing_disabling_and_deleting(files) -> None:
    pipe = PIPELINES["sd1"].build()
    manager = dd.attach(pipe)
    pipe.load_lora_weights(files["a"], adapter_name="a")
    pipe.load_lora_weights(files["b"], adapter_name="b")
    pipe.set_adapters(["a", "b"])
    for _ in range(2):
        pipe.fuse_lora(lora_scale=0.5, safe_fusing=True)
        assert manager.weights == {"a": 0.5, "b": 0.5}
        with pytest.raises(ValueError, match="call unfuse"):
            pipe.disable_lora()
        pipe.unfuse_lora()
        assert manager.weights == {"a": 1.0, "b": 1.0}
    pipe.disable_lora()
    assert not manager.active
    pipe.delete_adapters("a")
    pipe.enable_lora()
    assert manager.weights == {"b": 1.0}
    manager.set_adapters({"b": 0.5}, blend="compose")
    pipe.disable_lora()
    pipe.enable_lora()
    assert (manager.weights, manager.blend) == ({"b": 0.5}, "compose")
    with pytest.raises(ValueError, match="no adapter named 'nobody' is loaded"):
        pipe.fuse_lora(adapter_names=["nobody"])
    assert (manager.weights, manager.blend) == ({"b": 0.5}, "compose")


def test_a_file_in_a_subfolder(files, tmp_path) -> None:
    folder = tmp_path / "hub" / "loras"
    folder.mkdir(parents=True)
    (folder / "a.safetensors").write_bytes(Path(files["a"]).read_bytes())
    pipe = PIPELINES["sd1"].build()
    dd.attach(pipe)
    pipe.load_lora_weights(tmp_path / "hub", subfolder="loras", weight_name="a.safetensors", adapter_name="a")
    assert pipe.get_active_adapters() == ["a"]
