"""A run's identity and folder: what has changed is said, a finished run is left alone, nothing of two runs mixes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dora_diffusion.cli import main
from dora_diffusion.pretrain.scenes import background
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.concepts import Split, checked_examples
from dora_diffusion.training.data.examples import Example
from dora_diffusion.training.run import identity
from dora_diffusion.training.run import train as start
from dora_diffusion.training.run.dry_run import describe_plan
from dora_diffusion.training.run.folder import LOCK, check_writable, run_lock
from dora_diffusion.training.run.identity import Identity
from dora_diffusion.training.run.previews import save_strip
from dora_diffusion.training.run.train import train
from dora_diffusion.training.step.rates import RateSchedule
from dora_diffusion.utils.atomic import MANIFEST, sha256_of
from tests.failing_disk import contents, failing_at
from tests.pocket_random import random_pocket_pipeline
from tests.tolerances import assert_identical

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    random_pocket_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> Path:
    """A folder with `images`, and a run of two steps in `run`, with a checkpoint of each; read only."""
    folder = tmp_path_factory.mktemp("finished")
    images = folder / "images"
    images.mkdir()
    for name in ("red", "blue", "meadow"):
        background(name, 64).save(images / f"{name}.png")
    (images / "red.txt").write_text("a red zqx cat")
    train(config_of(base, folder))
    return folder


@pytest.fixture
def work(base, finished, tmp_path) -> Path:
    """A copy of it, as if it had been trained there."""
    shutil.copytree(finished, tmp_path / "work")
    (tmp_path / "work" / "run" / "config.yaml").write_text(
        config_of(base, tmp_path / "work", mixed_precision="no").to_yaml()  # which is what auto is on a CPU
    )
    return tmp_path / "work"


@pytest.fixture
def stopped(work) -> Path:
    """A copy that was stopped after its first step."""
    shutil.rmtree(work / "run" / "checkpoints" / "step-00000002")
    return work


def config_of(base: Path, folder: Path, **optim: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": str(base),
            "output_dir": folder / "run",
            "data": {"instance_dir": folder / "images", "instance_prompt": "a zqx cat", "resolution": 32},
            "adapter": {"rank": 2, "dropout": 0.1},
            "optim": {"steps": 2, "learning_rate": 1e-3, "lr_scheduler": "constant", **optim},
            "preview": {"prompts": ["a cat"], "steps": 1, "every": 1},
            "validation": {"every": 0, "repeats": 1},
            "checkpoint": {"every": 1, "keep": 3},
        }
    )


def with_sections(config: TrainConfig, **sections: object) -> TrainConfig:
    return TrainConfig.model_validate(config.model_dump() | sections)


def refuse_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(start, "load_base", load)


def accepted_in(run: Path, step: int) -> list[str]:
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "identity.json").read_text())["accepted"]


def repaint(images: Path) -> None:
    background("beach", 64).save(images / "blue.png")


def recaption(images: Path) -> None:
    (images / "red.txt").write_text("a red zqx dog")


def add(images: Path) -> None:
    background("beach", 64).save(images / "beach.png")


def remove(images: Path) -> None:
    (images / "meadow.png").unlink()


CHANGES: dict[Change, str] = {
    repaint: "1 picture changed: blue.png",
    recaption: "1 caption changed: red.png",
    add: "1 picture added: beach.png",
    remove: "1 picture removed: meadow.png",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_picture_or_caption_changed_added_or_removed_between_kill_and_resume_is_said(
    base, stopped, monkeypatch, change
) -> None:
    refuse_to_load(monkeypatch)  # it takes no base to tell
    before = contents(stopped / "run")
    change(stopped / "images")
    with pytest.raises(ValueError, match=f"cannot resume, {CHANGES[change]}; .*--accept-changes") as caught:
        train(config_of(base, stopped), resume="latest")
    assert "\n" not in str(caught.value)
    assert contents(stopped / "run") == before


def test_changes_that_are_accepted_are_noted_in_the_next_checkpoints(base, stopped, capsys) -> None:
    for change in CHANGES:
        change(stopped / "images")
    config = config_of(base, stopped, learning_rate=5e-4)
    train(config, resume="latest", accept_changes=True)
    noted = accepted_in(stopped / "run", 2)
    told = ["optim.learning_rate was 0.001 and is now 0.0005", *CHANGES.values()]
    assert sorted(noted) == sorted(f"step 1: {text}" for text in told)
    said = capsys.readouterr().out
    assert "resuming from step-00000001; accepted: optim.learning_rate was 0.001 and is now 0.0005; " in said
    train(config, resume="latest", extend=3)  # what was accepted is what counts now, and stays noted
    assert accepted_in(stopped / "run", 3) == [*noted, "step 2: optim.steps was 2 and is now 3 (--extend)"]


def test_another_base_in_the_same_place_is_said(base, finished, tmp_path) -> None:
    shutil.copytree(finished / "images", tmp_path / "images")
    shutil.copytree(base, tmp_path / "base")
    train(config_of(tmp_path / "base", tmp_path, steps=1))
    random_pocket_pipeline(seed=1).unet.save_pretrained(tmp_path / "base" / "unet")
    config = config_of(tmp_path / "base", tmp_path)
    with pytest.raises(ValueError, match="step-00000001: cannot resume, the base's unet changed; put it back"):
        train(config, extend=2)
    train(config, extend=2, accept_changes=True)
    assert "step 1: the base's unet changed" in accepted_in(tmp_path / "run", 2)


def test_many_changes_are_told_in_one_line(base, stopped) -> None:
    for number in range(5):
        background("beach", 64).save(stopped / "images" / f"new {number}.png")
    with pytest.raises(ValueError, match=r"5 pictures added: new 0\.png, new 1\.png, new 2\.png \.\.\.; put it back"):
        train(config_of(base, stopped), resume="latest")


@pytest.mark.parametrize(
    ("section", "value"),
    [("adapter", {"rank": 4, "dropout": 0.1}), ("adapter", {"rank": 2, "dropout": 0.1, "use_dora": False})],
)
def test_what_does_not_fit_is_refused_whatever_is_accepted(base, stopped, section, value) -> None:
    changed = with_sections(config_of(base, stopped), **{section: value})
    with pytest.raises(ValueError, match=r"cannot resume, adapter\.\w+ was \w+ and is now \w+; .* does not fit"):
        train(changed, resume="latest", accept_changes=True)


def test_tensors_that_do_not_fit_are_refused_in_one_line(base, stopped) -> None:
    file = stopped / "run" / "checkpoints" / "step-00000001" / "progress.json"
    progress = json.loads(file.read_text())
    progress["settings"]["adapter"]["rank"] = 4
    file.write_text(json.dumps(progress))
    _make_valid(file)
    with pytest.raises(ValueError, match=r"cannot be resumed, unet\.\S+ was \(2, \d+\) and is now \(4, \d+\)"):
        train(with_sections(config_of(base, stopped), adapter={"rank": 4, "dropout": 0.1}), resume="latest")


def _make_valid(file: Path) -> None:
    manifest = json.loads((file.parent / MANIFEST).read_text())
    manifest[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    (file.parent / MANIFEST).write_text(json.dumps(manifest))


def test_an_older_checkpoint_without_an_identity_is_resumed_and_says_so(base, stopped, capsys) -> None:
    folder = stopped / "run" / "checkpoints" / "step-00000001"
    (folder / "identity.json").unlink()
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["identity.json"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert train(config_of(base, stopped), resume="latest").steps == 2
    assert "it is from before pictures, captions and base were noted" in capsys.readouterr().out


def test_an_older_checkpoint_of_squares_is_not_gone_on_with_in_buckets_unseen(base, stopped) -> None:
    file = stopped / "run" / "checkpoints" / "step-00000001" / "progress.json"
    progress = json.loads(file.read_text())
    del progress["settings"]["data"]["buckets"]
    file.write_text(json.dumps(progress))
    _make_valid(file)
    with pytest.raises(ValueError, match="data.buckets was False and is now True"):
        train(config_of(base, stopped), resume="latest")


def test_accepting_changes_of_nothing_is_an_error(base, work) -> None:
    with pytest.raises(ValueError, match="--accept-changes: a run that starts anew"):
        train(config_of(base, work), accept_changes=True)


def test_resuming_a_finished_run_leaves_it_alone_bit_for_bit(base, work, monkeypatch, capsys) -> None:
    refuse_to_load(monkeypatch)
    (work / "run" / "README.md").write_text("a card of my own")
    before = contents(work / "run")
    times = {path: path.stat().st_mtime_ns for path in (work / "run").rglob("*") if path.is_file()}
    result = train(config_of(base, work), resume="latest")
    assert contents(work / "run") == before
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert (result.adapter, result.steps, result.is_new) == (work / "run" / "adapter.safetensors", 2, False)
    assert [step for step, _ in result.validation] == [0, 2]
    assert "has done all of its 2 steps and is left as it is" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["adapter.safetensors", "validation.json", MANIFEST])
def test_a_run_that_was_killed_before_its_last_file_is_brought_to_its_end(base, work, name) -> None:
    before = contents(work / "run")
    (work / "run" / name).unlink()
    assert train(config_of(base, work), resume="latest").is_new
    after = contents(work / "run")
    logs = {path for path in (*before, *after) if path.startswith("logs")}
    assert {path: now for path, now in after.items() if path not in logs} == {
        path: was for path, was in before.items() if path not in logs
    }


@pytest.mark.parametrize("flags", [["--resume", "latest"], ["--extend", "9"]])
def test_resume_latest_with_nothing_to_resume_is_an_error(base, finished, tmp_path, capsys, flags) -> None:
    config = with_sections(config_of(base, finished), output_dir=tmp_path / "run")
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert main(["train", str(tmp_path / "run.yaml"), *flags]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and f"{tmp_path / 'run'}: holds no checkpoint to resume; start anew without" in said[0]
    assert not (tmp_path / "run").exists()


def test_a_relative_output_dir_from_another_folder_does_not_start_anew(base, work, tmp_path, monkeypatch) -> None:
    file = tmp_path / "relative.yaml"
    settings = config_of(base, work).model_dump(mode="json") | {"output_dir": "run"}
    file.write_text(json.dumps(settings))
    monkeypatch.chdir(work)
    assert not train(TrainConfig.from_yaml(file), resume="latest").is_new
    assert TrainConfig.from_yaml(work / "run" / "config.yaml").output_dir == work / "run"
    assert f"output_dir: {work / 'run'}" in TrainConfig.from_yaml(file).to_yaml()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{tmp_path / 'elsewhere' / 'run'}: holds no checkpoint .*a relative one"):
        train(TrainConfig.from_yaml(file), resume="latest")
    assert os.listdir(".") == []


def test_a_run_that_is_extended_equals_a_longer_one_bit_for_bit_where_its_rate_is_constant(
    base, work, tmp_path
) -> None:
    longer = with_sections(config_of(base, work, steps=4), output_dir=tmp_path / "longer")
    whole = train(longer)
    extended = train(config_of(base, work), extend=4)
    assert extended.steps == 4
    assert extended.adapter.read_bytes() == whole.adapter.read_bytes()
    for name in ("parameters", "optimizer"):
        file = f"checkpoints/step-00000004/{name}.safetensors"
        assert_identical(load_file(work / "run" / file), load_file(tmp_path / "longer" / file))
    assert TrainConfig.from_yaml(work / "run" / "config.yaml").optim.steps == 4
    assert not train(config_of(base, work), extend=4).is_new  # said again, as after a kill
    with pytest.raises(ValueError, match="--extend 3: the run has 4 steps; expected more, the number of steps in all"):
        train(config_of(base, work), extend=3)
    with pytest.raises(ValueError, match="optim.steps was 4 and is now 2 .--extend makes a run longer."):
        train(config_of(base, work), resume="latest")


def test_a_killed_extension_goes_on(base, work) -> None:
    whole = train(config_of(base, work), extend=4)
    before = load_file(whole.adapter)
    shutil.rmtree(work / "run" / "checkpoints" / "step-00000004")
    assert_identical(load_file(train(config_of(base, work), extend=4).adapter), before)


def test_the_rate_of_an_extended_cosine_is_that_of_the_longer_run_from_there_on(base, finished, tmp_path) -> None:
    shutil.copytree(finished / "images", tmp_path / "images")
    short = config_of(base, tmp_path, lr_scheduler="cosine")
    train(short)
    rates: list[tuple[int, float]] = []

    def noted(schedule: object, step: int) -> float:
        rate = real(schedule, step)
        rates.append((step, rate))
        return rate

    real = RateSchedule.set
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RateSchedule, "set", noted)
        train(short, extend=4)
    halves = [0.5e-3, 1e-3 * 0.5 * (1 + torch.cos(torch.tensor(0.75 * torch.pi)).item())]
    assert [step for step, _ in rates] == [2, 3]
    assert [rate for _, rate in rates] == pytest.approx(halves)


def test_fewer_steps_than_are_done_are_refused(base, work) -> None:
    with pytest.raises(ValueError, match="cannot resume, it has done more than optim.steps, 1"):
        train(config_of(base, work, steps=1), resume="latest", accept_changes=True)


def test_two_runs_in_one_folder_are_refused(base, stopped, monkeypatch) -> None:
    refuse_to_load(monkeypatch)
    config = config_of(base, stopped)
    with run_lock(config.output_dir):
        before = contents(stopped)
        for resume in (None, "latest"):
            with pytest.raises(ValueError, match=rf"another run trains there \(process {os.getpid()} on \S+\); wait"):
                train(config, resume=resume)
        assert contents(stopped) == before
    assert not (config.output_dir / LOCK).exists()


HELD = """
import sys
from pathlib import Path
from dora_diffusion.training.run.folder import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_of_a_killed_run_is_no_hindrance(tmp_path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", HELD, str(run)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with (
            pytest.raises(ValueError, match=f"{run}: another run trains there .process {process.pid} on"),
            run_lock(run),
        ):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (run / LOCK).exists()
    with run_lock(run):
        assert f"process {os.getpid()} on" in (run / LOCK).read_text()
    assert os.listdir(run) == []


