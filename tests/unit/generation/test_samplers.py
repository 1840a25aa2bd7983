"""Samplers by name: each draws, is what its diffusers class draws, and leaves the pipeline's own scheduler alone."""

import inspect
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from dora_diffusion.generation.generate import GenerationSettings, GenerationStopped, StepReport, generate
from dora_diffusion.generation.samplers import (
    DEFAULT,
    SAMPLERS,
    check_steps,
    made_from,
    sampler_names,
    sampler_of_title,
    sampling,
)
from tests.families.pipelines import PIPELINES
from tests.pocket_random import random_pocket_pipeline
from tests.tolerances import assert_identical

FOR_NOISE = [name for name, sampler in SAMPLERS.items() if sampler.diffusion]
FOR_FLOWS = [name for name, sampler in SAMPLERS.items() if sampler.flow]
SMALL = GenerationSettings("a cat", seed=5, steps=3, guidance_scale=2.0, width=64, height=64)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return random_pocket_pipeline()


@pytest.mark.parametrize("name", FOR_NOISE)
def test_a_sampler_draws_what_its_class_draws(pipe: StableDiffusionPipeline, name: str) -> None:
    own, recipe = pipe.scheduler, SAMPLERS[name].diffusion
    picture = generate(pipe, replace(SMALL, sampler=name))
    assert pipe.scheduler is own
    try:
        pipe.scheduler = getattr(diffusers, recipe.scheduler).from_config(own.config, **recipe.changes)
        theirs = pipe(
            "a cat", num_inference_steps=3, guidance_scale=2.0, width=64, height=64,
            generator=torch.Generator().manual_seed(5),
        ).images[0]  # fmt: skip
    finally:
        pipe.scheduler = own
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(theirs))


def test_a_run_starts_from_a_scheduler_without_a_past(pipe: StableDiffusionPipeline) -> None:
    for name in ("default", "dpm++ 2m", "unipc"):
        first = generate(pipe, replace(SMALL, sampler=name))

        def stop(report: StepReport) -> None:
            if report.step == 2:
                raise GenerationStopped

        with pytest.raises(GenerationStopped):
            generate(pipe, replace(SMALL, sampler=name), on_step=stop)
        assert generate(pipe, replace(SMALL, sampler=name)).tobytes() == first.tobytes()


def test_the_own_scheduler_comes_back_after_an_error(pipe: StableDiffusionPipeline) -> None:
    own = pipe.scheduler
    with pytest.raises(RuntimeError, match="midway"), sampling(pipe, "euler"):
        assert pipe.scheduler is not own
        raise RuntimeError("midway")
    assert pipe.scheduler is own


@pytest.mark.parametrize("name", [*FOR_FLOWS, DEFAULT])
def test_a_flow_is_drawn_by_its_samplers(name: str) -> None:
    tiny = PIPELINES["flux-dev"]
    pipe = tiny.build()
    settings = GenerationSettings("a cat", steps=3, guidance_scale=1.0, width=64, height=64, sampler=name)
    assert generate(pipe, settings).tobytes() == generate(pipe, settings).tobytes()
    assert set(sampler_names(pipe)) == {DEFAULT, *FOR_FLOWS}


def test_a_sampler_for_noise_is_refused_for_a_flow() -> None:
    pipe = PIPELINES["flux-dev"].build()
    with pytest.raises(ValueError, match="^sampler 'ddim' does not suit a model that predicts a flow: expected one of"):
        made_from(pipe.scheduler, "ddim")


def test_the_models_own_config_counts(pipe: StableDiffusionPipeline) -> None:
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    for name in FOR_NOISE:
        assert made_from(pipe.scheduler, name).config.prediction_type == "v_prediction"


def test_unknown_names_are_refused(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="^sampler 'best' is unknown: expected one of default, euler,"):
        GenerationSettings("a cat", sampler="best")
    with pytest.raises(ValueError, match="^sampler 'best' is unknown"):
        made_from(pipe.scheduler, "best")


def test_titles_lead_back_to_names() -> None:
    assert {sampler_of_title(sampler.title.upper()) for sampler in SAMPLERS.values()} == set(SAMPLERS)
    assert sampler_of_title("Restart") is None


LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
# As the families' bases come with them, and further ones that people put in their place.
PUBLISHED = {
    "pocket": diffusers.DDIMScheduler(
        **LATENT, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "sd1": diffusers.PNDMScheduler(**LATENT, skip_prk_steps=True),
    "sd2": diffusers.DDIMScheduler(**LATENT, prediction_type="v_prediction"),
    "sdxl": diffusers.EulerDiscreteScheduler(**LATENT, timestep_spacing="leading"),
    "turbo": diffusers.EulerAncestralDiscreteScheduler(**LATENT, timestep_spacing="trailing"),
    "lcm": diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.012),
    "pixart": diffusers.DPMSolverMultistepScheduler(),
    "karras": diffusers.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True),
    "hunyuan": diffusers.DDPMScheduler(**{**LATENT, "beta_end": 0.03}, prediction_type="v_prediction"),
    "sana": diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "sd3": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flux": diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC),
}
ALL = [(base, name) for base, own in PUBLISHED.items() for name in SAMPLERS]


