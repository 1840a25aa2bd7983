"""Runs with every optimiser and with averages: resumed bit for bit, not changed by being looked at, shown rightly."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dora_diffusion.formats import save_adapter
from dora_diffusion.functional.weight_norms import update_norm
from dora_diffusion.pretrain.scenes import background
from dora_diffusion.training.base.trainable import load_base, prepare_trainable
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.known_optimisers import OPTIMISERS
from dora_diffusion.training.run import watchers
from dora_diffusion.training.run.train import train
from dora_diffusion.training.step import training_step
from dora_diffusion.training.step.training_step import TrainingStep
from tests.pocket_random import random_pocket_pipeline
from tests.tolerances import assert_close, assert_identical

RATES = {
    "adamw8bit": {"learning_rate": 1e-3, "optimizer_options": {"min_8bit_size": 1024}},  # so that some are of 8 bits
    "prodigy": {"optimizer_options": {"d0": 1e-4}},
    "schedulefree": {"learning_rate": 1e-2, "warmup_steps": 2},
}
SETTINGS: dict[str, dict[str, object]] = {
    **{name: {"optimizer": name, **RATES.get(name, {"learning_rate": 1e-3})} for name in OPTIMISERS},
    "moving average": {"ema_decay": 0.6, "learning_rate": 5e-3, "lr_scheduler": "constant"},
    "patterns and norms": {
        "optimizer": "came",
        "learning_rate": 1e-3,
        "lr_pattern": {"to_q": 0.5, r"text_encoder\..*": 2.0},
        "max_weight_norm": 0.01,
        "ema_decay": 0.9,
    },
}
AVERAGED = ["schedulefree", "moving average"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    random_pocket_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name in ("red", "blue"):
        background(name, 64).save(folder / f"{name}.png")
    return folder


def config(base: Path, images: Path, output: Path, name: str, **sections) -> TrainConfig:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    settings = {
        "model": str(base),
        "output_dir": output,
        "data": {"instance_dir": images, "instance_prompt": "a zqx cat", "resolution": 64, "flip": True},
        "adapter": {"rank": 8, "dropout": 0.1, "train_text_encoder": True},
        "words": {"starts": {"zqx": "cat"}, "share": 0.6},
        "optim": {"steps": 5, "batch_size": 2, **SETTINGS[name]},
        "validation": {"every": 0, "repeats": 1},
        "checkpoint": {"every": 2, "keep": 9},
    }
    return TrainConfig.model_validate(settings | sections)


def parts(run: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, object]]:
    """What a checkpoint holds: parameters with their average, the optimiser's tensors, its values."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    progress = json.loads((folder / "progress.json").read_text())
    return *(load_file(folder / f"{name}.safetensors") for name in ("parameters", "optimizer")), progress["optimizer"]


def assert_same_end(run: Path, other: Path) -> None:
    for one, two in zip(parts(run, 5)[:2], parts(other, 5)[:2], strict=True):
        assert_identical(one, two)
    assert parts(run, 5)[2] == parts(other, 5)[2]
    for file in ("adapter.safetensors", "words/zqx.safetensors", "validation.json"):
        assert (run / file).read_bytes() == (other / file).read_bytes()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_was_killed_ends_as_the_one_that_nothing_befell(base, images, tmp_path, name) -> None:
    whole = train(config(base, images, tmp_path / "whole", name))
    stopped = config(base, images, tmp_path / "stopped", name)
    train(stopped)
    for late in (4, 5):
        (tmp_path / f"stopped/checkpoints/step-{late:08d}/parameters.safetensors").write_bytes(b"cut short")
    assert train(stopped, resume="latest").steps == 5
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")
    trainable = prepare_trainable(load_base(str(base), torch.float32), stopped)
    begun = load_file(save_adapter(trainable.adapter({}), tmp_path / "begun.safetensors"))
    tensors = load_file(whole.adapter)
    assert [key for key, tensor in tensors.items() if torch.equal(tensor, begun[key])] == []  # every A, B and m
    card = (tmp_path / "whole" / "README.md").read_text()
    kind = stopped.optim.optimizer
    assert (f"optimiser {kind}, " in card) == (kind != "adamw") and f"learning rate {stopped.optim.rate:g}," in card
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


