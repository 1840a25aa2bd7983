"""Several processes: they train what one does, look at the same pictures, and stop together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run.train import train
from tests.e2e.test_training import config
from tests.e2e.two_processes import launched, nothing, watched
from tests.tolerances import assert_identical

PREVIEWS = {"every": 2, "steps": 1, "prompts": ["a zqx cat", "a dog", "a hen"]}


def settings_of(base: Path, images: Path, output: Path, **sections: Any) -> TrainConfig:
    """Four steps, with all that is looked at beside them."""
    fields = config(base, images, output, steps=4, gradient_accumulation=1).model_dump()
    fields["adapter"] |= {"train_text_encoder": False}
    fields["data"] |= {"cache_dir": output.parent / f"{output.name}-cache"}
    fields["preview"] = PREVIEWS
    fields["validation"] |= {"every": 2, "repeats": 3}
    fields["optim"] |= sections.pop("optim", {})
    return TrainConfig.model_validate(fields | sections)


@pytest.fixture(scope="module")
def one(base, images, tmp_path_factory) -> dict[str, Any]:
    """The run of one process that accumulates the micro-batches of two."""
    folder = tmp_path_factory.mktemp("one")
    seen = nothing()
    with pytest.MonkeyPatch.context() as patch:
        watched(patch, seen)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as the two have it: sums are in the same order
        result = train(settings_of(base, images, folder / "run", optim={"gradient_accumulation": 2}))
        torch.set_num_threads(threads)
    return {**json.loads(json.dumps(seen)), "folder": folder / "run", "validation": result.validation}


def ran(settings: TrainConfig, folder: Path, **environment: str) -> list[dict[str, Any]]:
    """What the two processes saw."""
    (folder / "two.yaml").write_text(settings.to_yaml())
    done = launched(folder / "two.yaml", folder, **environment)
    is_ended = environment.get("STOP", "").startswith("launcher")
    assert (done.returncode == 0) is not is_ended, done.stderr[-3000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def two(base, images, tmp_path_factory) -> dict[str, Any]:
    """The same run in two processes."""
    folder = tmp_path_factory.mktemp("two")
    first, second = ran(settings_of(base, images, folder / "run"), folder)
    return {"ranks": (first, second), "folder": folder / "run"}


def test_two_processes_see_the_pictures_of_one_in_its_order(one, two) -> None:
    first, second = (rank["batches"] for rank in two["ranks"])
    together = [batch for pair in zip(first, second, strict=True) for batch in pair]
    assert len(together) == 8 and together == one["batches"]


def test_they_train_the_same_weights_and_say_so_of_every_step(one, two) -> None:
    # one adds g1 / 2 + g2 / 2, two take (g1 + g2) / 2: halves are exact, so that not even a rounding differs
    mine, theirs = (load_file(run["folder"] / "adapter.safetensors") for run in (one, two))
    assert_identical(theirs, mine)
    for rank in two["ranks"]:
        assert [step["loss"] for step in rank["steps"]] == [step["loss"] for step in one["steps"]]


def test_what_is_measured_is_measured_by_one_of_them(one, two) -> None:
    first, second = (rank["measured"] for rank in two["ranks"])
    assert len(first) == 3 * 5 and len(second) == 3 * 4  # three pictures three times, thrice
    assert sorted(first + second) == sorted(one["measured"])
    told = json.loads((two["folder"] / "validation.json").read_text())
    assert [tuple(each) for each in told] == list(one["validation"]) and len(told) == 3


def test_a_step_takes_one_collective_and_nothing_beside_it_any(two) -> None:
    for rank in two["ranks"]:
        begun = [(step["before"], step["after"]) for step in rank["steps"]]
        first = begun[0][0]
        assert begun == [(first + number, first + number + 1) for number in range(4)]


def test_each_draws_its_share_of_the_previews(one, two) -> None:
    for step in (0, 2, 4):
        name = f"samples/step-{step:08d}.png"
        with Image.open(one["folder"] / name) as mine, Image.open(two["folder"] / name) as theirs:
            assert mine.tobytes() == theirs.tobytes()
    assert [rank["drawn"] for rank in two["ranks"]] == [["a zqx cat", "a hen"] * 3, ["a dog"] * 3]
    assert list((two["folder"] / "samples").glob(".*")) == []


def test_each_encodes_its_share_of_what_both_keep(two) -> None:
    pictures, captions = ([rank[what] for rank in two["ranks"]] for what in ("encoded", "said"))
    assert pictures == [[3], [3]]  # three pictures, plain and flipped
    assert {tuple(each[:1]) for each in captions} == {("",), ("a zqx cat",)}
    assert [each[1:] for each in captions] == [["", "a hen", "a zqx cat"], ["", "a dog"]]  # of its own previews
    cache = two["folder"].parent / "run-cache"
    assert len(list(cache.glob("latents/*/*.safetensors"))) == 6
    assert len(list(cache.glob("captions/*/*.safetensors"))) == 2 + 4  # captions, and what the encoder says of previews


@pytest.mark.parametrize("who", ["0", "1", "launcher"])
def test_a_signal_to_one_stops_both_after_the_same_step_and_is_gone_on_from(base, images, one, tmp_path, who) -> None:
    settings = settings_of(base, images, tmp_path / "run")
    stopped = ran(settings, tmp_path, STOP=f"{who}@1")
    assert [rank["ended"] for rank in stopped] == ["stopped", "stopped"]
    assert [len(rank["steps"]) for rank in stopped] == [2, 2]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert [len(rank["steps"]) for rank in ran(settings, tmp_path, RESUME="latest")] == [2, 2]
    resumed, whole = (load_file(run / "adapter.safetensors") for run in (tmp_path / "run", one["folder"]))
    assert_identical(resumed, whole)
    assert json.loads((tmp_path / "run" / "validation.json").read_text()) == [list(one) for one in one["validation"]]
