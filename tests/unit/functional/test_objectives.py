"""Noising, targets and weights against diffusers' schedulers and its SNR."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from dora_diffusion.functional.objectives import (
    DiffusionObjective,
    FlowObjective,
    add_noise,
    min_snr_weights,
    target,
    timestep_ladder,
    weighted_squared_error,
)
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


def test_a_flows_noising_equals_diffusers_and_its_target_leads_back() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    latents, noise = latents_and_noise()
    timesteps = scheduler.timesteps[[0, 2, 3, 5, 7]]
    objective = FlowObjective(shift=3.0)
    noisy = objective.add_noise(latents, noise, timesteps)
    assert_close(noisy, scheduler.scale_noise(latents, timesteps, noise))
    sigmas = (timesteps / 1000)[:, None, None, None]
    assert_close(noisy - sigmas * objective.target(latents, noise, timesteps), latents)


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
def test_timesteps_of_a_flow_are_shifted_as_the_scheduler_shifts(density: str) -> None:
    plain, shifted = FlowObjective(density=density), FlowObjective(density=density, shift=3.0)
    u, s = (o.timesteps(4000, torch.Generator().manual_seed(0)) / 1000 for o in (plain, shifted))
    assert 0 <= u.min() < 0.1 and 0.9 < u.max() <= 1
    assert_close(s, 3 * u / (1 + 2 * u))
    assert s.mean() > u.mean() + 0.1


def test_logit_normal_has_the_mean_and_deviation_that_it_is_given() -> None:
    objective = FlowObjective(logit_mean=0.7, logit_std=0.5)
    logits = torch.logit(objective.timesteps(20_000, torch.Generator().manual_seed(0)) / 1000)
    assert logits.mean().item() == pytest.approx(0.7, abs=0.02)
    assert logits.std().item() == pytest.approx(0.5, abs=0.02)


def test_weights_of_a_flow_are_sd3s_and_finite_at_the_ends() -> None:
    timesteps = torch.tensor([0.0, 250.0, 500.0, 1000.0])
    assert FlowObjective().weights(timesteps).tolist() == [1.0] * 4
    squares = FlowObjective(weighting="sigma_sqrt").weights(timesteps)
    assert bool(torch.isfinite(squares).all()) and squares[2].item() == pytest.approx(4.0)
    cosmap = FlowObjective(weighting="cosmap").weights(timesteps)
    assert cosmap.tolist() == pytest.approx([2 / torch.pi, 2 / torch.pi / 0.625, 4 / torch.pi, 2 / torch.pi], rel=3e-3)


def test_diffusions_timesteps_are_every_integer_of_its_schedule() -> None:
    objective = DiffusionObjective(DDIMScheduler().alphas_cumprod[:7], "epsilon")
    drawn = objective.timesteps(500, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == set(range(7)) and drawn.dtype == torch.int64


def _quantiles(objective: FlowObjective, count: int) -> torch.Tensor:
    """By the inverse of the density's distribution, in closed form, and the shift."""
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    if objective.density == "uniform":
        u = shares
    elif objective.density == "logit_normal":
        u = torch.special.expit(objective.logit_mean + objective.logit_std * torch.special.ndtri(shares))
    else:  # 1 - v - scale (cos^2(pi v / 2) - 1 + v) of a uniform v, which falls as v rises
        v = 1 - shares
        u = 1 - v - objective.mode_scale * (torch.cos(torch.pi * v / 2) ** 2 - 1 + v)
    return 1000 * objective.shift * u / (1 + (objective.shift - 1) * u)


@pytest.mark.parametrize("count", [1, 4, 9])
@pytest.mark.parametrize(
    "objective",
    [
        FlowObjective(density="uniform"),
        FlowObjective(density="logit_normal", logit_mean=0.5, logit_std=0.7, shift=3.0),
        FlowObjective(density="mode", mode_scale=0.8),
    ],
)
def test_a_ladder_parts_a_flow_s_density_into_equal_shares(objective: FlowObjective, count: int) -> None:
    ladder = timestep_ladder(objective, count)
    torch.testing.assert_close(ladder.double(), _quantiles(objective, count), rtol=0, atol=20)  # of 1000, by drawing
    assert torch.equal(ladder, timestep_ladder(objective, count)) and ladder.tolist() == sorted(set(ladder.tolist()))


def test_a_ladder_parts_a_schedule_into_equal_shares() -> None:
    objective = DiffusionObjective(DDPMScheduler().alphas_cumprod, "epsilon")
    torch.testing.assert_close(timestep_ladder(objective, 4), torch.tensor([125, 375, 625, 875]), rtol=0, atol=20)


def test_a_ladder_draws_from_no_generator_but_its_own() -> None:
    state = torch.get_rng_state()
    timestep_ladder(FlowObjective(), 3)
    assert torch.equal(torch.get_rng_state(), state)
