"""Objectives against diffusers' schedulers, its SNR and its functions, and against literal re-statements of papers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_diffusion.functional.objectives import (
    Density,
    DiffusionObjective,
    FlowObjective,
    Huber,
    HuberSchedule,
    NoiseChanges,
    Objective,
    Prediction,
    TimestepDistribution,
    add_noise,
    debiased_weights,
    min_snr_weights,
    pseudo_huber,
    squared_error,
    target,
    timestep_ladder,
    weighted_mean,
    weighted_squared_error,
    zero_terminal_alphas_cumprod,
)
from tests.tolerances import assert_close, assert_identical

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
    plain, shifted = (FlowObjective(distribution=TimestepDistribution(density), shift=shift) for shift in (1.0, 3.0))
    u, s = (o.timesteps(4000, torch.Generator().manual_seed(0)) / 1000 for o in (plain, shifted))
    assert 0 <= u.min() < 0.1 and 0.9 < u.max() <= 1
    assert_close(s, 3 * u / (1 + 2 * u))
    assert s.mean() > u.mean() + 0.1


def test_logit_normal_has_the_mean_and_deviation_that_it_is_given() -> None:
    objective = FlowObjective(distribution=TimestepDistribution("logit_normal", mean=0.7, std=0.5))
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


# Where in the schedule

DENSITIES: tuple[Density, ...] = ("uniform", "logit_normal", "mode", "beta")
ALPHAS = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
ZERO_TERMINAL = DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True).alphas_cumprod


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def distributions(draw: st.DrawFn) -> TimestepDistribution:
    lowest = draw(st.integers(0, 999))
    return TimestepDistribution(
        draw(st.sampled_from(DENSITIES)),
        mean=draw(st.floats(-50, 50)),
        std=draw(st.floats(1e-3, 50)),
        mode_scale=draw(st.floats(-1, 1.75)),
        alpha=draw(st.floats(0.01, 100)),
        beta=draw(st.floats(0.01, 100)),
        bias=draw(st.floats(0.01, 100)),
        lowest=lowest,
        highest=draw(st.integers(lowest + 1, 1000)),
    )


@given(distributions(), st.floats(0.01, 100), st.integers(1, 1000), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_no_timestep_leaves_its_range_and_a_seed_draws_the_same(
    distribution: TimestepDistribution, shift: float, length: int, seed: int
) -> None:
    flow = FlowObjective(shift=shift, distribution=distribution)
    of_flow = flow.timesteps(64, seeded(seed))
    assert of_flow.dtype == torch.float32
    assert distribution.lowest <= of_flow.min() and of_flow.max() <= distribution.highest
    diffusion = DiffusionObjective(torch.linspace(0.9, 0.1, length), "epsilon", distribution=distribution)
    integers = diffusion.timesteps(64, seeded(seed))
    first = distribution.lowest * length // 1000
    assert integers.dtype == torch.int64
    assert first <= integers.min() and integers.max() < math.ceil(distribution.highest * length / 1000)
    assert_identical([flow.timesteps(64, seeded(seed)), diffusion.timesteps(64, seeded(seed))], [of_flow, integers])


def test_every_integer_of_a_range_is_drawn_and_no_other() -> None:
    for density in DENSITIES:
        for bias in (1.0, 2.0):
            distribution = TimestepDistribution(density, lowest=300, highest=310, bias=bias)
            drawn = DiffusionObjective(ALPHAS, "epsilon", distribution=distribution).timesteps(4000, seeded())
            assert set(drawn.tolist()) == set(range(300, 310)), (density, bias)


CUMULATIVE = {  # share below x, in closed form
    TimestepDistribution("uniform"): (0.5, lambda x: x),
    TimestepDistribution("beta", alpha=2.0, beta=5.0): (2 / 7, lambda x: 1 - (1 - x) ** 5 * (1 + 5 * x)),
    TimestepDistribution("beta", alpha=1 / 3): (1 / 4, lambda x: x ** (1 / 3)),
    TimestepDistribution("beta", beta=1 / 3): (3 / 4, lambda x: 1 - (1 - x) ** (1 / 3)),
}


@pytest.mark.parametrize("distribution", CUMULATIVE, ids=str)
def test_densities_have_their_means_and_shares(distribution: TimestepDistribution) -> None:
    """Of 40,000 numbers the deviation of a share or mean is below 0.0025; a fixed seed, and bounds of four of it."""
    mean, below = CUMULATIVE[distribution]
    u = distribution.draw(40_000, seeded(), length=1)
    assert u.mean().item() == pytest.approx(mean, abs=0.01)
    for x in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert (u < x).float().mean().item() == pytest.approx(below(x), abs=0.01)
    of_diffusion = DiffusionObjective(ALPHAS, "epsilon", distribution=distribution).timesteps(40_000, seeded())
    assert of_diffusion.double().mean().item() == pytest.approx(1000 * mean - 0.5, abs=10)


def test_logit_normal_and_mode_are_for_diffusion_what_they_are_for_flows() -> None:
    for density in ("logit_normal", "mode"):
        distribution = TimestepDistribution(density, mean=0.5, std=0.8, mode_scale=0.7, lowest=100, highest=900)
        of_flow = FlowObjective(distribution=distribution).timesteps(1000, seeded())
        of_diffusion = DiffusionObjective(ALPHAS, "epsilon", distribution=distribution).timesteps(1000, seeded())
        assert_identical(of_diffusion, of_flow.long().clamp(max=899))


@pytest.mark.parametrize("density", DENSITIES)
def test_a_bias_leans_as_a_shift_does_and_multiplies_it(density: Density) -> None:
    plain, leant = TimestepDistribution(density), TimestepDistribution(density, bias=3.0)
    u = plain.draw(500, seeded(), length=1)
    assert_close(leant.draw(500, seeded(), length=1), 3 * u / (1 + 2 * u))
    both = FlowObjective(shift=2.0, distribution=leant).timesteps(500, seeded())
    assert_close(both / 1000, FlowObjective(shift=6.0, distribution=plain).timesteps(500, seeded()) / 1000)
    of_diffusion = DiffusionObjective(ALPHAS, "epsilon", distribution=leant).timesteps(500, seeded())
    assert_identical(of_diffusion, leant.draw(500, seeded(), length=1000).long().clamp(max=999))


def test_rounding_takes_no_timestep_out_of_its_range() -> None:
    """Nearly all of these are at the very end, where a shift rounds up every now and then."""
    for shift in range(1, 2000):
        noisiest = TimestepDistribution("beta", alpha=100, beta=0.01, highest=900)
        assert FlowObjective(shift=shift / 100, distribution=noisiest).timesteps(8, seeded()).max() <= 900


def test_a_range_squeezes_a_flows_density_after_its_shift() -> None:
    """As sd-scripts does it for Stable Diffusion 3: u (max - min) + min of the shifted u."""
    whole = FlowObjective(shift=3.0).timesteps(500, seeded()) / 1000
    part = FlowObjective(shift=3.0, distribution=TimestepDistribution("logit_normal", lowest=200, highest=700))
    assert_close(part.timesteps(500, seeded()) / 1000, whole * (0.7 - 0.2) + 0.2)


# What is done to the noise


def test_noise_that_is_not_changed_is_the_very_tensor_and_draws_nothing() -> None:
    generator, noise = seeded(), latents_and_noise()[1]
    state = generator.get_state()
    found = NoiseChanges().apply(noise, generator)
    assert found.aimed_at is noise and found.added is noise
    assert_identical(generator.get_state(), state)


@pytest.mark.parametrize("shape", [(5, 4, 8, 8), (5, 4, 1, 8, 8)])
def test_an_offset_is_one_number_for_each_channel_and_is_aimed_at(shape: tuple[int, ...]) -> None:
    noise = torch.randn(shape, generator=seeded(1))
    found = NoiseChanges(offset=0.1).apply(noise, seeded())
    expected = noise + 0.1 * torch.randn((*shape[:2], *[1] * (len(shape) - 2)), generator=seeded())  # as diffusers
    assert_identical(found.aimed_at, expected)
    assert found.added is found.aimed_at
    weaker = NoiseChanges(offset=0.1, has_random_offset=True).apply(noise, seeded())
    ratios = ((weaker.added - noise) / (expected - noise)).flatten(1)
    assert_close(ratios, ratios[:, :1].expand_as(ratios), computed_in=torch.float16)  # one strength a sample
    strengths = ratios[:, 0].sort().values
    assert strengths[0] >= 0 and strengths[-1] <= 1.001 and strengths.diff().min() > 0.01


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_input_perturbation_is_in_the_input_and_not_in_the_target(offset: float) -> None:
    """arXiv 2301.11706, algorithm 1: x_t = a x_0 + sigma (eps + gamma xi), and eps is predicted."""
    noise = latents_and_noise()[1]
    found = NoiseChanges(offset=offset, perturbation=0.1).apply(noise, seeded())
    generator = seeded()
    aimed_at = NoiseChanges(offset=offset).apply(noise, generator).aimed_at
    assert_identical(found.aimed_at, aimed_at)
    assert_identical(found.added, aimed_at + 0.1 * torch.randn(noise.shape, generator=generator))


# What an error weighs


def literal_huber_c(schedule: HuberSchedule, c: float, timestep: int) -> float:
    """As the authors' script has it: diffusers' examples/research_projects/scheduled_huber_loss_training."""
    if schedule == "exponential":
        alpha = -math.log(c) / len(ALPHAS)
        return math.exp(-alpha * timestep)
    if schedule == "snr":
        sigma = ((1.0 - float(ALPHAS[timestep])) / float(ALPHAS[timestep])) ** 0.5
        return (1 - c) / (1 + sigma) ** 2 + c
    return c


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("c", [0.001, 0.1, 1.0])
def test_huber_is_that_of_its_authors(schedule: HuberSchedule, c: float) -> None:
    prediction, goal = latents_and_noise()
    found = DiffusionObjective(ALPHAS, "epsilon", huber=Huber(c, schedule)).errors(prediction, goal, STEPS)
    for row, step in enumerate(STEPS.tolist()):
        h = literal_huber_c(schedule, c, step)
        difference = prediction[row].double() - goal[row].double()
        expected = 2 * h * (torch.sqrt(difference**2 + h**2) - h)
        assert_close(found[row], expected.float())


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_hubers_threshold_of_a_flow_is_that_of_the_same_signal_to_noise(schedule: HuberSchedule) -> None:
    """s and (1 - s) beside each other have the SNR of a = (1 - s) / n, sigma = s / n."""
    prediction, goal = latents_and_noise()
    s = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    found = FlowObjective(huber=Huber(0.1, schedule)).errors(prediction, goal, 1000 * s)
    sigma = s / (1 - s)  # sigma / a
    snr = (1 - 0.1) / (1 + sigma) ** 2 + 0.1
    c = {"constant": torch.full_like(s, 0.1), "exponential": 0.1**s, "snr": snr}[schedule]
    assert_close(found, pseudo_huber(prediction, goal, c))
    assert c[0] == pytest.approx(0.1 if schedule == "constant" else 1.0) and c[-1] == pytest.approx(0.1)


@given(st.floats(-100, 100), st.floats(1e-4, 1e4))
@settings(max_examples=200, deadline=None)
def test_huber_lies_below_squares_and_lines_and_is_one_of_them_in_the_limit(difference: float, c: float) -> None:
    d, zero = torch.tensor([[difference]], dtype=torch.float32), torch.zeros(1, 1)
    error = pseudo_huber(d, zero, torch.tensor([c])).item()
    square, line = difference**2, 2 * c * abs(difference)
    assert 0 <= error <= square * (1 + 1e-5) + 1e-30 and error <= line * (1 + 1e-5)  # fp32 ends at 1e-38
    if abs(difference) < 1e-3 * c:
        assert error == pytest.approx(square, rel=1e-5, abs=1e-30)
    if abs(difference) > 1e3 * c:
        assert error == pytest.approx(line, rel=2e-3)


def test_huber_of_no_difference_is_exactly_nothing_and_so_is_its_gradient() -> None:
    goal = latents_and_noise()[0]
    for c in (1e-4, 0.1, 100.0):
        prediction = goal.clone().requires_grad_()
        error = pseudo_huber(prediction, goal, torch.full((5,), c))
        error.sum().backward()
        assert torch.count_nonzero(error) == 0
        assert prediction.grad is not None and torch.count_nonzero(prediction.grad) == 0


def test_a_large_threshold_trains_as_the_squared_error_does() -> None:
    goal = latents_and_noise()[0]
    gradients = []
    for huber in (None, Huber(100.0, "constant")):
        prediction = (goal + 0.1).requires_grad_()
        weighted_mean(
            DiffusionObjective(ALPHAS, "epsilon", huber=huber).errors(prediction, goal, STEPS), torch.ones(5)
        ).backward()
        gradients.append(prediction.grad)
    assert_close(1e3 * gradients[0], 1e3 * gradients[1])


def test_debiased_weights_are_the_papers() -> None:
    """arXiv 2310.08442: 1 / sqrt(SNR) on the error of epsilon."""
    snr = compute_snr(DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), STEPS)
    assert_close(debiased_weights(STEPS, ALPHAS, prediction="epsilon"), 1 / snr.sqrt())
    assert_identical(
        DiffusionObjective(ALPHAS, "epsilon", "debiased").weights(STEPS),
        debiased_weights(STEPS, ALPHAS, prediction="epsilon"),
    )


@pytest.mark.parametrize("weighting", ["min_snr", "debiased"])
def test_a_weighting_is_the_same_loss_whatever_the_denoiser_predicts(weighting: str) -> None:
    """One guess of the clean picture, said as epsilon and as v: x_0 = (x_t - sigma eps) / a = a x_t - sigma v."""
    latents, noise = latents_and_noise()
    guess = latents + 0.3 * torch.randn(latents.shape, generator=seeded(3))
    a = ALPHAS[STEPS].sqrt().reshape(-1, 1, 1, 1)
    sigma = (1 - ALPHAS[STEPS]).sqrt().reshape(-1, 1, 1, 1)
    noisy = a * latents + sigma * noise
    said = {"epsilon": (noisy - a * guess) / sigma, "v_prediction": (a * noisy - guess) / sigma}
    losses = []
    for prediction, answer in said.items():
        objective = DiffusionObjective(ALPHAS, prediction, weighting)
        errors = objective.errors(answer, objective.target(latents, noise, STEPS), STEPS).flatten(1).mean(1)
        losses.append(objective.weights(STEPS) * errors)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)  # next to no noise: a division by 0.03


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("alphas", [ALPHAS, ZERO_TERMINAL], ids=["plain", "zero terminal"])
def test_weights_and_thresholds_are_finite_at_both_ends_of_a_schedule(
    alphas: torch.Tensor, prediction: Prediction
) -> None:
    ends = torch.tensor([0, 999])
    for weighting in ("none", "min_snr", "debiased"):
        weights = DiffusionObjective(alphas, prediction, weighting).weights(ends)
        assert bool(torch.isfinite(weights).all()) and bool((weights >= 0).all())
    some, goal = torch.randn(2, 4, 8, 8, generator=seeded()), torch.randn(2, 4, 8, 8, generator=seeded(1))
    for schedule in ("constant", "exponential", "snr"):
        huber = Huber(0.1, schedule)
        objectives: list[tuple[Objective, torch.Tensor]] = [
            (DiffusionObjective(alphas, prediction, huber=huber), ends),
            (FlowObjective(huber=huber), torch.tensor([0.0, 1000.0])),
        ]
        for objective, timesteps in objectives:
            answer = some.clone().requires_grad_()
            error = objective.errors(answer, goal, timesteps)
            error.sum().backward()
            assert bool(torch.isfinite(error).all()) and bool(torch.isfinite(answer.grad).all())


def test_masks_leave_no_gradient_outside_with_huber_either() -> None:
    goal = torch.randn(3, 4, 8, 8, generator=seeded())
    answer = torch.randn(3, 4, 8, 8, generator=seeded(1)).requires_grad_()
    masks = torch.zeros(3, 1, 8, 8)
    masks[0, :, :, :2], masks[1] = 1, 1
    errors = pseudo_huber(answer, goal, torch.tensor([0.1, 0.5, 1.0]))
    loss = weighted_mean(errors, torch.tensor([1.0, 0.5, 2.0]), masks)
    (gradient,) = torch.autograd.grad(loss, answer)
    assert torch.count_nonzero(gradient * (1 - masks)) == 0
    assert torch.count_nonzero(gradient * masks) == 4 * 8 * 2 + 4 * 64
    assert_close(loss, (errors[0, :, :, :2].mean() + 0.5 * errors[1].mean()) / 3)


def test_squared_error_is_computed_in_fp32() -> None:
    found = squared_error(torch.full((1, 2), 300.0, dtype=torch.float16), torch.zeros(1, 2, dtype=torch.float16))
    assert_identical(found, torch.full((1, 2), 90_000.0))


# Zero terminal SNR


def test_zero_terminal_snr_is_that_of_diffusers_schedulers() -> None:
    plain = DDIMScheduler(beta_schedule="scaled_linear")
    rescaled = DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    found = zero_terminal_alphas_cumprod(plain.betas)
    assert_identical(found, rescaled.alphas_cumprod)
    assert found[-1].item() == 0.0 and found[0].item() == pytest.approx(plain.alphas_cumprod[0].item(), rel=1e-6)
    assert_identical(zero_terminal_alphas_cumprod(rescaled.betas), rescaled.alphas_cumprod)  # not once more
    euler = EulerDiscreteScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    assert euler.alphas_cumprod[-1] > 0  # for the sake of its own sigmas
    assert_identical(zero_terminal_alphas_cumprod(euler.betas), rescaled.alphas_cumprod)


def test_at_zero_terminal_snr_the_picture_is_the_target_and_the_input_noise_alone() -> None:
    latents, noise = latents_and_noise()
    last = torch.full((5,), 999)
    assert_identical(add_noise(latents, noise, last, ZERO_TERMINAL), noise)
    assert_identical(target(latents, noise, last, ZERO_TERMINAL, prediction="v_prediction"), -latents)


def _quantiles(objective: FlowObjective, count: int) -> torch.Tensor:
    """By the inverse of the density's distribution, in closed form, and the shift."""
    density = objective.distribution
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    if density.density == "uniform":
        u = shares
    elif density.density == "logit_normal":
        u = torch.special.expit(density.mean + density.std * torch.special.ndtri(shares))
    else:  # 1 - v - scale (cos^2(pi v / 2) - 1 + v) of a uniform v, which falls as v rises
        v = 1 - shares
        u = 1 - v - density.mode_scale * (torch.cos(torch.pi * v / 2) ** 2 - 1 + v)
    return 1000 * objective.shift * u / (1 + (objective.shift - 1) * u)


@pytest.mark.parametrize("count", [1, 4, 9])
@pytest.mark.parametrize(
    "objective",
    [
        FlowObjective(distribution=TimestepDistribution("uniform")),
        FlowObjective(shift=3.0, distribution=TimestepDistribution("logit_normal", mean=0.5, std=0.7)),
        FlowObjective(distribution=TimestepDistribution("mode", mode_scale=0.8)),
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
