"""Drawing from a picture and inside a mask, with the adapters of the pipeline that was given."""

from dataclasses import replace

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.generation.generate import Canvas, GenerationSettings, StepReport, generate
from dora_diffusion.generation.samplers import SAMPLERS
from tests.families.pipelines import PIPELINES
from tests.pocket_random import random_adapter, random_pocket_pipeline

SMALL = GenerationSettings("a cat", seed=5, steps=4, guidance_scale=2.0, width=64, height=64, strength=0.5)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
LEFT = Image.new("L", PICTURE.size)
LEFT.paste(255, (0, 0, 60, 90))
NOISE_SAMPLERS = [name for name, sampler in SAMPLERS.items() if sampler.diffusion]


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return random_pocket_pipeline()


def _apart(one: Image.Image, other: Image.Image) -> np.ndarray:
    return np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int))


def test_strength_says_how_much_is_drawn_anew(pipe: StableDiffusionPipeline) -> None:
    reports: list[StepReport] = []
    half = generate(pipe, SMALL, canvas=Canvas(PICTURE), on_step=reports.append)
    assert [(report.step, report.total) for report in reports] == [(1, 2), (2, 2)]
    assert half.size == (64, 64)
    whole = generate(pipe, replace(SMALL, strength=1.0), canvas=Canvas(PICTURE))
    assert half.tobytes() != whole.tobytes()


def test_a_picture_is_cropped_about_its_middle() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    middle = np.asarray(Canvas(wide).fitted(64, 64).image)
    assert middle[..., 2].min() > 240 and middle[..., 0].max() < 15  # its edges are filtered with what lies beyond


@pytest.mark.parametrize("sampler", NOISE_SAMPLERS)
def test_what_is_outside_a_mask_stays(pipe: StableDiffusionPipeline, sampler: str) -> None:
    settings = replace(SMALL, sampler=sampler)
    canvas = Canvas(PICTURE, LEFT)
    drawn, kept = generate(pipe, settings, canvas=canvas), canvas.fitted(64, 64).image
    apart = _apart(drawn, kept)
    assert apart[:, 36:].max() == 0
    assert apart[:, :28].mean() > 5
    assert generate(pipe, settings, canvas=canvas).tobytes() == drawn.tobytes()


def test_the_latents_outside_follow_the_canvas(pipe: StableDiffusionPipeline) -> None:
    """Not only the pixels: what is drawn inside is drawn beside the canvas, so another canvas changes it."""
    other = Image.composite(PICTURE, PICTURE.transpose(Image.Transpose.FLIP_TOP_BOTTOM), LEFT)
    one = generate(pipe, replace(SMALL, strength=1.0), canvas=Canvas(PICTURE, LEFT))
    two = generate(pipe, replace(SMALL, strength=1.0), canvas=Canvas(other, LEFT))
    assert _apart(one, two)[:, :28].max() > 0


def test_adapters_schedules_and_masks_act_on_a_canvas(pipe: StableDiffusionPipeline) -> None:
    manager = AdapterManager(pipe)
    base = generate(pipe, SMALL, canvas=Canvas(PICTURE))
    manager.load_adapter(random_adapter(pipe, 1), name="ink")
    manager.set_adapters({"ink": {"unet": 1.0}})
    try:
        plain = generate(pipe, SMALL, canvas=Canvas(PICTURE))
        assert _apart(plain, base).max() > 5
        manager.set_schedule("ink", [(0.0, 0.0), (1.0, 0.0)])
        assert generate(pipe, SMALL, canvas=Canvas(PICTURE)).tobytes() == base.tobytes()
        manager.set_schedule("ink", None)
        manager.set_mask("ink", Image.new("L", (8, 8), 0))
        assert generate(pipe, SMALL, canvas=Canvas(PICTURE)).tobytes() == base.tobytes()
    finally:
        manager.unload()


@pytest.mark.parametrize("name", ["sd1", "sdxl", "flux-dev", "qwen-image", "z-image"])
def test_families_draw_inside_a_mask(name: str) -> None:
    pipe = PIPELINES[name].build()
    settings = replace(SMALL, guidance_scale=1.0)
    assert generate(pipe, settings, canvas=Canvas(PICTURE)).size == (64, 64)
    drawn = generate(pipe, settings, canvas=Canvas(PICTURE, LEFT))
    assert _apart(drawn, Canvas(PICTURE).fitted(64, 64).image)[:, 36:].max() == 0


def test_families_without_such_a_pipeline_say_so() -> None:
    for name in ("sana", "flux2-dev"):
        pipe = PIPELINES[name].build()
        with pytest.raises(
            ValueError, match=r"^canvas: diffusers cannot draw from a picture with .*; draw without it$"
        ):
            generate(pipe, replace(SMALL, guidance_scale=1.0), canvas=Canvas(PICTURE))


def test_no_step_left_is_an_error(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="^strength 0.1 of 4 steps leaves no step to draw; raise one of them$"):
        generate(pipe, replace(SMALL, strength=0.1), canvas=Canvas(PICTURE))
    with pytest.raises(ValueError, match="^strength must lie above 0 and up to 1, got 0$"):
        replace(SMALL, strength=0)
