"""Noising, targets and weights against diffusers' schedulers and its SNR."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr

from dora_diffusion.objectives import add_noise, min_snr_weights, target, weighted_squared_error
from tests.tolerances import assert_close

STEPS = torch.tensor([0, 1, 250, 700, 998])


def latents_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 4, 8, 8, generator=generator), torch.randn(5, 4, 8, 8, generator=generator)


@pytest.mark.parametrize("zero_snr", [True, False])
def test_noising_and_v_equal_diffusers(zero_snr: bool) -> None:
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_snr)
    latents, noise = latents_and_noise()
    alphas = scheduler.alphas_cumprod
    assert_close(add_noise(latents, noise, STEPS, alphas), scheduler.add_noise(latents, noise, STEPS))
    expected = scheduler.get_velocity(latents, noise, STEPS)
    assert_close(target(latents, noise, STEPS, alphas, prediction="v_prediction"), expected)
    assert_close(target(latents, noise, STEPS, alphas, prediction="epsilon"), noise)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_weights_are_those_of_diffusers_scripts(gamma: float) -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    snr = compute_snr(scheduler, STEPS)
    clipped = torch.minimum(snr, torch.full_like(snr, gamma))
    alphas = scheduler.alphas_cumprod
    assert_close(min_snr_weights(STEPS, alphas, gamma=gamma, prediction="epsilon"), clipped / snr)
    assert_close(min_snr_weights(STEPS, alphas, gamma=gamma, prediction="v_prediction"), clipped / (snr + 1))


def test_without_gamma_every_weight_is_one_and_at_zero_snr_v_weighs_nothing() -> None:
    alphas = DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True).alphas_cumprod
    last = torch.tensor([999])
    assert min_snr_weights(last, alphas, gamma=None, prediction="v_prediction").tolist() == [1.0]
    assert min_snr_weights(last, alphas, gamma=5.0, prediction="v_prediction").item() < 1e-6


def test_loss_is_the_weighted_mean_of_each_examples_error() -> None:
    prediction, goal = torch.zeros(3, 2, 2), torch.stack([torch.full((2, 2), value) for value in (1.0, 2.0, 3.0)])
    weights = torch.tensor([2.0, 0.0, 0.5])
    assert weighted_squared_error(prediction, goal, weights).item() == pytest.approx((2 * 1 + 0 + 0.5 * 9) / 3)
