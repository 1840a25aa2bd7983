"""Steps that go wrong: skipped, put back, stopped, and all of it the same in a resumed run. Pictures that vanish."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dora_diffusion.pretrain.scenes import background
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.missing import PicturesMissing
from dora_diffusion.training.run import checkpoint
from dora_diffusion.training.run.train import train
from dora_diffusion.training.step import training_step
from dora_diffusion.training.step.guard import TrainingDiverged
from dora_diffusion.training.step.training_step import TrainingStep
from tests.pocket_random import random_pocket_pipeline
from tests.tolerances import assert_identical

Factors = dict[int, float]
"""Step, from 1 -> what its loss is multiplied by."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    random_pocket_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("red", "blue", "meadow"):
        background(name, 64).save(folder / f"{name}.png")
    return folder


def config(base: Path, images: Path, output: Path, *, steps: int, **guard) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": str(base),
            "output_dir": output,
            "data": {"instance_dir": images, "instance_prompt": "a zqx cat", "resolution": 32, "crop": "random"},
            "adapter": {"rank": 2, "dropout": 0.1},
            "optim": {"steps": steps, "learning_rate": 1e-3, "batch_size": 2, "weight_decay": 0.1},
            "guard": {"every": 1, **guard},
            "validation": {"every": 0, "repeats": 1},
            "checkpoint": {"every": 1, "keep": 50},
        }
    )


def patched_steps(monkeypatch, before: Callable[[int], object], factors: Factors) -> None:
    """Do something before each step, and multiply the losses of some."""
    take, measure = TrainingStep.take, training_step.weighted_mean
    factor = [1.0]

    def taken(self: TrainingStep, step: int) -> float:
        before(step + 1)
        factor[0] = factors.get(step + 1, 1.0)
        loss = take(self, step)
        factor[0] = 1.0
        return loss

    monkeypatch.setattr(TrainingStep, "take", taken)
    monkeypatch.setattr(training_step, "weighted_mean", lambda *tensors: factor[0] * measure(*tensors))


def state_at(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    both = [load_file(folder / f"{name}.safetensors") for name in ("parameters", "optimizer")]
    return both[0] | both[1]


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e6])
def test_a_skipped_step_moves_nothing_at_all(base, images, tmp_path, monkeypatch, capsys, factor) -> None:
    patched_steps(monkeypatch, lambda step: None, {4: factor})
    train(config(base, images, tmp_path / "run", steps=5, window=4))
    assert_identical(state_at(tmp_path / "run", 4), state_at(tmp_path / "run", 3))
    assert not torch.equal(*(state_at(tmp_path / "run", step)["0.exp_avg"] for step in (4, 5)))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    value = "the loss is" if not math.isfinite(factor) else "the gradient is"
    assert line.startswith(f"step 4: {value}") and ".png" in line and line.endswith("the step is skipped")


def test_after_three_skips_the_last_good_state_is_back_and_the_run_goes_on(
    base, images, tmp_path, monkeypatch, capsys
) -> None:
    patched_steps(monkeypatch, lambda step: None, dict.fromkeys((4, 5, 6), math.nan))
    assert train(config(base, images, tmp_path / "run", steps=7)).steps == 7
    assert_identical(state_at(tmp_path / "run", 5), state_at(tmp_path / "run", 3))
    assert_identical(state_at(tmp_path / "run", 6), state_at(tmp_path / "run", 2))  # the one that step 3 found good
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.partition(": the loss is nan on ")[0] for line in said] == ["step 4", "step 5", "step 6"]
    assert said[-1].endswith("the last good state is put back, and the run goes on with the next pictures")


def test_a_run_that_was_guarded_resumes_bit_for_bit(base, images, tmp_path, monkeypatch) -> None:
    wrong = {4: 1e6, 6: math.nan, 7: math.nan, 9: 1e6, 10: 1e6}
    settings = {"steps": 12, "window": 4, "skips": 2, "every": 2}
    with monkeypatch.context() as patch:
        patched_steps(patch, lambda step: None, wrong)
        whole = train(config(base, images, tmp_path / "whole", **settings))
    for last in (6, 9):  # in the middle of skips, before and after a restore
        stopped = config(base, images, tmp_path / f"stopped-{last}", **settings)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patched_steps(patch, lambda step, last=last: _stop_after(step, last), wrong)
            train(stopped)
        with monkeypatch.context() as patch:
            patched_steps(patch, lambda step: None, wrong)
            resumed = train(stopped, resume="latest")
        assert_identical(load_file(resumed.adapter), load_file(whole.adapter))
        ends = [tmp_path / name / "checkpoints" / "step-00000012" for name in ("whole", f"stopped-{last}")]
        guards = [json.loads((end / "progress.json").read_text())["guard"] for end in ends]
        assert guards[0] == guards[1] and guards[0]["restores"] == 2 and guards[0]["skips"] == 5
        assert_identical(*(load_file(end / "last-good.safetensors") for end in ends))


def _stop_after(step: int, last: int) -> None:
    if step > last:
        raise KeyboardInterrupt


