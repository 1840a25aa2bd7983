"""A base that two processes keep together (FSDP2): they train what one process with the whole of it does."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_diffusion.pretrain.scenes import background
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run.train import train
from tests.e2e.test_training import config
from tests.e2e.two_processes import launched, nothing, watched

SIZES = {"red": (64, 64), "blue": (64, 128), "meadow": (128, 64)}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """Pictures of three shapes, so that some micro-batches are two batches where others are one."""
    folder = tmp_path_factory.mktemp("shapes")
    for name, (width, height) in SIZES.items():
        background(name, 128).crop((0, 0, width, height)).save(folder / f"{name}.png")
    return folder


def settings_of(images: Path, output: Path, accumulation: int) -> TrainConfig:
    """A run on the pocket's DiT, its norms in the backward pass too, its blocks computed twice."""
    optim: dict[str, Any] = {"gradient_checkpointing": True, "gradient_accumulation": accumulation}
    fields = config(Path("pocket-dit"), images, output, steps=4, **optim).model_dump()
    fields["adapter"] |= {"train_text_encoder": False, "norm_grad": "exact"}
    fields["prior"] = {"class_prompt": "a cat", "class_images": 2}
    fields["preview"] = {"every": 0, "steps": 1, "prompts": ["a zqx cat"]}
    return TrainConfig.model_validate(fields)


@pytest.fixture(scope="module")
def one(shapes, tmp_path_factory) -> dict[str, Any]:
    """One process, which accumulates what two take in turns."""
    folder, seen, threads = tmp_path_factory.mktemp("one") / "run", nothing(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        watched(patch, seen)
        torch.set_num_threads(1)  # as the two have it
        train(settings_of(shapes, folder, 2))
        torch.set_num_threads(threads)
    return {**seen, "folder": folder}


@pytest.fixture(scope="module")
def two(shapes, tmp_path_factory) -> dict[str, Any]:
    """Two that have the base together."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "two.yaml").write_text(settings_of(shapes, folder / "run", 1).to_yaml())
    done = launched(folder / "two.yaml", folder, "--use_fsdp", "--fsdp_version=2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "spread over 2 processes (FSDP2): 15 MiB of 30 in each" in done.stdout
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    return {"ranks": ranks, "folder": folder / "run"}


def test_each_process_keeps_half_of_the_base_also_between_steps(one, two) -> None:
    whole = one["held"][0]
    halves = [rank["held"] for rank in two["ranks"]]
    assert all(len(set(held)) == 1 for held in halves)
    assert halves[0][0] + halves[1][0] == whole and abs(halves[0][0] - whole / 2) < 0.01 * whole


def test_they_train_what_one_process_does(one, two) -> None:
    losses = [step["loss"] for step in one["steps"]]
    for rank in two["ranks"]:  # a few roundings of fp32: sums of four gradients in another order, and what they move
        assert [step["loss"] for step in rank["steps"]] == pytest.approx(losses, rel=1e-5)
    mine, theirs = (load_file(run["folder"] / "adapter.safetensors") for run in (one, two))
    ups = [key for key in mine if "lora_B" in key]  # which begin at 0
    moved, apart = (sum(float(part.square().sum()) for part in parts) for parts in _ups(ups, mine, theirs))
    assert moved > 0 and apart < 1e-4 * moved
    measured = [json.loads((run["folder"] / "validation.json").read_text()) for run in (one, two)]
    assert [loss for _, loss in measured[1]] == pytest.approx([loss for _, loss in measured[0]], rel=1e-5)


def _ups(keys: list[str], mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> Any:
    return [mine[key] for key in keys], [mine[key] - theirs[key] for key in keys]


def test_a_norm_is_gathered_once_a_layer_and_step(one, two) -> None:
    assert Counter(two["ranks"][0]["norms"]) == Counter(two["ranks"][1]["norms"]) == Counter(one["norms"])


def test_what_is_drawn_is_what_one_process_draws(one, two) -> None:
    listed = [json.loads((run["folder"] / "class" / "class.json").read_text()) for run in (one, two)]
    assert listed[0] == listed[1] and len(listed[0]) == 2
    name = "samples/step-00000000.png"
    assert (two["folder"] / name).read_bytes() == (one["folder"] / name).read_bytes()
