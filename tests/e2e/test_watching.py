"""What one sees of a run and hooks into: callbacks, a given pipeline, previews, the best checkpoint, an early end."""

import json
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dora_diffusion as dd
from dora_diffusion.functional.objectives import timestep_ladder
from dora_diffusion.generation.generate import GenerationSettings, generate
from dora_diffusion.pipelines.loading import load_pipeline
from dora_diffusion.pretrain.scenes import background
from dora_diffusion.training.config import FlowConfig, OptimConfig, TrainConfig
from dora_diffusion.training.run.callbacks import CallbackFailed
from dora_diffusion.training.run.train import train
from dora_diffusion.training.run.validation import Validation
from dora_diffusion.training.step.objective import objective_of
from dora_diffusion.utils.atomic import is_valid_checkpoint
from tests.failing_disk import contents
from tests.pocket_random import random_pocket_pipeline
from tests.tolerances import assert_identical

LOSSES = {0: 9.0, 2: 3.0, 4: 5.0, 6: 4.0, 8: 6.0, 10: 5.5, 12: 2.0}
"""By step: the best is that of step 2, and of the two after it none is better."""


class Killed(BaseException):
    """The process is gone: nothing may be done any more."""


class Heard(dd.TrainingCallback):
    """Notes all that it hears; and does something at one of the calls."""

    def __init__(self, at: tuple[str, int] = ("", 0), do: Callable[[], object] = lambda: None) -> None:
        self.calls: list[tuple[str, int]] = []
        self._at, self._do = at, do
        self.results: list[object] = []

    def _note(self, name: str, number: int) -> None:
        self.calls.append((name, number))
        if (name, number) == self._at:
            self._do()

    def step(self, number, loss, rate) -> None:
        assert isinstance(loss, float) and rate > 0
        self._note("step", number)

    def preview(self, number, pictures, path) -> None:
        with Image.open(path) as sheet:
            assert sheet.width == sum(picture.width for picture in pictures)
        self._note("preview", number)

    def checkpoint(self, number, folder) -> None:
        assert is_valid_checkpoint(folder)
        self._note("checkpoint", number)

    def end(self, result) -> None:
        assert result.adapter.is_file()
        self._note("end", result.steps)
        self.results.append(result)


def config(model: Path, images: Path, output: Path, **sections: Mapping[str, object]) -> TrainConfig:
    """Six steps, one picture of three held out and measured every second, a checkpoint every third."""
    fields: dict[str, dict[str, object]] = {
        "data": {"instance_prompt": "a zqx cat", "resolution": 32, "validation_share": 0.34},
        "optim": {"steps": 6, "learning_rate": 1e-3, "lr_scheduler": "constant"},
        "preview": {"prompts": ["a cat"], "steps": 1, "every": 3},
        "validation": {"every": 2, "timesteps": 1},
        "checkpoint": {"every": 3, "keep": 1},
        "adapter": {"rank": 2, "dropout": 0.1},
    }
    merged = {name: {**section, **sections.get(name, {})} for name, section in fields.items()}
    merged["data"]["instance_dir"] = images
    return TrainConfig.model_validate({**sections, **merged, "model": str(model), "output_dir": output})


def with_end(base: Path, images: Path, output: Path, *, steps: int = 10, final: str = "last") -> TrainConfig:
    """A longer run that keeps its best, and ends after two measurements without a better one."""
    return config(
        base,
        images,
        output,
        optim={"steps": steps},
        validation={"patience": 2},
        checkpoint={"keep_best": True, "final": final},
    )


def measure(validation: Validation, step: int, trainable: object) -> float:
    """LOSSES, whatever was learnt."""
    validation.losses.append((step, LOSSES[step]))
    return LOSSES[step]


@pytest.fixture
def losses(monkeypatch) -> None:
    """Validation says LOSSES."""
    monkeypatch.setattr(Validation, "measure", measure)


@pytest.fixture(scope="module")
def ended(base, images, tmp_path_factory) -> Path:
    """A run `with_end` that nothing befell; read only."""
    run = tmp_path_factory.mktemp("runs") / "ended"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validation, "measure", measure)
        train(with_end(base, images, run))
    return run