def test_a_folder_that_a_run_comes_to_nothing_in_is_not_left(tmp_path) -> None:
    with pytest.raises(RuntimeError), run_lock(tmp_path / "run"):
        raise RuntimeError
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("call", [0, 1])
def test_a_disk_that_is_full_as_a_run_begins_leaves_no_lock(tmp_path, call) -> None:
    refused = pytest.raises(ValueError, match=r"\.lock: No space left on device")
    with failing_at(call, of=("mkdir", "write")), refused, run_lock(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path) == []


def unwritable(tmp_path: Path) -> Path:
    """Where nobody may make a folder: root may everywhere but in the system's own."""
    if os.geteuid() == 0:
        return Path("/proc/run")
    (tmp_path / "closed").mkdir(mode=0o500)
    return tmp_path / "closed" / "run"


def test_a_read_only_output_is_found_by_the_plan_and_before_the_base_loads(
    base, finished, tmp_path, monkeypatch
) -> None:
    refuse_to_load(monkeypatch)
    config = with_sections(config_of(base, finished), output_dir=unwritable(tmp_path))
    for attempt in (train, describe_plan):
        with pytest.raises(ValueError, match=r"^output_dir: \S+run cannot be written \(.*\); choose another") as caught:
            attempt(config)
        assert "\n" not in str(caught.value)