def suited(own: Any, name: str) -> bool:
    flow = own.config.get("prediction_type") == "flow_prediction" or "FlowMatch" in type(own).__name__
    return name == DEFAULT or name in (FOR_FLOWS if flow else FOR_NOISE)


def begin(scheduler: Any, steps: int) -> Sequence[torch.Tensor]:
    """As pipelines do: the timesteps of a run."""
    shift = {"mu": 0.8} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(steps, **shift)
    return scheduler.timesteps


def walk(scheduler: Any, timesteps: Sequence[torch.Tensor]) -> torch.Tensor:
    """The model's part is played by tanh."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 1, 1, 2, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    random = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for timestep in timesteps:
        seen = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        latents = scheduler.step(torch.tanh(seen), timestep, latents, return_dict=False, **random)[0]
    return latents


def start_midway(scheduler: Any, timesteps: Sequence[torch.Tensor], index: int) -> Sequence[torch.Tensor]:
    """What is left of a run that begins at a picture, as img2img says it."""
    first = max(0, index) // scheduler.order * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return timesteps[first:]


@pytest.mark.parametrize(("base", "name"), [pair for pair in ALL if suited(PUBLISHED[pair[0]], pair[1])])
def test_a_run_of_any_number_of_steps_begins_at_the_first_and_ends_at_the_last(base: str, name: str) -> None:
    scheduler = made_from(PUBLISHED[base], name)
    most = 50 if type(scheduler).__name__ == "LCMScheduler" else 62
    for steps in range(1, most + 1):
        timesteps = begin(scheduler, steps)
        assert min(timesteps) >= 0, steps  # "trailing" had a last one of -1 at 61
        assert len(timesteps) == steps or scheduler.order > 1 or isinstance(scheduler, diffusers.PNDMScheduler)
        walk(scheduler, timesteps[:1])
        assert getattr(scheduler, "step_index", 1) == 1, steps  # of several equal ones it was the second
        begin(scheduler, steps)
        last = walk(scheduler, start_midway(scheduler, timesteps, len(timesteps) - 2 * scheduler.order))
        assert last.isfinite().all(), steps
        assert getattr(scheduler, "step_index", len(timesteps)) == len(timesteps), steps


@pytest.mark.parametrize("base", ["pocket", "karras", "sd3"])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_whole_runs_and_runs_from_a_picture_end_well(base: str, share: float) -> None:
    own = PUBLISHED[base]
    for name in (name for name in SAMPLERS if suited(own, name)):
        scheduler = made_from(own, name)
        for steps in (1, 2, 3, 15, 22, 30, 47):
            timesteps = begin(scheduler, steps)
            whole = timesteps if share == 0 else start_midway(scheduler, timesteps, int(len(timesteps) * share))
            assert walk(scheduler, whole).isfinite().all(), (name, steps)
            assert getattr(scheduler, "step_index", len(timesteps)) == len(timesteps), (name, steps)


@pytest.mark.parametrize("steps", [24, 47])
def test_equal_timesteps_are_walked_as_if_the_run_named_its_beginning(steps: int) -> None:
    own = PUBLISHED["pocket"]
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(own.config, use_karras_sigmas=True)
    timesteps = begin(theirs, steps)
    assert timesteps[0] == timesteps[1]
    theirs.set_begin_index(0)
    ours = deepcopy(made_from(own, "dpm++ 2m karras"))
    assert_identical(walk(ours, begin(ours, steps)), walk(theirs, timesteps))


def test_more_steps_than_a_sampler_has_are_refused_in_one_line(pipe: StableDiffusionPipeline) -> None:
    own = pipe.scheduler
    said = r"^steps must lie in 1..50 with sampler 'lcm' \(LCMScheduler\) of this model, got 51; lower them, or take"
    with pytest.raises(ValueError, match=said):
        generate(pipe, replace(SMALL, sampler="lcm", steps=51))
    assert pipe.scheduler is own
    with pytest.raises(ValueError, match="^steps must lie in 1..50 with sampler 'default'"):
        check_steps(made_from(PUBLISHED["lcm"], DEFAULT), DEFAULT, 51)


@pytest.mark.parametrize("base", ["pocket", "sd1", "sdxl", "pixart"])
def test_the_most_steps_that_are_allowed_can_be_drawn(base: str) -> None:
    for name in (DEFAULT, *FOR_NOISE):
        scheduler = made_from(PUBLISHED[base], name)
        with pytest.raises(ValueError, match="^steps must lie in 1..") as refusal:
            check_steps(scheduler, name, 1001)
        most = int(str(refusal.value).split("..")[1].split(" ")[0])
        check_steps(scheduler, name, most)
        timesteps = begin(scheduler, most)
        assert min(timesteps) >= 0 and max(timesteps) < 1000, name
        assert walk(scheduler, timesteps[:2]).isfinite().all(), name
        begin(scheduler, most)
        last = start_midway(scheduler, timesteps, len(timesteps) - 2 * scheduler.order)
        assert walk(scheduler, last).isfinite().all(), name