# The bytes of the report are compared in test_run_files.
_NAMES_THE_FOLDER = ("logs", "config.yaml", "report.html")


def left_by(run: Path) -> dict[str, object]:
    """All that a run left, but its logs, and its config, which names the folder."""
    return {name: data for name, data in contents(run).items() if not name.startswith(_NAMES_THE_FOLDER)}


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())


def test_callbacks_hear_of_everything_in_its_order(base, images, tmp_path) -> None:
    heard = Heard()
    result = train(config(base, images, tmp_path / "run"), callbacks=[heard])
    steps = {number: ("step", number) for number in range(1, 7)}
    assert heard.calls == [
        ("preview", 0),
        *(steps[number] for number in (1, 2, 3)),
        ("preview", 3),
        ("checkpoint", 3),
        *(steps[number] for number in (4, 5, 6)),
        ("preview", 6),
        ("checkpoint", 6),
        ("end", 6),
    ]
    assert heard.results == [result]


@pytest.mark.parametrize("at", [("step", 2), ("preview", 3), ("checkpoint", 3)])
def test_a_callback_that_fails_ends_the_run_after_a_checkpoint(base, images, tmp_path, at) -> None:
    settings = config(base, images, tmp_path / "run")
    with pytest.raises(CallbackFailed) as caught:
        train(settings, callbacks=[Heard(at, lambda: 1 / 0)])
    name, number = at
    assert str(caught.value) == f"callback Heard.{name} after step {number}: ZeroDivisionError: division by zero"
    assert checkpoints(tmp_path / "run") == [number]
    whole = train(config(base, images, tmp_path / "whole"))
    resumed = train(settings, resume="latest")
    assert_identical(load_file(resumed.adapter), load_file(whole.adapter))
    assert resumed.validation == whole.validation


def test_what_is_no_callback_is_refused_before_anything_is_loaded(tmp_path, base, images) -> None:
    class Half:
        def step(self, number: int, loss: float, rate: float) -> None: ...

    with pytest.raises(ValueError, match=r"callbacks: .*Half has no method preview; expected a subclass of Training"):
        train(config(base, images, tmp_path / "run"), callbacks=[Half()])
    assert not (tmp_path / "run").exists()


