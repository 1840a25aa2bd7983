"""A flow is trained at the shift that its own pipeline draws with."""

import pytest
import torch

from dora_diffusion.families import family_of_pipeline, pixel_multiple
from tests.families.pipelines import PIPELINES
from tests.tolerances import assert_close

STEPS = 50
BY_SIZE = [name for name, tiny in PIPELINES.items() if tiny.family in ("flux", "flux2", "flux2-klein", "qwen-image")]


@pytest.mark.parametrize("name", [name for name in BY_SIZE if "schnell" not in name])
def test_the_training_shift_is_the_pipelines_own(name) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    assert pipe.scheduler.config.use_dynamic_shifting
    family = family_of_pipeline(pipe)
    pipe(prompt="a cat", num_inference_steps=STEPS, height=tiny.side, width=tiny.side, output_type="latent")
    shift = family.shift(pipe.scheduler, (tiny.side // pixel_multiple(pipe, family)) ** 2)
    plain = torch.linspace(1, 1 / STEPS, STEPS)
    expected = 1000 * shift * plain / (1 + (shift - 1) * plain)
    stretched = 1 - (1 - expected / 1000) * _stretch(pipe, expected)
    assert_close(pipe.scheduler.timesteps, 1000 * stretched)


def _stretch(pipe, timesteps: torch.Tensor) -> float:
    """Qwen-Image's scheduler stretches its timesteps to end at `shift_terminal`; no shift of one timestep does that."""
    terminal = pipe.scheduler.config.get("shift_terminal")
    return (1 - terminal) / (1 - timesteps[-1].item() / 1000) if terminal else 1.0
