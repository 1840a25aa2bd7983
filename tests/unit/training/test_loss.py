"""Section `loss`: which objective it makes of a base, what a step draws for it, and what is measured without it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)

from dora_diffusion.functional.objectives import (
    DiffusionObjective,
    FlowObjective,
    Huber,
    NoiseChanges,
    TimestepDistribution,
)
from dora_diffusion.generation.samplers import made_from
from dora_diffusion.pretrain.scenes import background
from dora_diffusion.training.base.trainable import prepare_trainable
from dora_diffusion.training.config import FlowConfig, LossConfig, OptimConfig, TrainConfig
from dora_diffusion.training.data.batches import Batch, BatchSource
from dora_diffusion.training.data.concepts import Split
from dora_diffusion.training.data.examples import Example
from dora_diffusion.training.run.card import Left, run_card
from dora_diffusion.training.run.checkpoint import resumable_part
from dora_diffusion.training.run.dry_run import describe_plan
from dora_diffusion.training.run.resumption import _defaults, _differences, _filled
from dora_diffusion.training.run.validation import Validation
from dora_diffusion.training.step.guard import Guard
from dora_diffusion.training.step.objective import Objectives, objective_of, with_zero_terminal_snr
from dora_diffusion.training.step.optimisers import build_optimizer
from dora_diffusion.training.step.priors import _base_digest
from dora_diffusion.training.step.training_step import TrainingStep
from tests.families.pipelines import PIPELINES
from tests.pocket_random import random_pocket_pipeline
from tests.tolerances import assert_close, assert_identical

ALL_OF_IT: dict[str, Any] = {
    "kind": "huber",
    "huber_c": 0.2,
    "huber_schedule": "exponential",
    "weighting": "none",
    "noise_offset": 0.1,
    "noise_offset_random": True,
    "input_perturbation": 0.05,
    "timesteps": {"min": 100, "max": 900, "density": "beta", "alpha": 2.0, "beta": 3.0, "bias": 1.5},
}
V_SCHEDULERS = [
    kind.from_config({"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", **more})
    for kind, more in (
        (DDIMScheduler, {}),
        (DDPMScheduler, {}),
        (EulerDiscreteScheduler, {}),
        (DPMSolverMultistepScheduler, {}),
        (PNDMScheduler, {"skip_prk_steps": True}),
        (DDIMScheduler, {"rescale_betas_zero_snr": True}),
    )
]


def loss_of(**fields: Any) -> LossConfig:
    return LossConfig.model_validate(fields)


def made(name: str, loss: LossConfig, *, flow: dict[str, Any] | None = None, gamma: float | None = 5.0) -> Any:
    """The objective of a tiny pipeline."""
    flows, optim = FlowConfig.model_validate(flow or {}), OptimConfig(min_snr_gamma=gamma)
    return objective_of(PIPELINES[name].build(), optim, flows, loss, tokens=16)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("red", "blue"):
        background(name, 32).save(tmp_path / f"{name}.png")
    return tmp_path


def config_of(images: Path, **sections: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "output_dir": images / "run",
            "data": {"instance_dir": images, "instance_prompt": "a cat", "resolution": 32},
            "adapter": {"rank": 2},
            "optim": {"batch_size": 2},
            **sections,
        }
    )


# The objective


def test_an_epsilon_predicting_base_is_trained_as_the_section_says() -> None:
    found = made("sdxl", loss_of(**ALL_OF_IT))
    assert found.distribution == TimestepDistribution("beta", alpha=2.0, beta=3.0, bias=1.5, lowest=100, highest=900)
    assert found.noise == NoiseChanges(0.1, has_random_offset=True, perturbation=0.05)
    assert found.huber == Huber(0.2, "exponential") and (found.prediction, found.weighting) == ("epsilon", "none")
    assert isinstance(found, DiffusionObjective)


def test_a_flow_is_trained_as_the_section_says_with_its_own_shift_and_weights() -> None:
    found = made("sd3", loss_of(**ALL_OF_IT), flow={"shift": 2.0, "weighting": "cosmap"})
    same = made("sdxl", loss_of(**ALL_OF_IT))
    assert (found.distribution, found.noise, found.huber) == (same.distribution, same.noise, same.huber)
    assert (found.shift, found.weighting) == (2.0, "cosmap") and isinstance(found, FlowObjective)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_without_a_word_it_is_what_it_was(name: str) -> None:
    found = made(name, LossConfig())
    density = "uniform" if name == "sdxl" else "logit_normal"
    assert (found.distribution, found.noise, found.huber) == (TimestepDistribution(density), NoiseChanges(), None)
    assert found.weighting == ("min_snr" if name == "sdxl" else "none")


def test_a_flows_older_keys_say_its_density_and_the_section_its_range() -> None:
    older = {"density": "logit_normal", "logit_mean": 0.5, "logit_std": 2.0}
    found = made("sd3", loss_of(timesteps={"min": 10, "bias": 2.0}), flow=older)
    newer = made("sd3", loss_of(timesteps={"min": 10, "bias": 2.0, "density": "logit_normal", "mean": 0.5, "std": 2.0}))
    assert found.distribution == newer.distribution
    assert newer.distribution == TimestepDistribution("logit_normal", mean=0.5, std=2.0, bias=2.0, lowest=10)
    assert made("sd3", LossConfig(), flow={"density": "mode", "mode_scale": 0.5}).distribution == TimestepDistribution(
        "mode", mode_scale=0.5
    )


@pytest.mark.parametrize(
    ("weighting", "gamma", "expected"),
    [
        ("min_snr", 5.0, ("min_snr", 5.0)),
        ("min_snr", None, ("none", 0.0)),
        ("none", 5.0, ("none", 5.0)),
        ("debiased", None, ("debiased", 0.0)),
    ],
)
def test_gamma_is_min_snrs_alone(weighting: str, gamma: float | None, expected: tuple[str, float]) -> None:
    found = made("sdxl", loss_of(weighting=weighting), gamma=gamma)
    assert (found.weighting, found.min_snr_gamma) == expected


@pytest.mark.parametrize(
    ("name", "loss", "message"),
    [
        ("sdxl", {"zero_terminal_snr": True}, "loss.zero_terminal_snr: got true for a base that predicts epsilon"),
        ("sd3", {"zero_terminal_snr": True}, "loss.zero_terminal_snr: got true for a base of flow matching"),
        ("sd3", {"weighting": "debiased"}, "loss.weighting: got 'debiased' for a base of flow matching"),
    ],
)
def test_what_does_not_suit_a_base_is_refused_in_a_line(name: str, loss: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        made(name, loss_of(**loss))
    assert "\n" not in str(caught.value) and "; expected " in str(caught.value)


def test_the_plan_of_a_run_refuses_it_too(images: Path) -> None:
    config = config_of(images, model="pocket-dit", loss={"zero_terminal_snr": True})
    with pytest.raises(ValueError, match="loss.zero_terminal_snr: got true for a base of flow matching"):
        describe_plan(config)


# Zero terminal SNR


@pytest.mark.parametrize("scheduler", V_SCHEDULERS, ids=lambda one: type(one).__name__)
def test_zero_terminal_snr_is_trained_and_drawn_by_one_schedule(scheduler: Any) -> None:
    pipe = random_pocket_pipeline()
    pipe.scheduler = scheduler
    loss = loss_of(zero_terminal_snr=True)
    before = objective_of(pipe, OptimConfig(), FlowConfig(), loss, tokens=16)
    pipe.scheduler = with_zero_terminal_snr(scheduler)
    trained = objective_of(pipe, OptimConfig(), FlowConfig(), loss, tokens=16)
    assert_identical(trained.alphas_cumprod, before.alphas_cumprod)
    expected = DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True).alphas_cumprod
    assert_identical(trained.alphas_cumprod, expected)
    drawing = made_from(pipe.scheduler, "default")
    drawing.set_timesteps(4)
    assert drawing.config.prediction_type == "v_prediction"
    assert int(drawing.timesteps[0]) == 999  # pure noise comes first
    assert_close(drawing.alphas_cumprod, expected)  # Euler and DPM++ end just above 0, for their own sigmas
    again = with_zero_terminal_snr(pipe.scheduler)
    assert type(again) is type(pipe.scheduler) and dict(again.config) == dict(pipe.scheduler.config)


def test_a_scheduler_keeps_its_class_where_that_can_be_rescaled() -> None:
    kinds = [type(with_zero_terminal_snr(scheduler)) for scheduler in V_SCHEDULERS]
    expected = [type(scheduler) for scheduler in V_SCHEDULERS]
    assert kinds == [DDIMScheduler if kind is PNDMScheduler else kind for kind in expected]


def test_class_pictures_of_another_schedule_are_others() -> None:
    pipe = random_pocket_pipeline()
    pipe.scheduler = V_SCHEDULERS[0]
    before = _base_digest(pipe)
    pipe.scheduler = with_zero_terminal_snr(pipe.scheduler)
    assert _base_digest(pipe) != before


# A step, and what is measured


def test_a_step_is_what_the_section_says_from_one_generator(images: Path) -> None:
    """Re-stated number by number: kohya's noise, a beta density, the authors' exponential Huber, on v."""
    config = config_of(images, loss=ALL_OF_IT)
    pipe = random_pocket_pipeline()
    examples = [Example(images / f"{name}.png", "a cat", size=(32, 32)) for name in ("red", "blue")]
    trainable = prepare_trainable(pipe, config)
    source = BatchSource(trainable, config, instances=examples, classes=[])
    objectives = Objectives(pipe, config.optim, config.flow, config.loss)
    optimizer = build_optimizer(trainable, config.optim, config.words)
    AcceleratorState._reset_state()
    step = TrainingStep(
        config.optim,
        Accelerator(cpu=True),
        trainable,
        objectives.of,
        batches_at=source.batches_at,
        optimizer=optimizer,
        guard=Guard(config.guard, trainable.named_tensors(), optimizer),
    )
    (batch,) = source.batches_at(0)
    got = step.loss(batch, seed=5)

    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(batch.latents.shape, generator=generator)
    u = np.random.default_rng(int(torch.randint(2**63 - 1, (1,), generator=generator))).beta(2.0, 3.0, 2)
    timesteps = torch.from_numpy(100 + 800 * 1.5 * u / (1 + 0.5 * u)).long()
    offset = torch.randn(2, noise.shape[1], 1, 1, generator=generator)
    noise = noise + 0.1 * torch.rand(2, 1, 1, 1, generator=generator) * offset
    given = noise + 0.05 * torch.randn(noise.shape, generator=generator)
    scheduler = pipe.scheduler
    goal = scheduler.get_velocity(batch.latents, noise, timesteps)
    predicted = trainable.family.predict(
        pipe.unet,
        scheduler.add_noise(batch.latents, given, timesteps),
        timesteps,
        batch.conditioning,
        batch.frames,
    )
    c = (0.2 ** (timesteps / 1000)).reshape(2, 1, 1, 1)
    assert_close(got, (2 * c * (((predicted - goal) ** 2 + c**2).sqrt() - c)).mean())
    assert_identical(step.loss(batch, seed=5), got)
    assert step.loss(batch, seed=6) != got


class Seen:
    """Stands for a training step: keeps the objectives that it is asked to measure by."""

    def __init__(self) -> None:
        self.objectives: list[Any] = []

    def loss(self, batch: Batch, *, seed: int, objective: Any, rung: object) -> torch.Tensor:
        self.objectives.append(objective)
        return torch.zeros(())


@pytest.mark.parametrize("name", ["pocket", "sd3"])
def test_validation_is_measured_alike_whatever_is_trained_by(images: Path, name: str) -> None:
    pipe = random_pocket_pipeline() if name == "pocket" else PIPELINES[name].build()
    example = Example(images / "red.png", "a cat", size=(32, 32))
    measured = []
    for loss in ({}, ALL_OF_IT):
        config = config_of(images, loss=loss)
        objectives = Objectives(pipe, config.optim, config.flow, config.loss)
        trainable = prepare_trainable(pipe, config)
        source = BatchSource(trainable, config, instances=[example], classes=[])
        seen: Any = Seen()
        Validation(
            config.validation, seen, source, Split([example], [], ()), objective_of=objectives.measuring
        ).measure(0, trainable)
        trainable.eject()
        assert (objectives.of((32, 32)) is objectives.measuring((32, 32))) is (not loss)
        measured.append(seen.objectives[0])
    first, second = (replace(one, alphas_cumprod=None) if name == "pocket" else one for one in measured)
    assert first == second and first.huber is None and first.noise == NoiseChanges()


def test_validation_keeps_the_schedule_that_is_drawn_with(images: Path) -> None:
    pipe = random_pocket_pipeline()
    pipe.scheduler = V_SCHEDULERS[1]
    objectives = Objectives(pipe, OptimConfig(), FlowConfig(), loss_of(zero_terminal_snr=True, kind="huber"))
    measuring = objectives.measuring((32, 32))
    assert isinstance(measuring, DiffusionObjective) and measuring.huber is None
    assert measuring.alphas_cumprod[-1].item() == 0.0


def test_the_card_says_how_to_draw_what_goes_down_to_pure_noise(images: Path) -> None:
    assert "rescale_betas_zero_snr=True" in run_card(config_of(images, loss={"zero_terminal_snr": True}), Left())
    assert "rescale" not in run_card(config_of(images), Left())


# Older files and checkpoints


def test_settings_of_a_checkpoint_from_before_the_section_are_those_of_its_defaults(images: Path) -> None:
    now = resumable_part(config_of(images))
    older = {name: part for name, part in now.items() if name != "loss"}
    assert list(_differences(_filled(older, now, _defaults()), now)) == []
    changed = resumable_part(config_of(images, loss={"kind": "huber", "timesteps": {"max": 500}}))
    assert [key for key, _ in _differences(_filled(older, changed, _defaults()), changed)] == [
        "loss.kind",
        "loss.timesteps.max",
    ]


@pytest.mark.parametrize(
    "older",
    [
        "optim: {min_snr_gamma: 1}\n",
        "optim: {min_snr_gamma: null}\n",
        "flow: {density: mode, mode_scale: 0.5, shift: 3}\n",
        "flow: {density: logit_normal, logit_mean: 0.5, logit_std: 2, weighting: cosmap}\n",
    ],
)
def test_older_files_are_read_and_written_again(images: Path, older: str) -> None:
    (images / "run.yaml").write_text(f"output_dir: run\ndata: {{instance_dir: .}}\n{older}")
    config = TrainConfig.from_yaml(images / "run.yaml")
    assert config.loss == LossConfig()
    (images / "again.yaml").write_text(config.to_yaml())
    assert TrainConfig.from_yaml(images / "again.yaml") == config
