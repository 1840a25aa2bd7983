"""`train --dry-run`: what it says, what it refuses, and that it reads no weights."""

import json
import sys
from pathlib import Path

import pytest
import torch

from dora_diffusion.formats import save_adapter
from dora_diffusion.pretrain.scenes import background
from dora_diffusion.training.base import meta as skeleton
from dora_diffusion.training.base.memory import MemoryEstimate
from dora_diffusion.training.base.meta import load_skeleton
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run import dry_run as plan
from dora_diffusion.training.run.dry_run import describe_plan, file_bytes, memory_lines
from tests.families.pipelines import PIPELINES
from tests.pocket_random import random_adapter, random_pocket_pipeline


@pytest.fixture
def base(tmp_path) -> Path:
    """A base of which nothing but the weights is missing."""
    folder = tmp_path / "base"
    random_pocket_pipeline().save_pretrained(folder)
    for file in folder.glob("*/*.safetensors"):
        file.write_bytes(b"no weights in here")
    return folder


def config_of(tmp_path, base, **sections) -> TrainConfig:
    images = tmp_path / "images"
    images.mkdir(exist_ok=True)
    background("beach", 64).save(images / "one.png")
    data = {"instance_dir": images, "instance_prompt": "a cat", "resolution": 32}
    return TrainConfig.model_validate({"model": str(base), "output_dir": tmp_path / "run", "data": data, **sections})


def test_the_plan_says_what_it_takes_without_reading_weights(tmp_path, base) -> None:
    text = describe_plan(config_of(tmp_path, base, adapter={"rank": 3}, prior={"class_prompt": "a dog"}))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == [
        *("base", "images", "sizes", "adapter", "trained", "file", "steps", "prior", "memory", "output")
    ]
    table = lines[lines.index(next(line for line in lines if line.startswith("memory"))) :][:6]
    assert [line[11:22].strip() for line in table] == [
        *("weights", "adapter", "gradients", "optimiser", "activations", "in all")
    ]
    assert len({line.index("MiB") for line in table}) == 1
    sizes = [float(line[22:].split()[0]) for line in table]
    assert sum(sizes[:-1]) == pytest.approx(sizes[-1], abs=0.05) and all(sizes)
    assert "a step of 2 at 32 px" in table[4]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("optim", "complaint"),
    [
        ({"optimizer": "prodigy"}, "optim.optimizer: 'prodigy' needs the package prodigyopt"),
        ({"optimizer_options": {"beta": 0.9}}, "optim.optimizer_options.beta: no option of adamw"),
        ({"lr_pattern": {"to_nothing": 0.5}}, "optim.lr_pattern: 'to_nothing' decides for none of the "),
    ],
)
def test_the_plan_finds_what_an_optimiser_lacks(tmp_path, base, monkeypatch, optim, complaint) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(ValueError, match=f"^{complaint}"):
        describe_plan(config_of(tmp_path, base, optim=optim))


def test_the_plan_counts_what_the_optimiser_keeps(tmp_path, base) -> None:
    def row(**optim) -> float:
        (line,) = [
            line for line in describe_plan(config_of(tmp_path, base, optim=optim)).splitlines() if "optimiser " in line
        ]
        return float(line[22:].split()[0])

    assert row(optimizer="lion") == pytest.approx(row() / 2, abs=0.01) and row() > 0.5


@pytest.mark.parametrize(
    ("prior", "said"),
    [
        ({}, "none"),
        ({"class_prompt": "a dog"}, "a dog: 40 class pictures, drawn by the base where missing"),
        ({"mode": "folder", "class_prompt": "a dog"}, "1 class pictures, FOLDER as it is"),
        (
            {"mode": "adapter_off", "class_prompts": ["a dog", "a cow"]},
            "what the base itself predicts of the same pictures, asked with a dog, a cow",
        ),
        (
            {"mode": "adapter_off", "caption": "blank", "class_prompt": "a dog", "class_dir": "FOLDER"},
            "what the base itself predicts of 1 class pictures, asked with an empty caption",
        ),
    ],
)
def test_the_plan_says_what_is_kept(tmp_path, base, prior: dict, said: str) -> None:
    folder = tmp_path / "dogs"
    folder.mkdir()
    background("snow", 64).save(folder / "dog.png")
    takes = {"class_dir": folder} if "class_dir" in prior or prior.get("mode") == "folder" else {}
    text = describe_plan(config_of(tmp_path, base, prior={**prior, **takes}))
    (line,) = [line for line in text.splitlines() if line.startswith("prior")]
    assert line == "prior      " + said.replace("FOLDER", str(folder))