def test_a_folder_of_which_a_part_cannot_be_written_is_found(tmp_path) -> None:
    check_writable(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").write_text("no folder")
    with pytest.raises(ValueError, match="samples: not a folder that may be written to"):
        check_writable(tmp_path / "run")


def test_samples_of_an_earlier_run_do_not_enter_the_strip(base, work, tmp_path) -> None:
    run = work / "run"
    shutil.rmtree(run / "checkpoints")
    samples = sorted(path.name for path in (run / "samples").iterdir())
    background("beach", 64).save(run / "samples" / "step-00000007.png")
    background("beach", 64).save(run / "samples" / "mine.png")
    before = (run / "samples" / "strip.png").read_bytes()
    (run / "samples" / "strip.png").write_bytes(b"of an earlier run")
    train(config_of(base, work))
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["mine.png", *samples]
    assert (run / "samples" / "strip.png").read_bytes() == before


def test_samples_beyond_the_checkpoint_are_drawn_anew(base, stopped) -> None:
    samples = stopped / "run" / "samples"
    before = contents(samples)
    background("beach", 64).save(samples / "step-00000002.png")
    background("beach", 64).save(samples / "step-00000009.png")
    train(config_of(base, stopped), resume="latest")
    assert contents(samples) == before


def test_a_strip_holds_rows_of_one_size(tmp_path) -> None:
    for step, width in ((0, 32), (1, 32), (2, 64), (10000000, 64)):
        Image.new("RGB", (width, 32)).save(tmp_path / f"step-{step:08d}.png")
    with Image.open(save_strip(tmp_path)) as strip:
        assert strip.size == (64, 64)


def test_an_environment_variable_does_not_divide_the_gradients_again(base, finished, tmp_path, monkeypatch) -> None:
    shutil.copytree(finished / "images", tmp_path / "images")
    plain = config_of(base, tmp_path, gradient_accumulation=2, steps=1, max_grad_norm=0)
    before = train(plain).adapter.read_bytes()
    moments = load_file(tmp_path / "run" / "checkpoints" / "step-00000001" / "optimizer.safetensors")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    other = with_sections(plain, output_dir=tmp_path / "other")
    assert train(other).adapter.read_bytes() == before
    again = load_file(tmp_path / "other" / "checkpoints" / "step-00000001" / "optimizer.safetensors")
    assert_identical(again, moments)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"output_dir": "images"}, r"output_dir: got '\S+images', which is data.instance_dir too"),
        ({"output_dir": "link"}, r"output_dir: got '\S+link', which is data.instance_dir too"),
        (
            {"output_dir": "run", "prior": {"class_prompt": "a cat", "class_dir": "images"}},
            r"prior.class_dir: got '\S+images', which is data.instance_dir too",
        ),
        (
            {"output_dir": "run", "prior": {"class_prompt": "a cat"}, "data": {"instance_dir": "run/class"}},
            r"prior.class_dir: got '\S+run/class', which is data.instance_dir too",
        ),
        (
            {"output_dir": "held", "data": {"instance_dir": "images", "validation_dir": "held"}},
            r"output_dir: got '\S+held', which is data.validation_dir too",
        ),
        (
            {"output_dir": "held", "data": {"instance_dir": "images", "concepts": [{"dir": "held"}]}},
            r"output_dir: got '\S+held', which is data.concepts\[0\].dir too",
        ),
    ],
)
def test_an_output_or_class_folder_that_is_the_pictures_own_is_refused(
    tmp_path, monkeypatch, sections, message
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("images", "held", "run/class"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "images")
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate({"data": {"instance_dir": "images"}, **sections})


@dataclass(frozen=True)
class Richer(Example):
    """An example with more to it."""

    token: str = ""


def identity_of(config: TrainConfig, example: Example) -> Identity:
    return Identity({"pictures": identity.pictures_identity(config, Split([example], []))})


def test_an_identity_takes_whatever_an_example_has(base, work) -> None:
    """Fields that others add: files by their bytes, texts by a hash, numbers as they are."""
    config, images = config_of(base, work), work / "images"
    example = Richer(images / "red.png", "a cat", ("a zqx cat",), mask=images / "blue.png", token="secret")
    before = identity_of(config, example)
    assert Identity.from_json(before.to_json()) == before
    assert "a cat" not in before.to_json() and "secret" not in before.to_json()
    others = {
        "1 caption changed: red.png": replace(example, others=("another",)),
        "1 token changed: red.png": replace(example, token="other"),
        "1 weight changed: red.png": replace(example, weight=2.0),
        "1 mask changed: red.png": replace(example, mask=None),
        "1 picture removed: red.png; 1 picture added: blue.png": replace(example, path=images / "blue.png"),
    }
    for told, other in others.items():
        assert "; ".join(identity.changes(before, identity_of(config, other))) == told
    repaint(images)
    assert identity.changes(before, identity_of(config, example)) == ["1 mask changed: red.png"]


def test_pictures_of_one_name_in_several_folders_are_told_apart(base, tmp_path) -> None:
    for folder in ("images", "images/10_zqx cat", "car"):
        (tmp_path / folder).mkdir()
        background("red", 64).save(tmp_path / folder / "a.png")
    concepts = [{"dir": str(tmp_path / "car"), "prompt": "a car"}, {"dir": str(tmp_path / "car"), "prompt": "two"}]
    settings = config_of(base, tmp_path).model_dump()
    settings["data"] |= {"concepts": concepts}
    config = TrainConfig.model_validate(settings)
    split = checked_examples(config.data, seed=0)
    found = identity.pictures_identity(config, split)
    assert list(found) == ["a.png", "10_zqx cat/a.png", "concepts[0]/a.png", "concepts[0]/a.png (2)"]
    assert len({json.dumps(known) for known in found.values()}) == 4
