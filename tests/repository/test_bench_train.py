"""The benchmark of training steps runs from end to end on tiny shapes, and compares what can be compared."""

import json
import logging
import sys
from itertools import count

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.peers.variants import build, check_agreement
from benchmarks.training import __main__ as training
from benchmarks.training import beside, clock
from benchmarks.training.bases import pictures, pocket
from benchmarks.training.clock import Stopwatch, Turn, Way, alternate, quietest, ratio, share
from benchmarks.training.dreambooth import DreamBoothLora, Recipe, lora_layers, pixels_of
from benchmarks.training.parts import LISTED, spread_outside
from benchmarks.training.report import verdict


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is a second later at every look, so that no clock decides a test."""
    looks = count()
    monkeypatch.setattr(clock, "user_seconds", lambda: float(next(looks)))


@pytest.mark.usefixtures("ticks")
@pytest.mark.filterwarnings("ignore")  # other libraries' layers warn
def test_a_quick_run_of_the_training_benchmark_writes_its_page(tmp_path, monkeypatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["training", "--quick", "--rounds", "2", "--output", str(tmp_path)])
    try:
        assert training.main() == 0
    finally:
        logging.disable(logging.NOTSET)
        torch.set_num_threads(threads)
    results = json.loads((tmp_path / "training.json").read_text())
    assert results.keys() == {*training.PARTS, "machine"}
    for case in results["beside"]:
        looks = {name: way["seconds"]["median"] for name, way in case["ways"].items()}
        parts = {
            name: {part: share["median"] * looks[name] for part, share in case["ways"][name]["shares"].items()}
            for name in (beside.RECIPE, beside.DORA)
        }  # a part that comes once has one tick: the recipe reads pictures, latents and text in three
        assert parts[beside.DORA] == pytest.approx(dict.fromkeys(LISTED, 1))
        assert parts[beside.RECIPE] == pytest.approx(dict.fromkeys(LISTED, 1) | {"norms": 0, "batch": 3})
    assert (results["validation"]["steps"], results["validation"]["times"]) == (1000, 11)
    text = (tmp_path / "training.md").read_text()
    assert "| SD1.5's step over PEFT LoRA's | <= 1.05 | " in text
    assert text.count("| our DoRA's step over diffusers' LoRA recipe; ") == 3


def test_the_quietest_rounds_are_the_same_for_all() -> None:
    quiet, loud = ({"a": Turn(1.0, {}), "b": Turn(2.0, {})}, {"a": Turn(1.5, {}), "b": Turn(9.0, {})})
    flattering = {"a": Turn(9.0, {}), "b": Turn(1.0, {})}  # the fastest b, beside the slowest a
    assert quietest([loud, quiet, flattering]) == [quiet]
    found = ratio([quiet, loud], "b", "a")
    assert (found.median, found.low, found.high) == (4.0, 3.0, 5.0)


@pytest.mark.usefixtures("ticks")
def test_ways_take_turns_and_their_parts_are_told() -> None:
    watch, order = Stopwatch(), []

    def work(name: str) -> None:
        order.append(name)
        watch.around("part", lambda: None)()

    rounds = alternate({name: Way(lambda name=name: work(name)) for name in "ab"}, rounds=2, watch=watch)
    assert "".join(order) == "ab" + "ab" + "ba"  # once to warm up
    assert [turn for turns in rounds for turn in turns.values()] == [Turn(3.0, {"part": 1.0})] * 4
    assert share(rounds, "a", ["part", "never"]).median == pytest.approx(1 / 3)


def test_what_lies_outside_counts_captions_that_are_encoded_ahead() -> None:
    turns = {"way": Turn(10.0, {"forward": 4.0, "backward": 4.0, "norms": 1.0}), beside.CAPTION: Turn(5.0, {})}
    assert spread_outside([turns], "way", ["forward", "backward"], 0).median == pytest.approx(0.2)
    assert spread_outside([turns], "way", ["forward", "backward", "norms"], 0).median == pytest.approx(0.1)
    assert spread_outside([turns], "way", ["forward", "backward"], 2).median == pytest.approx(1 - 8 / 20)


def test_a_target_is_open_between_its_quartiles() -> None:
    assert [verdict({"low": 1.0, "high": high, "rounds": 4}, 1.05) for high in (1.05, 1.06)] == ["yes", "open"]
    assert verdict({"low": 1.06, "high": 1.2, "rounds": 4}, 1.05) == "no"
    assert [verdict({"low": value, "high": value, "rounds": 3}, 1.05) for value in (0.9, 1.2)] == ["open", "open"]


@pytest.mark.parametrize("precomputes", [False, True])
def test_the_recipe_trains_what_the_script_trains(tmp_path, precomputes: bool) -> None:
    pipe = pocket().pipe
    layers = lora_layers(pipe.unet, 4)
    recipe = Recipe(pictures(tmp_path / "photos", 128, 4), "a cat", 128, 2, 4, precomputes)
    read = []
    pipe.text_encoder.register_forward_hook(lambda *_: read.append(1))
    torch.manual_seed(0)
    trainer = DreamBoothLora(pipe, recipe, Stopwatch())
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    losses = [trainer.take() for _ in range(3)]
    assert all(0 < loss < 10 for loss in losses)
    assert len(read) == (1 if precomputes else 3)
    assert len(before) == 2 * len(layers) == 144
    assert not any(torch.equal(old, new) for old, new in zip(before, trainer.parameters, strict=True))
    assert not any(parameter.requires_grad for parameter in (*pipe.vae.parameters(), *pipe.text_encoder.parameters()))


def test_the_recipes_pictures_are_random_squares() -> None:
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    wide.paste((0, 0, 255), (20, 0, 40, 20))
    torch.manual_seed(0)
    crops = [pixels_of(wide, 10) for _ in range(20)]
    assert {tuple(crop.shape) for crop in crops} == {(3, 10, 10)}
    assert len({float(crop[0].mean()) for crop in crops}) > 3
    assert all(float(crop.min()) >= -1 and float(crop.max()) <= 1 for crop in crops)


def test_sides_that_train_other_layers_are_not_compared(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.training.dreambooth.TARGETS", ["to_q"])
    with pytest.raises(AssertionError, match="the two train other layers"):
        beside.steps_in_turns(beside.Case(pocket(), 1), tmp_path, rounds=1)


def test_in_bf16_variants_that_it_cannot_tell_apart_are_no_fault() -> None:
    model, x = nn.Sequential(nn.Linear(8, 6)).bfloat16(), torch.zeros(3, 8, dtype=torch.bfloat16)
    variants = build(model, ["0"], ["our LoRA", "our DoRA"])
    for variant in variants.values():
        variant.layers["0"].base.bias.data.fill_(1.0)  # an answer that no adapter changes
    check_agreement(lambda: model(x), model, variants)