def test_after_the_last_restore_the_run_stops_and_says_on_which_pictures(base, images, tmp_path, monkeypatch) -> None:
    patched_steps(monkeypatch, lambda step: None, dict.fromkeys(range(3, 30), math.nan))
    with pytest.raises(TrainingDiverged, match=r"^step 6: the loss is nan on \w+\.png.*after 1 restores of 1;") as said:
        train(config(base, images, tmp_path / "run", steps=30, skips=2, restores=1))
    assert str(tmp_path / "run" / "checkpoints") in str(said.value) and "\n" not in str(said.value)


def test_a_step_is_no_spike_while_there_are_too_few_to_tell(base, images, tmp_path, monkeypatch, capsys) -> None:
    patched_steps(monkeypatch, lambda step: None, {2: 1e6, 5: 1e6})
    train(config(base, images, tmp_path / "run", steps=5, window=6, restores=0))
    said = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert said == ["step 5"]
    assert not list((tmp_path / "run").rglob("last-good.safetensors"))  # restores: 0 keeps nothing


def test_a_checkpoint_of_before_the_guard_is_resumed(base, images, tmp_path, monkeypatch) -> None:
    settings = config(base, images, tmp_path / "run", steps=3)
    save = checkpoint.storage.save_checkpoint

    def without(target, files, keep, spared):
        files = {name: write for name, write in files.items() if name != "last-good.safetensors"}
        save(target, files, keep, spared=spared)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.storage, "save_checkpoint", without)
        patch.setattr(checkpoint.Guard, "progress", lambda self: None)
        patched_steps(patch, lambda step: _stop_after(step, 2), {})
        train(settings)
    assert train(settings, resume="latest").steps == 3


def test_a_picture_that_vanishes_is_left_out_with_a_line(base, images, tmp_path, monkeypatch, capsys) -> None:
    seen: list[tuple[str, ...]] = []
    loss = TrainingStep.loss

    def watched(self, batch, **measured):
        seen.append(batch.names)
        return loss(self, batch, **measured)

    monkeypatch.setattr(TrainingStep, "loss", watched)
    patched_steps(monkeypatch, lambda step: step == 3 and (images / "red.png").unlink(), {})
    settings = config(base, images, tmp_path / "run", steps=8, missing=0.4)
    monkeypatch.setattr(training_step.TrainingStep, "loss", watched)
    with pytest.raises(ValueError, match="red.png"):  # the measured ones are those that are learnt: it stops there
        train(settings)
    trained = seen[3:]
    assert any("red.png" in names for names in trained[:2])
    assert all("red.png" not in names for names in trained[2:]) and {len(names) for names in trained[2:]} == {1, 2}
    lines = [line for line in capsys.readouterr().out.splitlines() if "red.png" in line]
    assert len(lines) == 1 and lines[0].endswith("no such file; its samples are left out while it is away")
    assert (tmp_path / "run" / "checkpoints" / "step-00000008").is_dir()


def test_a_step_without_any_picture_left_moves_nothing(base, images, tmp_path, monkeypatch) -> None:
    held_out = tmp_path / "held-out"
    held_out.mkdir()
    (images / "red.png").rename(held_out / "red.png")

    def vanish(step: int) -> None:
        for file in images.glob("*.png"):
            file.unlink() if step == 2 else None

    patched_steps(monkeypatch, vanish, {})
    settings = config(base, images, tmp_path / "run", steps=3, missing=1.0).model_dump()
    settings["data"]["validation_dir"] = held_out
    train(TrainConfig.model_validate(settings))
    assert_identical(state_at(tmp_path / "run", 3), state_at(tmp_path / "run", 1))
    progress = json.loads((tmp_path / "run" / "checkpoints" / "step-00000003" / "progress.json").read_text())
    assert len(progress["guard"]["norms"]) == 1  # what usual gradients are is not told by steps without any


def test_too_many_missing_pictures_leave_a_checkpoint_and_the_run_goes_on_when_they_are_back(
    base, images, tmp_path, monkeypatch
) -> None:
    whole = train(config(base, images, tmp_path / "whole", steps=6))
    settings = config(base, images, tmp_path / "run", steps=6)
    settings = settings.model_copy(update={"checkpoint": settings.checkpoint.model_copy(update={"every": 0})})
    away = tmp_path / "away.png"
    with monkeypatch.context() as patch, pytest.raises(PicturesMissing, match=r"^1 of 3 pictures .*red.png") as said:
        patched_steps(patch, lambda step: step == 3 and (images / "red.png").rename(away), {})
        train(settings)
    assert "\n" not in str(said.value)
    (kept,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert int(kept.name[5:]) >= 2
    away.rename(images / "red.png")
    assert_identical(load_file(train(settings, resume="latest").adapter), load_file(whole.adapter))


def test_pictures_whose_latents_are_kept_are_not_missed(base, images, tmp_path, monkeypatch, capsys) -> None:
    settings = config(base, images, tmp_path / "run", steps=6).model_dump()
    settings["data"]["crop"] = "center"
    whole = train(TrainConfig.model_validate(settings | {"output_dir": tmp_path / "whole"}))

    def vanish(step: int) -> None:
        if step == 5:
            for file in images.glob("*.png"):
                file.unlink()

    patched_steps(monkeypatch, vanish, {})
    without = train(TrainConfig.model_validate(settings))
    assert_identical(load_file(without.adapter), load_file(whole.adapter))
    assert "left out" not in capsys.readouterr().out
