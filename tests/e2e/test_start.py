"""Runs that start from an adapter, and runs on top of adapters: resumed bit for bit, and what they say of it."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from dora_diffusion.formats import load_adapter, save_adapter
from dora_diffusion.pretrain.scenes import background
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run.dry_run import describe_plan
from dora_diffusion.training.run.train import train
from dora_diffusion.utils.atomic import sha256_of
from tests.pocket_random import random_adapter, random_pocket_pipeline
from tests.tolerances import assert_identical


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "pocket-turbo"
    random_pocket_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def config(base, tmp_path):
    """Output's name, sections -> a config of two steps that starts from `start.safetensors`."""
    images = tmp_path / "images"
    images.mkdir()
    background("red", 64).save(images / "red.png")
    save_adapter(random_adapter(random_pocket_pipeline()), tmp_path / "start.safetensors")
    save_adapter(random_adapter(random_pocket_pipeline(), 5), tmp_path / "undo.safetensors")
    save_adapter(random_adapter(random_pocket_pipeline(), 6), tmp_path / "other.safetensors")

    def made(name: str, **sections) -> TrainConfig:
        settings = {
            "model": str(base),
            "output_dir": str(tmp_path / name),
            "data": {"instance_dir": str(images), "instance_prompt": "a zqx cat", "resolution": 32},
            "adapter": {
                "rank": 4,
                "alpha": 4,
                "train_text_encoder": True,
                "start": str(tmp_path / "start.safetensors"),
            },
            "optim": {"steps": 2, "learning_rate": 1e-3},
            "validation": {"every": 0, "repeats": 1},
            "checkpoint": {"every": 1, "keep": 5},
        }
        return TrainConfig.model_validate(settings | sections)

    return made


def test_a_resumed_run_does_not_read_its_start_again(config, tmp_path, capsys) -> None:
    whole = train(config("whole"))
    assert capsys.readouterr().out.count("start      start.safetensors: DoRA, ") == 1
    stopped = config("stopped")
    train(stopped)
    (tmp_path / "stopped" / "checkpoints" / "step-00000002" / "parameters.safetensors").write_bytes(b"cut short")
    (tmp_path / "start.safetensors").unlink()
    capsys.readouterr()
    resumed = train(stopped, resume="latest")
    assert resumed.adapter.read_bytes() == whole.adapter.read_bytes()
    assert "start      " not in capsys.readouterr().out


def test_a_run_without_a_rate_gives_its_start_back(config, tmp_path) -> None:
    still = {"steps": 1, "learning_rate": 1e-30, "weight_decay": 0.0}
    tensors = load_file(train(config("still", optim=still)).adapter)
    assert_identical(tensors, load_file(tmp_path / "start.safetensors"))


def test_a_run_on_top_of_an_adapter_says_so_and_resumes_on_nothing_else(config, tmp_path, capsys) -> None:
    undo = tmp_path / "undo.safetensors"
    sections = {"base": {"adapters": {str(undo): 0.5}}, "adapter": {"rank": 2}}
    result = train(config("run", **sections))
    out = capsys.readouterr().out
    assert "below      undo.safetensors at 0.5: DoRA" in out and "warning" not in out
    expected = [{"name": "undo.safetensors", "strength": 0.5, "sha256": sha256_of(undo)}]
    with safe_open(result.adapter, "pt") as file:
        assert json.loads(file.metadata()["dora_diffusion.trained_on_top_of"]) == expected
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"- `undo.safetensors` at 0.5, SHA-256 `{sha256_of(undo)}`" in card
    assert " BASE --adapter undo.safetensors:0.5" in card
    alone = train(config("alone", adapter={"rank": 2}))
    assert load_file(result.adapter).keys() == load_file(alone.adapter).keys()
    assert result.validation[0] != alone.validation[0]  # already before the first step it is another base
    stronger = config("run", **sections | {"base": {"adapters": {str(undo): 1.0}}})
    with pytest.raises(ValueError, match=r"cannot resume, base.adapters.undo.safetensors was \[0.5, .* is now \[1.0, "):
        train(stronger, resume="latest")
    undo.write_bytes((tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"cannot resume, base.adapters.undo.safetensors was "):
        train(config("run", **sections), resume="latest")


def test_the_plan_tells_of_the_start_of_what_lies_below_and_of_a_distilled_base(config, tmp_path) -> None:
    lines = describe_plan(config("run")).splitlines()
    assert lines[1].startswith("warning    the base is a distilled model (by its name")
    count = len(load_adapter(tmp_path / "start.safetensors").modules)
    assert lines[2] == f"start      start.safetensors: DoRA, {count} layers; rank 4"
    below = {"adapters": {str(tmp_path / "undo.safetensors"): 1.0}}
    lines = describe_plan(config("run", base=below)).splitlines()
    assert lines[1] == f"below      undo.safetensors at 1: DoRA, {count} layers"


def test_files_of_a_config_lie_beside_it(config, tmp_path) -> None:
    text = config("run").to_yaml().replace(f"start: {tmp_path}/", "start: ")
    text = text.replace("adapters: {}", "adapters: {undo.safetensors: 0.5}")
    (tmp_path / "run.yaml").write_text(text)
    read = TrainConfig.from_yaml(tmp_path / "run.yaml")
    assert read.adapter.start == tmp_path / "start.safetensors"
    assert read.base.adapters == {tmp_path / "undo.safetensors": 0.5}
    assert TrainConfig.model_validate(read.model_dump()) == read
    (tmp_path / "undo.safetensors").unlink()
    with pytest.raises(ValueError, match=r"base.adapters: got '.*undo.safetensors', expected an existing adapter file"):
        TrainConfig.from_yaml(tmp_path / "run.yaml")