def everything_of(pipe) -> dict[str, object]:
    """Of each tensor: which object it is, where its values lie, its flag; of each module: which it is, and its mode."""
    found: dict[str, object] = {}
    for name, part in pipe.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        for path, module in part.named_modules():
            found[f"{name}.{path}"] = (id(module), module.training, getattr(module, "gradient_checkpointing", None))
        for path, tensor in [*part.named_parameters(), *part.named_buffers()]:
            found[f"{name}.{path}:"] = (id(tensor), tensor.data_ptr(), tensor.dtype, tensor.requires_grad)
    return found


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_given_pipeline_trains_as_the_loaded_one_does_and_is_given_back(base, images, tmp_path, precision) -> None:
    pipe = load_pipeline(base)
    pipe.unet.train()
    pipe.unet.conv_in.weight.requires_grad_(False)
    before, values = everything_of(pipe), {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    scheduler, bar = pipe.scheduler, dict(getattr(pipe, "_progress_bar_config", {}))
    sections = {
        "optim": {"steps": 2, "mixed_precision": precision, "gradient_checkpointing": True},
        "adapter": {"train_text_encoder": True},
        "words": {"starts": {"zqx": "cat"}},
    }
    given = train(config(base, images, tmp_path / "given", **sections), pipeline=pipe)
    assert everything_of(pipe) == before
    assert_identical(dict(pipe.unet.state_dict()), values)
    assert pipe.scheduler is scheduler and dict(pipe._progress_bar_config) == bar
    assert len(pipe.tokenizer) == len(load_pipeline(base).tokenizer)
    loaded = train(config(base, images, tmp_path / "loaded", **sections))
    assert_identical(load_file(given.adapter), load_file(loaded.adapter))
    assert [path.read_bytes() for path in given.words] == [path.read_bytes() for path in loaded.words]


def test_a_given_pipeline_comes_back_when_the_run_fails_and_is_known_again(base, images, tmp_path) -> None:
    pipe = load_pipeline(base)
    before = everything_of(pipe)
    settings = config(base, images, tmp_path / "run")
    with pytest.raises(CallbackFailed):
        train(settings, pipeline=pipe, callbacks=[Heard(("step", 3), lambda: 1 / 0)])
    assert everything_of(pipe) == before
    other = random_pocket_pipeline(seed=1)
    with pytest.raises(ValueError, match="cannot resume, the base's text_encoder changed"):
        train(settings, resume="latest", pipeline=other)
    assert train(settings, resume="latest", pipeline=pipe).steps == 6


def test_an_adapter_below_is_taken_out_of_a_given_pipeline(base, images, tmp_path) -> None:
    below = train(config(base, images, tmp_path / "below", optim={"steps": 1, "learning_rate": 0.1})).adapter
    pipe = load_pipeline(base)
    values = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    train(config(base, images, tmp_path / "run", optim={"steps": 1}, base={"adapters": {below: 1.0}}), pipeline=pipe)
    assert_identical(dict(pipe.unet.state_dict()), values)


def test_what_cannot_be_trained_on_is_refused_in_a_line(base, images, tmp_path) -> None:
    settings = config(base, images, tmp_path / "run")
    with pytest.raises(ValueError, match="pipeline: got a str, expected a diffusers pipeline, loaded"):
        train(settings, pipeline="pocket")
    pipe = load_pipeline(base)
    pipe.vae._hf_hook = object()
    with pytest.raises(ValueError, match="pipeline: its vae is offloaded"):
        train(settings, pipeline=pipe)
    file = tmp_path / "unet.safetensors"
    file.write_bytes(b"")
    beside = config(base, images, tmp_path / "run", base={"unet": file})
    with pytest.raises(ValueError, match=r"base\.unet: names a file beside a pipeline"):
        train(beside, pipeline=load_pipeline(base))
    assert not (tmp_path / "run").exists()


def test_the_best_checkpoint_stays_and_the_run_ends_early(base, images, ended) -> None:
    run = ended
    result = train(with_end(base, images, run), resume="latest")
    assert (result.steps, result.best, result.ended_early, result.is_new) == (6, (2, 3.0), True, False)
    assert [step for step, _ in result.validation] == [0, 2, 4, 6]
    assert checkpoints(run) == [2, 6]  # the best, and the newest one
    assert all(is_valid_checkpoint(path) for path in (run / "checkpoints").iterdir())
    last = (run / "checkpoints" / "step-00000006" / "adapter.safetensors").read_bytes()
    assert result.adapter.read_bytes() == last
    said = json.loads((run / "manifest.json").read_text())
    assert (said["steps"], said["best"], said["ended_early"]) == (6, {"step": 2, "loss": 3.0}, True)
    card = (run / "README.md").read_text()
    assert "ended after 6 of 10 steps" in card and "The best was step 2, loss 3.0000" in card


def test_the_best_can_be_what_the_run_leaves(base, images, tmp_path, losses) -> None:
    result = train(with_end(base, images, tmp_path / "run", final="best"))
    best = tmp_path / "run" / "checkpoints" / "step-00000002" / "adapter.safetensors"
    assert result.adapter.read_bytes() == best.read_bytes()
    kept = contents(tmp_path / "run")
    again = train(with_end(base, images, tmp_path / "run", final="best"), resume="latest")
    assert not again.is_new and again.best == (2, 3.0) and contents(tmp_path / "run") == kept


def test_without_it_the_best_goes_as_the_others_do(base, images, tmp_path, losses) -> None:
    result = train(config(base, images, tmp_path / "run"))
    assert result.best is None and checkpoints(tmp_path / "run") == [6]


def test_a_run_that_ended_early_is_left_alone_until_it_is_extended(
    base, images, ended, tmp_path, losses, capsys
) -> None:
    run, settings = tmp_path / "run", with_end(base, images, tmp_path / "run")
    shutil.copytree(ended, run)
    kept = contents(run)
    left = train(settings, resume="latest")
    assert contents(run) == kept and (left.steps, left.is_new, left.ended_early) == (6, False, True)
    assert "ended early, after 6 steps" in capsys.readouterr().out
    further = train(settings, extend=12)  # patience begins anew: 6.0, 5.5, 2.0
    assert (further.steps, further.best, further.ended_early) == (12, (12, 2.0), False)
    assert [step for step, _ in further.validation] == [0, 2, 4, 6, 8, 10, 12]


KILLS = [("step", 2), ("checkpoint", 2), ("step", 3), ("step", 6), ("checkpoint", 6)]


@pytest.mark.parametrize("at", KILLS, ids=lambda at: f"{at[0]} {at[1]}")
def test_a_kill_changes_nothing_of_what_is_kept(base, images, ended, tmp_path, losses, at) -> None:
    run, settings = tmp_path / "run", with_end(base, images, tmp_path / "run")

    def kill() -> None:
        raise Killed

    with pytest.raises(Killed):
        train(settings, callbacks=[Heard(at, kill)])
    train(settings, resume="latest" if any(run.glob("checkpoints/step-*")) else None)
    assert left_by(run) == left_by(ended)


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_stop_where_a_measurement_was_due_changes_nothing_either(base, images, ended, tmp_path, losses, step) -> None:
    run, settings = tmp_path / "run", with_end(base, images, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(settings, callbacks=[Heard(("step", step), lambda: signal.raise_signal(signal.SIGTERM))])
    train(settings, resume="latest")
    assert left_by(run) == left_by(ended)


def test_a_kill_in_an_extension_changes_nothing_either(base, images, ended, tmp_path, losses) -> None:
    run, settings = tmp_path / "run", with_end(base, images, tmp_path / "run")
    shutil.copytree(ended, run)
    train(settings, extend=12)
    whole = left_by(run)
    for at in (("step", 7), ("checkpoint", 9)):
        shutil.rmtree(run)
        shutil.copytree(ended, run)

        def kill() -> None:
            raise Killed

        with pytest.raises(Killed):
            train(settings, extend=12, callbacks=[Heard(at, kill)])
        train(settings, extend=12)
        assert left_by(run) == whole


def test_the_best_of_what_was_measured_is_kept(base, images, tmp_path) -> None:
    settings = config(
        base, images, tmp_path / "run", validation={"every": 1, "timesteps": 4}, checkpoint={"keep_best": True}
    )
    result = train(settings)
    step, loss = min(result.validation[1:], key=lambda pair: pair[1])
    assert result.best == (step, loss) and step in checkpoints(tmp_path / "run")


def test_a_best_that_is_gone_is_forgotten_aloud(base, images, tmp_path, losses, capsys) -> None:
    settings = with_end(base, images, tmp_path / "run")
    with pytest.raises(CallbackFailed):
        train(settings, callbacks=[Heard(("step", 3), lambda: 1 / 0)])
    (tmp_path / "run" / "checkpoints" / "step-00000002" / "parameters.safetensors").unlink()
    result = train(settings, resume="latest")
    assert result.best == (6, 4.0)
    assert "the best checkpoint, of step 2, is no longer whole: it is forgotten" in capsys.readouterr().out


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def previews(pictures: list[object], **preview: object) -> dict[str, object]:
    return {"preview": {"prompts": pictures, **preview}}


def test_previews_have_settings_of_their_own(base, images, tmp_path) -> None:
    own = {"prompt": "a dog", "negative": "a cat", "seed": 3, "size": [96, 64], "steps": 2, "guidance_scale": 2.0}
    sections = previews(["a cat", own], seed=7, steps=1, guidance_scale=1.5)
    train(config(base, images, tmp_path / "run", optim={"steps": 1}, **sections))
    drawn = read(tmp_path / "run" / "samples" / "step-00000000.png")
    pipe = load_pipeline(base)
    first = np.asarray(generate(pipe, GenerationSettings("a cat", seed=7, steps=1, guidance_scale=1.5)))
    second = np.asarray(generate(pipe, GenerationSettings("a dog", "a cat", 3, 2, 2.0, width=96, height=64)))
    assert drawn.shape == (max(len(first), 64), first.shape[1] + 96, 3)
    assert np.array_equal(drawn[: len(first), : first.shape[1]], first)
    assert np.array_equal(drawn[:64, first.shape[1] :], second)
    with Image.open(tmp_path / "run" / "samples" / "strip.png") as strip:
        assert strip.size == (drawn.shape[1], 2 * drawn.shape[0])


def test_a_preview_s_strength_is_that_of_the_adapter(base, images, tmp_path) -> None:
    pictures = [{"prompt": "a cat", "strength": strength} for strength in (0.0, 0.5, 1.0, 2.0)]
    settings = config(
        base, images, tmp_path / "run", optim={"learning_rate": 0.05, "steps": 3}, **previews(pictures, steps=2)
    )
    result = train(settings)
    drawn = read(tmp_path / "run" / "samples" / "step-00000003.png")
    pipe = load_pipeline(base)
    plain = np.asarray(generate(pipe, GenerationSettings("a cat", steps=2))).astype(int)
    width = plain.shape[1]
    parts = [drawn[:, number * width : (number + 1) * width] for number in range(4)]
    assert np.array_equal(parts[0], plain)
    manager = dd.AdapterManager(pipe)
    manager.load_adapter(result.adapter, name="own")
    for strength, part in zip((0.5, 1.0, 2.0), parts[1:], strict=True):
        manager.set_adapters({"own": strength})
        expected = np.asarray(generate(pipe, GenerationSettings("a cat", steps=2))).astype(int)
        assert np.abs(part - expected).max() <= 2  # of 255: the manager adds the same in another order
        assert np.abs(part - plain).max() > 20


def test_a_preview_that_the_base_cannot_draw_is_found_before_training(base, images, tmp_path) -> None:
    sections = previews(["a cat", {"prompt": "a dog <lora:ink:1>"}])
    with pytest.raises(ValueError, match=r"preview\.prompts\[1\]: prompt: <lora:ink> names an adapter"):
        train(config(base, images, tmp_path / "run", **sections))
    assert not (tmp_path / "run").exists()


def test_old_previews_are_the_same_bytes_as_those_that_say_the_same(base, images, tmp_path) -> None:
    record = {"prompt": "a cat", "seed": 0, "steps": 1, "guidance_scale": 4.0, "strength": 1.0}
    for name, entry in (("old", "a cat"), ("new", record)):
        train(config(base, images, tmp_path / name, optim={"steps": 1}, **previews([entry], steps=1)))
    assert contents(tmp_path / "old" / "samples") == contents(tmp_path / "new" / "samples")


def test_a_default_measurement_costs_under_a_tenth_of_a_default_run(base, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        background("red", 64).save(folder / f"{number}.png")
    settings = config(base, folder, tmp_path / "run", optim={"steps": 1}, **previews([]))
    default = TrainConfig(output_dir=tmp_path, data=settings.data)
    settings = settings.model_copy(update={"validation": default.validation})
    measured: dict[int, list[int]] = {}
    measure = Validation.measure

    def counted(validation: Validation, step: int, trainable) -> float:
        calls = measured[step] = []
        hook = trainable.denoiser.register_forward_hook(lambda module, given, _: calls.append(int(given[1])))
        loss = measure(validation, step, trainable)
        hook.remove()
        return loss

    monkeypatch.setattr(Validation, "measure", counted)
    train(settings)
    ladder = timestep_ladder(objective_of(load_pipeline(base), OptimConfig(), FlowConfig(), tokens=1), 4)
    assert measured == {0: ladder.tolist() * 6, 1: ladder.tolist() * 6}  # of 7 held-out pictures
    steps, every = default.optim.steps, default.validation.every
    measurements = 1 + sum(1 for step in range(1, steps + 1) if step % every == 0 or step == steps)
    a_step = 3 * default.optim.batch_size * default.optim.gradient_accumulation  # forward, and twice that backward
    assert measurements * 24 <= 0.1 * steps * a_step


def test_repeats_mean_what_they_meant(base, images, tmp_path, monkeypatch) -> None:
    """Every held-out picture, at timesteps drawn at random and not from the ladder."""
    settings = config(base, images, tmp_path / "run", optim={"steps": 1}, validation={"repeats": 3})
    seen: list[object] = []
    loss = Validation._loss
    monkeypatch.setattr(Validation, "_loss", lambda self, one: seen.append(one) or loss(self, one))
    train(settings)
    assert [(one.number, one.turn, one.rung) for one in seen] == [(0, turn, None) for turn in range(3)] * 2
