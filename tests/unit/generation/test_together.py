"""Pictures drawn in one pass are those that are drawn one by one, in every family."""

from dataclasses import replace

import numpy as np
import pytest

from dora_diffusion.families import family_of_pipeline, pixel_multiple
from dora_diffusion.generation.generate import GenerationSettings, generate, generate_together
from tests.families.pipelines import PIPELINES
from tests.pocket_random import random_pocket_pipeline


@pytest.mark.parametrize("kind", list(PIPELINES))
def test_pictures_drawn_together_are_those_drawn_alone(kind: str) -> None:
    pipe = PIPELINES[kind].build()
    side = 64 * max(1, pixel_multiple(pipe, family_of_pipeline(pipe)) // 64)
    first = GenerationSettings("a red cat", seed=3, steps=2, guidance_scale=2.0, width=side, height=side)
    settings = [first, replace(first, prompt="a dog on the beach at night", seed=4)]
    slicing = getattr(pipe.vae, "use_slicing", None)
    together = [np.asarray(picture, dtype=int) for picture in generate_together(pipe, settings)]
    alone = [np.asarray(generate(pipe, one), dtype=int) for one in settings]
    assert getattr(pipe.vae, "use_slicing", None) == slicing
    assert np.abs(alone[0] - alone[1]).max() > 2
    for got, expected in zip(together, alone, strict=True):
        assert np.abs(got - expected).max() <= 2, kind


def test_weighed_words_are_drawn_one_by_one_and_other_differences_are_refused() -> None:
    pipe = random_pocket_pipeline()
    first = GenerationSettings("a (red:1.3) cat", steps=1, width=64, height=64)
    settings = [first, replace(first, prompt="a dog", seed=1)]
    for got, one in zip(generate_together(pipe, settings), settings, strict=True):
        assert np.array_equal(np.asarray(got), np.asarray(generate(pipe, one)))
    with pytest.raises(ValueError, match="differ in more than prompt and seed"):
        generate_together(pipe, [first, replace(first, steps=2)])
