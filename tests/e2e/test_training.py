"""Training runs on the pocket's architecture with random weights: the run folder, and resuming bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dora_diffusion.formats import save_adapter
from dora_diffusion.generation.generate import GenerationSettings, generate
from dora_diffusion.pipelines.loading import load_pipeline
from dora_diffusion.pipelines.textual_inversion import add_words, install_words, load_word
from dora_diffusion.training.base.devices import with_precision
from dora_diffusion.training.base.trainable import load_base, prepare_trainable
from dora_diffusion.training.config import FlowConfig, LossConfig, OptimConfig, TrainConfig
from dora_diffusion.training.run import checkpoint, previews
from dora_diffusion.training.run.finish import TrainResult
from dora_diffusion.training.run.train import train
from dora_diffusion.training.run.watchers import Watchers
from dora_diffusion.training.step import objective, priors, training_step
from dora_diffusion.training.step.objective import objective_of
from tests.failing_disk import contents
from tests.pocket_random import random_pocket_pipeline
from tests.tolerances import assert_identical


def config(base: Path, images: Path, output: Path, **optim) -> TrainConfig:
    settings = {
        "steps": 6,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "gradient_accumulation": 2,
        "lr_scheduler": "cosine",
        **optim,
    }
    return TrainConfig.model_validate(
        {
            "model": str(base),
            "output_dir": output,
            "data": {
                "instance_dir": images,
                "instance_prompt": "a zqx cat",
                "resolution": 32,
                "caption_dropout": 0.2,
                "flip": True,
            },
            "adapter": {"rank": 2, "dropout": 0.1, "train_text_encoder": True},
            "optim": settings,
            "validation": {"every": 0, "repeats": 1},
            "checkpoint": {"every": 3, "keep": 5},
        }
    )


@pytest.fixture(scope="module")
def whole(base, images, tmp_path_factory) -> TrainResult:
    """A run of `config` that went through; read only."""
    return train(config(base, images, tmp_path_factory.mktemp("runs") / "whole"))


def cut_short(run: Path) -> None:
    """Break the newest checkpoint of a run of six steps: the one before is taken."""
    for late in (run / "checkpoints").glob("step-*6"):
        (late / "parameters.safetensors").write_bytes(b"cut short")


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(base, images, whole, tmp_path) -> None:
    stopped = config(base, images, tmp_path / "stopped")
    train(stopped)  # a run of its own, which equals the other without having seen it
    cut_short(tmp_path / "stopped")
    resumed = train(stopped, resume="latest")
    assert_identical(load_file(resumed.adapter), load_file(whole.adapter))
    newest = "checkpoints/step-00000006/optimizer.safetensors"
    assert_identical(load_file(tmp_path / "stopped" / newest), load_file(whole.adapter.parent / newest))


LOSS = {
    "kind": "huber",
    "huber_schedule": "snr",
    "weighting": "debiased",
    "noise_offset": 0.1,
    "noise_offset_random": True,
    "input_perturbation": 0.1,
    "zero_terminal_snr": True,
    "timesteps": {"min": 50, "max": 950, "density": "beta", "alpha": 2.0, "beta": 1.5, "bias": 1.2},
}


def test_a_run_with_every_option_of_loss_and_noise_resumes_bit_for_bit(base, images, whole, tmp_path) -> None:
    def with_loss(output: Path) -> TrainConfig:
        return TrainConfig.model_validate({**config(base, images, output).model_dump(), "loss": LOSS})

    through = train(with_loss(tmp_path / "through"))
    stopped = with_loss(tmp_path / "stopped")
    train(stopped)
    cut_short(tmp_path / "stopped")
    changed = stopped.model_copy(update={"loss": stopped.loss.model_copy(update={"noise_offset": 0.2})})
    with pytest.raises(ValueError, match="loss.noise_offset was 0.1 and is now 0.2"):
        train(changed, resume="latest")
    resumed = train(stopped, resume="latest")
    assert_identical(load_file(resumed.adapter), load_file(through.adapter))
    assert resumed.validation == through.validation
    other = load_file(whole.adapter)
    assert not any(
        torch.equal(tensor, other[key]) for key, tensor in load_file(through.adapter).items() if "lora" in key
    )
    # measured alike: the pocket's own schedule ends in pure noise as it is
    assert through.validation[0] == whole.validation[0]


def test_zero_terminal_snr_draws_class_pictures_and_previews_by_the_schedule_that_it_trains(
    images, tmp_path, monkeypatch
) -> None:
    pipe, drawn = random_pocket_pipeline(), []
    changes = {"rescale_betas_zero_snr": False, "timestep_spacing": "leading"}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    pipe.save_pretrained(tmp_path / "base")

    def spied(draw):
        def drawing(pipe, settings):
            drawn.append(dict(pipe.scheduler.config))
            return draw(pipe, settings)

        return drawing

    monkeypatch.setattr(priors, "generate_together", spied(priors.generate_together))
    monkeypatch.setattr(previews, "generate", spied(previews.generate))
    fields = config(tmp_path / "base", images, tmp_path / "run", steps=1).model_dump()
    fields["prior"] = {"class_prompt": "a cat", "class_images": 1}
    fields["preview"] = {"steps": 1, "prompts": ["a zqx cat"]}
    fields["loss"] = {"zero_terminal_snr": True, "weighting": "none"}
    train(TrainConfig.model_validate(fields))
    assert len(drawn) == 3  # a class picture, a preview before and one after
    assert {(one["rescale_betas_zero_snr"], one["timestep_spacing"]) for one in drawn} == {(True, "trailing")}
    assert "rescale_betas_zero_snr=True" in (tmp_path / "run" / "README.md").read_text()


def test_a_signal_leaves_a_checkpoint_of_the_step_under_way(base, images, whole, tmp_path, monkeypatch) -> None:
    settings = config(base, images, tmp_path / "stopped")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_step, "weighted_mean", _signalling(training_step.weighted_mean))
        train(settings)
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["step-00000001"]
    resumed = train(settings, resume="latest")
    assert_identical(load_file(resumed.adapter), load_file(whole.adapter))


def test_a_stop_does_not_wait_for_previews(base, images, tmp_path, monkeypatch) -> None:
    watched: list[int] = []
    monkeypatch.setattr(Watchers, "watch", lambda watchers, step: watched.append(step))
    monkeypatch.setattr(training_step, "weighted_mean", _signalling(training_step.weighted_mean))
    with pytest.raises(KeyboardInterrupt):
        train(config(base, images, tmp_path / "run"))
    assert watched == [0]
    assert (tmp_path / "run" / "checkpoints" / "step-00000001").is_dir()


def test_a_signal_in_the_last_step_does_not_keep_the_run_from_its_files(base, images, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(training_step, "weighted_mean", _signalling(training_step.weighted_mean))
    assert train(config(base, images, tmp_path / "run", steps=1)).adapter.is_file()


def _signalling(loss):
    """SIGTERM in the first step, once; the validation before it is none."""
    steps = []

    def measure(*tensors):
        if torch.is_grad_enabled() and not steps:
            steps.append(1)
            signal.raise_signal(signal.SIGTERM)
        return loss(*tensors)

    return measure


def start_of(settings: TrainConfig, folder: Path) -> dict[str, Tensor]:
    """The file that the adapter would be before its first step."""
    trainable = prepare_trainable(load_base(settings.model, torch.float32), settings)
    return load_file(save_adapter(trainable.adapter({}), folder / "start.safetensors"))


def test_every_parameter_moves_and_the_run_folder_is_whole(base, images, whole, tmp_path) -> None:
    run, tensors = whole.adapter.parent, load_file(whole.adapter)
    assert any(key.startswith("unet.") for key in tensors)
    assert any(key.startswith("text_encoder.text_model.") for key in tensors)
    begun = start_of(config(base, images, run), tmp_path)
    assert [key for key, tensor in tensors.items() if torch.equal(tensor, begun[key])] == []
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "adapter.safetensors", "checkpoints", "logs", "README.md", "validation.json"} <= names
    assert TrainConfig.from_yaml(run / "config.yaml") == with_precision(config(base, images, run), torch.device("cpu"))


def test_two_processes_equal_one_that_accumulates(base, images, tmp_path) -> None:
    settings = config(base, images, tmp_path / "one", steps=2)
    one = load_file(train(settings).adapter)  # accumulates 2: its micro-batches are those of the two processes
    fields = settings.model_dump()
    fields |= {"output_dir": tmp_path / "two", "optim": {**fields["optim"], "gradient_accumulation": 1}}
    (tmp_path / "two.yaml").write_text(TrainConfig.model_validate(fields).to_yaml())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = ["train_scripts/train_dreambooth_dora.py", "--config", str(tmp_path / "two.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launch, *script], capture_output=True, text=True, env=environment, timeout=1000)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("wrote ") == 2  # both ran, and to the end
    two = load_file(tmp_path / "two" / "adapter.safetensors")
    begun = start_of(settings, tmp_path)
    moved = sum(float((one[key] - begun[key]).square().sum()) for key in one)
    apart = sum(float((one[key] - two[key]).square().sum()) for key in one)
    assert apart < 1e-4 * moved  # 1 % of the way; Adam makes signs of rounding errors where a gradient is nearly 0


def test_gradient_checkpointing_trains_the_same_weights(base, images, tmp_path) -> None:
    plain = train(config(base, images, tmp_path / "plain", steps=2))
    saved = train(config(base, images, tmp_path / "saved", steps=2, gradient_checkpointing=True))
    torch.testing.assert_close(load_file(saved.adapter), load_file(plain.adapter), rtol=1e-4, atol=1e-6)


def test_bf16_base_trains_fp32_adapters(base, images, tmp_path) -> None:
    result = train(config(base, images, tmp_path / "bf16", steps=2, mixed_precision="bf16"))
    assert {tensor.dtype for tensor in load_file(result.adapter).values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in load_file(result.adapter).values())


def test_prior_preservation_draws_class_images_once(base, images, tmp_path) -> None:
    settings = config(base, images, tmp_path / "prior", steps=1)
    prior = {"class_prompts": ["a red cat", "a blue cat"], "class_images": 3}
    preview = {"steps": 1, "prompts": ["a zqx cat on the beach"]}
    settings = TrainConfig.model_validate({**settings.model_dump(), "prior": prior, "preview": preview})
    train(settings)
    drawn = sorted((tmp_path / "prior" / "class").glob("*.png"))
    captions = [path.with_suffix(".txt").read_text() for path in drawn]
    assert captions == ["a red cat", "a blue cat", "a red cat"]
    assert (tmp_path / "prior" / "samples" / "strip.png").is_file()


def test_resuming_with_other_settings_names_the_difference(base, images, tmp_path) -> None:
    train(config(base, images, tmp_path / "run", steps=1))
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        train(config(base, images, tmp_path / "run", steps=1))
    with pytest.raises(ValueError, match="optim.learning_rate was 0.001 and is now 0.5"):
        train(config(base, images, tmp_path / "run", steps=1, learning_rate=0.5), resume="latest")


def test_a_run_makes_its_objective_once(base, images, tmp_path, monkeypatch) -> None:
    made: list[int] = []

    def counted(pipe: object, optim: OptimConfig, flow: FlowConfig, loss: LossConfig, *, tokens: int) -> object:
        made.append(tokens)
        return objective_of(pipe, optim, flow, loss, tokens=tokens)

    monkeypatch.setattr(objective, "objective_of", counted)
    train(config(base, images, tmp_path / "run", steps=1))
    assert made == [16]  # 32 pixels, 8 a token


def test_checkpoints_that_a_killed_save_had_set_aside_are_not_written_over(base, images, tmp_path) -> None:
    settings = config(base, images, tmp_path / "run", steps=1)
    train(settings)
    folder = tmp_path / "run" / "checkpoints"
    before = contents(folder)
    aside = folder / ".step-00000001.01234567.staging"
    (aside / "new" / "step-00000001").mkdir(parents=True)
    (aside / "old").mkdir()
    (folder / "step-00000001").rename(aside / "old" / "step-00000001")
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        train(settings)
    assert contents(folder) == before


def test_no_whole_checkpoint_is_said_and_not_overwritten(base, images, tmp_path) -> None:
    settings = config(base, images, tmp_path / "run", steps=1)
    train(settings)
    for file in (tmp_path / "run" / "checkpoints").glob("step-*/parameters.safetensors"):
        file.write_bytes(b"cut short")
    with pytest.raises(ValueError, match="none of its 1 checkpoints is whole"):
        train(settings, resume="latest")


def test_resuming_keeps_the_validation_curve(base, images, tmp_path) -> None:
    settings = config(base, images, tmp_path / "run", steps=4)
    whole = train(settings)
    (tmp_path / "run" / "checkpoints" / "step-00000004" / "manifest.json").unlink()
    assert train(settings, resume="latest").validation == whole.validation
    assert [step for step, _ in whole.validation] == [0, 4]


def test_diverged_loss_stops_the_run_and_names_the_images(base, images, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"step \d+: the (loss|gradient) is (nan|inf) on .*\.png"):
        train(config(base, images, tmp_path / "run", steps=40, learning_rate=1e18, max_grad_norm=0))


def with_words(base: Path, images: Path, output: Path, **sections) -> TrainConfig:
    settings = config(base, images, output).model_dump()
    settings["words"] = {"starts": {"zqx": "cat"}, "vectors": 2, "share": 0.5}
    return TrainConfig.model_validate(settings | sections)


def test_words_beside_an_adapter_resume_bit_for_bit_and_stand_still_after_their_share(base, images, tmp_path) -> None:
    whole = train(with_words(base, images, tmp_path / "whole"))
    stopped = with_words(base, images, tmp_path / "stopped")
    train(stopped)
    cut_short(tmp_path / "stopped")
    resumed = train(stopped, resume="latest")
    assert [path.name for path in whole.words] == ["zqx.safetensors"]
    assert_identical(load_file(resumed.words[0]), load_file(whole.words[0]))
    assert_identical(load_file(resumed.adapter), load_file(whole.adapter))
    files = [tmp_path / "whole" / "checkpoints" / f"step-{step:08d}" / "parameters.safetensors" for step in (3, 6)]
    half, end = (load_file(file)["words.text_encoder.vectors"] for file in files)
    assert_identical(end, half)  # of six steps the first three move them
    (saved,) = load_file(whole.words[0]).values()
    assert_identical(saved, end)
    start = add_words(random_pocket_pipeline(), {"zqx": "cat"}, vectors=2).state()[0].vectors[0]
    assert not torch.equal(start, half)


def test_words_alone_leave_no_adapter_and_draw(base, images, tmp_path) -> None:
    alone = config(base, images, tmp_path / "run").adapter.model_copy(
        update={"train_unet": False, "train_text_encoder": False}
    )
    result = train(with_words(base, images, tmp_path / "run", adapter=alone.model_dump()))
    assert result.adapter is None and not (tmp_path / "run" / "adapter.safetensors").exists()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "--words words/zqx.safetensors" in card and "adapter.safetensors" not in card
    pipe = load_pipeline(base)
    before = draw(pipe, "a zqx cat")
    learnt = install_words(pipe, [load_word(path) for path in result.words])
    assert not np.array_equal(draw(pipe, "a zqx cat"), before)
    learnt.remove()
    assert np.array_equal(draw(pipe, "a zqx cat"), before)


def draw(pipe, prompt: str) -> np.ndarray:
    return np.asarray(generate(pipe, GenerationSettings(prompt, steps=2, width=64, height=64)))


def test_a_word_that_no_caption_holds_is_refused_before_anything_is_loaded(base, images, tmp_path) -> None:
    settings = with_words(base, images, tmp_path / "run", words={"starts": {"<other>": "cat"}})
    with pytest.raises(ValueError, match="words.starts: '<other>' stands in none of the 3 captions"):
        train(settings)


def test_a_checkpoint_from_before_a_section_was_added_is_resumed(base, images, tmp_path, monkeypatch) -> None:
    settings = config(base, images, tmp_path / "run")

    def as_it_was(given: TrainConfig) -> dict[str, object]:
        parts = now(given)
        del parts["flow"], parts["loss"], parts["words"], parts["optim"]["words_learning_rate"]
        return parts

    now = checkpoint.resumable_part
    with monkeypatch.context() as before:
        before.setattr(checkpoint, "resumable_part", as_it_was)
        train(settings)
    assert train(settings, resume="latest").steps == 6
    changed = settings.model_copy(update={"flow": settings.flow.model_copy(update={"shift": 3.0})})
    with pytest.raises(ValueError, match="flow.shift was None and is now 3.0"):
        train(changed, resume="latest")
