"""Samplers by name: each draws, is what its diffusers class draws, and leaves the pipeline's own scheduler alone."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from dora_diffusion.generation.generate import GenerationSettings, GenerationStopped, StepReport, generate
from dora_diffusion.generation.samplers import DEFAULT, SAMPLERS, made_from, sampler_names, sampler_of_title, sampling
from tests.families.pipelines import PIPELINES
from tests.pocket_random import random_pocket_pipeline

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