def test_the_plan_refuses_what_the_run_would(tmp_path, base) -> None:
    with pytest.raises(ValueError, match="'to_nowhere' matches no layer"):
        describe_plan(config_of(tmp_path, base, adapter={"target_modules": ["to_nowhere"]}))
    config = config_of(tmp_path, base)
    (tmp_path / "images" / "one.png").unlink()
    with pytest.raises(ValueError, match="images"):
        describe_plan(config)


def test_a_base_that_is_not_whole_is_refused(tmp_path, base) -> None:
    (base / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="could not be built from its configs: .*unet holds no .safetensors"):
        load_skeleton(base, dtype=torch.float32)
    (base / "vae" / "config.json").write_text("{}{")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "unet": ["diffusers", "NoSuchModel"]}))
    with pytest.raises(ValueError, match="could not be built from its configs"):
        load_skeleton(base, dtype=torch.float32)
    with pytest.raises(ValueError, match="no such folder"):
        load_skeleton(tmp_path / "nowhere", dtype=torch.float32)


def test_a_skeleton_has_the_shapes_of_its_base(base) -> None:
    pipe = load_skeleton(base, dtype=torch.bfloat16)
    true = random_pocket_pipeline()
    assert type(pipe) is type(true) and pipe.vae_scale_factor == true.vae_scale_factor
    assert pipe.scheduler.config.prediction_type == true.scheduler.config.prediction_type
    for name in ("unet", "vae", "text_encoder"):
        shapes = {key: tensor.shape for key, tensor in getattr(true, name).state_dict().items()}
        found = getattr(pipe, name).state_dict()
        assert {key: tensor.shape for key, tensor in found.items()} == shapes
        assert all(tensor.is_meta and tensor.dtype == torch.bfloat16 for tensor in found.values())


def test_weights_that_are_let_go_stay_shared() -> None:
    encoder = skeleton.without_numbers(PIPELINES["sd3"].build()).text_encoder_3
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight and encoder.shared.weight.is_meta


@pytest.mark.parametrize("use_dora", [True, False])
def test_the_size_of_a_file_is_known_before_it_is_written(tmp_path, use_dora) -> None:
    adapter = random_adapter(random_pocket_pipeline(), use_dora=use_dora)
    path = save_adapter(adapter, tmp_path / "adapter.safetensors")
    assert file_bytes(adapter) == path.stat().st_size


def test_large_estimates_are_in_gibibytes() -> None:
    step = "a step of 1"
    weights = {"unet": 3 * 2**30, "text_encoder": 2**30}
    large = MemoryEstimate(weights, 2**20, 2**20, 2**21, {step: 2**30}, {step: ("unet",)}, 512)
    lines = plan.memory_lines(large, "on cuda")
    assert "weights         3.00 GiB  unet 3.00; in main memory meanwhile: text_encoder 1.00" in lines[0]
    assert "a step of 1 at 512 px" in lines[4] and "on cuda" in lines[5]
    assert memory_lines(MemoryEstimate({}, 0, 0, 0, {step: 0}, {step: ()}, 32), "")[0].split()[-1] == "MiB"


def test_settings_that_fit_a_card_are_told_as_flags(tmp_path, base) -> None:
    lines = describe_plan(config_of(tmp_path, base), memory=8).splitlines()
    (tried,) = [line for line in lines if line.startswith("tried")]
    assert tried.endswith("GiB  as it is  <- fits")
    assert "card       8 GiB, of which tensors can have 7.1" in lines
    assert any("in all" in line and "on cuda" in line for line in lines)