@pytest.mark.parametrize("name", AVERAGED)
def test_a_run_is_not_changed_by_being_looked_at_and_saved(base, images, tmp_path, monkeypatch, name) -> None:
    """Nor by a signal, whose checkpoint is of a step that no other run saves."""
    train(config(base, images, tmp_path / "seldom", name))
    often = config(base, images, tmp_path / "often", name, checkpoint={"every": 1, "keep": 9})
    sections = {"validation": {"every": 1, "repeats": 1}, "preview": {"every": 1, "prompts": ["a zqx cat"], "steps": 1}}
    often = TrainConfig.model_validate(often.model_dump() | sections)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingStep, "take", _signalled(TrainingStep.take, at=2))
        train(often)
    train(often, resume="latest")
    for one, two in zip(parts(tmp_path / "seldom", 5), parts(tmp_path / "often", 5), strict=True):
        assert one.keys() == two.keys()
    assert_identical(parts(tmp_path / "seldom", 5)[0], parts(tmp_path / "often", 5)[0])
    assert_identical(parts(tmp_path / "seldom", 5)[1], parts(tmp_path / "often", 5)[1])
    adapters = [tmp_path / run / "adapter.safetensors" for run in ("seldom", "often")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def _signalled(take, *, at: int):
    def taken(self, step: int) -> float:
        if step == at:
            signal.raise_signal(signal.SIGTERM)
        return take(self, step)

    return taken


def averages(run: Path, name: str) -> dict[str, Tensor]:
    """`unet.PATH.down` -> what is to be shown after the last step, from what the checkpoint holds."""
    parameters, optimizer, _ = parts(run, 5)
    if name == "moving average":
        shadows = {key.removeprefix("average."): one for key, one in parameters.items() if key.startswith("average.")}
        return {key: one for key, one in shadows.items() if key != "steps"}
    # x = y + (1 - 1 / beta1) (z - y): schedulefree's own eval(); its groups are A, B and m of each component, and words
    kinds = [(part, kind) for part in ("unet", "text_encoder") for kind in ("down", "up", "magnitude")]
    order = [key for part, kind in kinds for key in _ordered(parameters, part, kind)] + ["words.text_encoder.vectors"]
    return {
        key: torch.lerp(parameters[key], optimizer[f"{index}.z"], 1 - 1 / 0.9)
        if f"{index}.z" in optimizer
        else parameters[key]
        for index, key in enumerate(order)
    }


def _ordered(parameters: dict[str, Tensor], part: str, kind: str) -> list[str]:
    """Names in the order of the model's layers, which a file has lost."""
    pipe = random_pocket_pipeline()
    places = {path: number for number, (path, _) in enumerate(getattr(pipe, part).named_modules())}
    names = [key for key in parameters if key.startswith(f"{part}.") and key.endswith(f".{kind}")]
    return sorted(names, key=lambda key: places[key.removeprefix(f"{part}.").removesuffix(f".{kind}")])


@pytest.mark.parametrize("name", AVERAGED)
def test_what_is_drawn_measured_and_saved_is_the_average(base, images, tmp_path, monkeypatch, name) -> None:
    drawn: list[dict[str, Tensor]] = []

    def look(trainable, preview):
        drawn.append({key: one.detach().clone() for key, one in trainable.named_tensors().items()})
        return draw(trainable, preview)

    draw = watchers.draw_previews
    monkeypatch.setattr(watchers, "draw_previews", look)
    measured: list[dict[str, Tensor]] = []
    measure = watchers.Validation.measure

    def measuring(self, step, trainable):
        measured.append({key: one.detach().clone() for key, one in trainable.named_tensors().items()})
        return measure(self, step, trainable)

    monkeypatch.setattr(watchers.Validation, "measure", measuring)
    preview = {"prompts": ["a zqx cat"], "steps": 1}
    run = train(config(base, images, tmp_path / "run", name, preview=preview))
    expected = averages(tmp_path / "run", name)
    parameters = parts(tmp_path / "run", 5)[0]
    assert [key for key, one in expected.items() if torch.equal(one, parameters[key])] == []
    assert len(drawn) == len(measured) == 2
    for seen in (drawn[-1], measured[-1]):
        assert_identical({key: seen[key] for key in expected}, expected)
    saved, (word,) = load_file(run.adapter), load_file(run.words[0]).values()
    rows = {id(one): one for one in expected.values()}
    assert_identical(word, expected["words.text_encoder.vectors"])
    kept = {tuple(one.flatten().tolist()) for one in rows.values()}
    assert {tuple(one.flatten().tolist()) for key, one in saved.items() if "alpha" not in key} <= kept
    in_checkpoint = load_file(tmp_path / "run" / "checkpoints" / "step-00000005" / "adapter.safetensors")
    assert_identical(in_checkpoint, saved)


def test_the_last_good_state_that_comes_back_is_that_of_the_average_too(base, images, tmp_path, monkeypatch) -> None:
    settings = config(base, images, tmp_path / "run", "moving average", checkpoint={"every": 1, "keep": 9})
    settings = TrainConfig.model_validate(settings.model_dump() | {"guard": {"every": 1, "skips": 2}})
    take, measure = TrainingStep.take, training_step.weighted_mean
    now = [0]

    def taken(self, step: int) -> float:
        now[0] = step + 1
        return take(self, step)

    def spoilt(*tensors: Tensor) -> Tensor:
        is_wrong = now[0] in (3, 4) and torch.is_grad_enabled()
        return (math.nan if is_wrong else 1.0) * measure(*tensors)

    monkeypatch.setattr(TrainingStep, "take", taken)
    monkeypatch.setattr(training_step, "weighted_mean", spoilt)
    train(settings)
    states = {step: parts(tmp_path / "run", step)[0] for step in range(1, 6)}
    assert_identical(states[3], states[2])  # skipped: neither what is trained nor its average moves
    assert_identical(states[4], states[1])  # put back to before step 2, which step 2 had found good
    assert int(states[1]["average.steps"]) == 1 and int(states[5]["average.steps"]) == 2
    shadows = {key for key in states[5] if key.startswith("average.unet.")}
    decay = (1 + 1) / (10 + 1)  # of the second step that counts
    before, trained = states[4], {key: states[5][key.removeprefix("average.")] for key in shadows}
    expected = {key: before[key] - (1 - decay) * (before[key] - trained[key]) for key in shadows}
    assert_close({key: states[5][key] for key in shadows}, expected)
    wrong = {key: before[key] - (1 - 3 / 12) * (before[key] - trained[key]) for key in shadows}  # had it been the third
    assert max(float((wrong[key] - expected[key]).abs().max()) for key in shadows) > 5e-5


def test_norms_are_cut_in_a_run(base, images, tmp_path) -> None:
    settings = config(base, images, tmp_path / "run", "patterns and norms")
    train(settings)
    parameters = parts(tmp_path / "run", 5)[0]
    trained = [key.removesuffix(".down") for key in parameters if key.endswith(".down") and "average" not in key]
    lengths = [float(update_norm(parameters[f"{key}.down"], parameters[f"{key}.up"], 1.0)) for key in trained]
    assert max(lengths) <= 0.01 * (1 + 1e-5) and sum(length > 0.0099 for length in lengths) > len(lengths) / 2


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"ema_decay": None}, "optim.ema_decay was 0.6 and is now None"),
        ({"optimizer": "lion"}, "optim.optimizer was 'adamw' and is now 'lion'"),
        ({"lr_pattern": {"to_q": 0.5}}, "optim.lr_pattern was {} and is now {'to_q': 0.5}"),
        ({"optimizer_options": {"amsgrad": True}}, "optim.optimizer_options was {} and is now {'amsgrad': True}"),
    ],
)
def test_what_an_optimiser_keeps_is_not_gone_on_with_by_another(base, images, tmp_path, changed, told) -> None:
    settings = config(base, images, tmp_path / "run", "moving average")
    optim = {**settings.optim.model_dump(), "steps": 1}
    settings = TrainConfig.model_validate(settings.model_dump() | {"optim": optim})
    train(settings)
    other = TrainConfig.model_validate(settings.model_dump() | {"optim": optim | changed})
    with pytest.raises(ValueError, match="cannot resume") as caught:
        train(other, resume="latest", accept_changes=True)
    assert told in str(caught.value)


def test_a_missing_library_is_said_before_pictures_are_looked_at(base, images, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "prodigyopt", None)
    with pytest.raises(ValueError, match="optim.optimizer: 'prodigy' needs the package prodigyopt"):
        train(config(base, tmp_path, tmp_path / "run", "prodigy"))
