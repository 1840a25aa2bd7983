"""Training objectives as values: how latents are noised, what the denoiser should answer, how much each answer weighs.

Diffusion (epsilon, v):  x_t = a_t x_0 + sigma_t eps, with a_t^2 = alphas_cumprod[t], sigma_t^2 = 1 - a_t^2, and
                         SNR = a_t^2 / sigma_t^2.
Rectified flow:          x_s = (1 - s) x_0 + s eps for s in 0..1, timestep 1000 s; the velocity is eps - x_0.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]
Density = Literal["uniform", "logit_normal", "mode", "beta"]
Weighting = Literal["none", "min_snr", "debiased"]
FlowWeighting = Literal["none", "sigma_sqrt", "cosmap"]
HuberSchedule = Literal["constant", "exponential", "snr"]

# Where SD3's loss weighting sigma^-2 would end in infinity, it stops.
_LEAST_SIGMA = 1e-3
_DRAWN_FOR_LADDER = 2**14


@dataclass(frozen=True)
class TimestepDistribution:
    """Where in a schedule noise is drawn: u in 0..1 by a density, leant, and brought into a range.

    Attributes:
        density: of u, where 1 is noise: "uniform"; "logit_normal", sigmoid of a normal variable, and "mode", heavier
            tails (both arXiv 2403.03206); "beta" (B-TTDM, doi 10.1007/978-3-031-72646-0_7).
        mean: of that normal variable; above 0 leans to noise.
        std: its deviation.
        mode_scale: of "mode"; 0 is uniform.
        alpha, beta: of "beta", whose mean is alpha / (alpha + beta).
        bias: u -> bias u / (1 + (bias - 1) u); above 1 leans to noise. It multiplies a flow's shift.
        lowest, highest: the range, in thousandths of the schedule; densities are squeezed into it and not cut off.
    """

    density: Density = "uniform"
    mean: float = 0.0
    std: float = 1.0
    mode_scale: float = 1.29
    alpha: float = 1.0
    beta: float = 1.0
    bias: float = 1.0
    lowest: int = 0
    highest: int = 1000

    def draw(self, count: int, generator: torch.Generator, *, length: float, shift: float = 1.0) -> Tensor:
        """(count,) fp32 in the range of a schedule of `length`, on the generator's device."""
        u, shift = self._u(count, generator), self.bias * shift
        drawn = length * shift * u / (1 + (shift - 1) * u)
        low, high = length * self.lowest / 1000, length * self.highest / 1000
        return (low + (self.highest - self.lowest) / 1000 * drawn).clamp(low, high)

    def draw_integers(self, count: int, generator: torch.Generator, *, length: int) -> Tensor:
        """(count,) int64 of the range in 0..length - 1, of which `highest` itself is none."""
        first, past = self.lowest * length // 1000, math.ceil(self.highest * length / 1000)
        if self.density == "uniform" and self.bias == 1:
            return torch.randint(first, past, (count,), generator=generator, device=generator.device)
        return self.draw(count, generator, length=length).long().clamp(first, past - 1)

    def _u(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) fp32 in 0..1 by the density alone."""
        from diffusers.training_utils import compute_density_for_timestep_sampling

        if self.density == "beta":  # torch's takes no generator
            seed = int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device))
            drawn = np.random.default_rng(seed).beta(self.alpha, self.beta, count)
            return torch.from_numpy(drawn).to(generator.device, torch.float32)
        u: Tensor = compute_density_for_timestep_sampling(
            self.density,
            count,
            self.mean,
            self.std,
            self.mode_scale,
            device=generator.device,
            generator=generator,
        )
        return u.clamp(0, 1)


class Noise(NamedTuple):
    """Noises of one step, each (N, C, ...): the one in the target, and the one that latents are mixed with."""

    aimed_at: Tensor
    added: Tensor


@dataclass(frozen=True)
class NoiseChanges:
    """What is done to Gaussian noise before it is used.

    Attributes:
        offset: strength of noise that is the same all over a channel, so that brightness is learnt too; it is part of
            the target (crosslabs.org/blog/diffusion-with-offset-noise).
        has_random_offset: draw that strength for each sample, uniform in 0..offset.
        perturbation: strength of noise that latents get besides, and that the target does not know of: gamma of input
            perturbation (arXiv 2301.11706).
    """

    offset: float = 0.0
    has_random_offset: bool = False
    perturbation: float = 0.0

    def apply(self, noise: Tensor, generator: torch.Generator) -> Noise:
        """Noise (N, C, ...) of any device -> with its changes; nothing is drawn for those that are 0."""
        device, rest = generator.device, (1,) * (noise.dim() - 2)
        if self.offset:
            offset = self.offset * torch.randn((*noise.shape[:2], *rest), generator=generator, device=device)
            if self.has_random_offset:
                offset = offset * torch.rand((len(noise), 1, *rest), generator=generator, device=device)
            noise = noise + offset.to(noise)
        if not self.perturbation:
            return Noise(noise, noise)
        more = torch.randn(noise.shape, generator=generator, device=device)
        return Noise(noise, noise + self.perturbation * more.to(noise))


@dataclass(frozen=True)
class Huber:
    """Pseudo-Huber loss in place of the squared error; see `pseudo_huber`, and `thresholds` for its schedule.

    Attributes:
        c: where squares begin to turn into distances; under a schedule, at the noisiest timestep.
        schedule: "constant"; "exponential" and "snr" let it fall from 1 at the clean picture to c (arXiv 2403.16728).
    """

    c: float = 0.1
    schedule: HuberSchedule = "snr"

    def thresholds(self, progress: Tensor, signal: Tensor) -> Tensor:
        """Each sample's threshold, (N,): c^progress, or (1 - c) signal^2 + c.

        Args:
            progress: (N,), how far in the schedule a timestep is, 0..1.
            signal: (N,), a / (a + sigma) = 1 / (1 + SNR^-1/2), which is 0 where there is noise alone.
        """
        if self.schedule == "exponential":
            return self.c**progress
        if self.schedule == "snr":
            return (1 - self.c) * signal.square() + self.c
        return torch.full_like(signal, self.c)


class Objective(Protocol):
    """What a training step needs to know of the noise."""

    @property
    def noise(self) -> NoiseChanges:
        """What is done to the noise."""

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Random timesteps (count,) on the generator's device, in the scheduler's unit: 0 to 1000, more is noisier."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean latents (N, ...), noise of the same shape, timesteps (N,) -> noisy latents."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should say of the noisy latents."""

    def errors(self, prediction: Tensor, goal: Tensor, timesteps: Tensor) -> Tensor:
        """How wrong each number of a prediction (N, ...) is, in fp32."""

    def weights(self, timesteps: Tensor) -> Tensor:
        """Each timestep's weight in the loss, (N,)."""


def timestep_ladder(objective: Objective, count: int) -> Tensor:
    """Timesteps (count,) that part an objective's own into equal shares, the middle of each share, from low to high.

    By drawing, so that whatever density they have is followed: always the same ones.
    """
    drawn = objective.timesteps(_DRAWN_FOR_LADDER, torch.Generator().manual_seed(0)).sort().values
    return drawn[[int((rung + 0.5) / count * len(drawn)) for rung in range(count)]]


@dataclass(frozen=True)
class DiffusionObjective:
    """Denoising diffusion.

    Attributes:
        alphas_cumprod: (T,), the scheduler's, or of `zero_terminal_alphas_cumprod`.
        prediction: what the denoiser predicts.
        weighting: of the loss: "none"; "min_snr", see `min_snr_weights`; "debiased", see `debiased_weights`.
        min_snr_gamma: of "min_snr".
        distribution: of the timesteps.
        noise: what is done to it.
        huber: in place of the squared error.
    """

    alphas_cumprod: Tensor
    prediction: Prediction
    weighting: Weighting = "none"
    min_snr_gamma: float = 5.0
    distribution: TimestepDistribution = TimestepDistribution()
    noise: NoiseChanges = NoiseChanges()
    huber: Huber | None = None

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Integers."""
        return self.distribution.draw_integers(count, generator, length=len(self.alphas_cumprod))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See `add_noise`."""
        return add_noise(latents, noise, timesteps, self.alphas_cumprod)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See `target`."""
        return target(latents, noise, timesteps, self.alphas_cumprod, prediction=self.prediction)

    def errors(self, prediction: Tensor, goal: Tensor, timesteps: Tensor) -> Tensor:
        """Squared, or pseudo-Huber."""
        if self.huber is None:
            return squared_error(prediction, goal)
        chosen = self.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
        a, sigma = chosen.sqrt(), (1 - chosen).sqrt()
        thresholds = self.huber.thresholds(timesteps / len(self.alphas_cumprod), a / (a + sigma))
        return pseudo_huber(prediction, goal, thresholds)

    def weights(self, timesteps: Tensor) -> Tensor:
        """By `weighting`."""
        if self.weighting == "debiased":
            return debiased_weights(timesteps, self.alphas_cumprod, prediction=self.prediction)
        gamma = self.min_snr_gamma if self.weighting == "min_snr" else None
        return min_snr_weights(timesteps, self.alphas_cumprod, gamma=gamma, prediction=self.prediction)


@dataclass(frozen=True)
class FlowObjective:
    """Rectified flow (Stable Diffusion 3, arXiv 2403.03206).

    Attributes:
        shift: of the timesteps towards noise, s' = shift s / (1 + (shift - 1) s); as the scheduler does when drawing.
        distribution: of s before the shift; its range is that of s after it.
        weighting: of the loss: "none"; "sigma_sqrt", s^-2; "cosmap", 2 / (pi (1 - 2s + 2s^2)).
        noise: what is done to it.
        huber: in place of the squared error.
    """

    shift: float = 1.0
    distribution: TimestepDistribution = TimestepDistribution("logit_normal")
    weighting: FlowWeighting = "none"
    noise: NoiseChanges = NoiseChanges()
    huber: Huber | None = None

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """fp32 in 0..1000."""
        return self.distribution.draw(count, generator, length=1000, shift=self.shift)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(1 - s) latents + s noise."""
        return torch.lerp(latents, noise, _like(timesteps / 1000, latents))

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity noise - latents, wherever on the line."""
        return noise - latents

    def errors(self, prediction: Tensor, goal: Tensor, timesteps: Tensor) -> Tensor:
        """Squared, or pseudo-Huber."""
        if self.huber is None:
            return squared_error(prediction, goal)
        s = timesteps.float() / 1000
        return pseudo_huber(prediction, goal, self.huber.thresholds(s, 1 - s))

    def weights(self, timesteps: Tensor) -> Tensor:
        """By `weighting`, from diffusers.training_utils."""
        from diffusers.training_utils import compute_loss_weighting_for_sd3

        sigmas = (timesteps.float() / 1000).clamp(min=_LEAST_SIGMA)
        weights: Tensor = compute_loss_weighting_for_sd3(self.weighting, sigmas)
        return weights


def _like(values: Tensor, like: Tensor) -> Tensor:
    """(N,) -> (N, 1, 1, 1), of the device and dtype of `like`."""
    return values.to(like).reshape(-1, *[1] * (like.dim() - 1))


def _coefficients(alphas_cumprod: Tensor, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(a_t, sigma_t), each (N, 1, 1, 1) fp32 on the device of `like`."""
    chosen = alphas_cumprod.to(like.device, torch.float32)[timesteps].reshape(-1, *[1] * (like.dim() - 1))
    return chosen.sqrt(), (1 - chosen).sqrt()


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t for clean latents (N, C, h, w), noise of the same shape and timesteps (N,)."""
    a, sigma = _coefficients(alphas_cumprod, timesteps, latents)
    return a * latents + sigma * noise


def target(
    latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, *, prediction: Prediction
) -> Tensor:
    """What the denoiser should say: eps, or v = a_t eps - sigma_t x_0 (arXiv 2202.00512)."""
    if prediction == "epsilon":
        return noise
    a, sigma = _coefficients(alphas_cumprod, timesteps, latents)
    return a * noise - sigma * latents


def zero_terminal_alphas_cumprod(betas: Tensor) -> Tensor:
    """alphas_cumprod (T,) of betas (T,) rescaled so that the last timestep is pure noise.

    Algorithm 1 of arXiv 2305.08891, by diffusers. Betas that end in 1 are such already, and stay as they are.
    """
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    rescaled = betas if betas[-1] == 1 else rescale_zero_terminal_snr(betas)
    return torch.cumprod(1 - rescaled, dim=0)


def _snr(timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """(N,), finite also where there is next to no noise."""
    chosen = alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
    return chosen / (1 - chosen).clamp(min=1e-8)


def min_snr_weights(
    timesteps: Tensor, alphas_cumprod: Tensor, *, gamma: float | None, prediction: Prediction
) -> Tensor:
    """Min-SNR-gamma loss weights (arXiv 2303.09556), (N,): min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v.

    A scheduler with zero terminal SNR gives its last timestep weight 0 here: leave min-SNR off for such a base when
    the layout has to be learnt too. `gamma` None gives ones.
    """
    if gamma is None:
        return torch.ones(timesteps.shape, device=timesteps.device)
    snr = _snr(timesteps, alphas_cumprod)
    clipped = snr.clamp(max=gamma)
    return clipped / snr.clamp(min=1e-8) if prediction == "epsilon" else clipped / (snr + 1)


def debiased_weights(timesteps: Tensor, alphas_cumprod: Tensor, *, prediction: Prediction) -> Tensor:
    """Debiased estimation's loss weights (arXiv 2310.08442), (N,): SNR^-1/2 for epsilon, SNR^1/2 / (SNR + 1) for v.

    Both are the same loss of the same denoiser, for the squared error of epsilon is SNR / (SNR + 1) times that of v. A
    last timestep of pure noise has weight 0 for v; for epsilon, which says nothing there, it stays finite.
    """
    snr = _snr(timesteps, alphas_cumprod)
    return snr.clamp(min=1e-8).rsqrt() if prediction == "epsilon" else snr.sqrt() / (snr + 1)


def squared_error(prediction: Tensor, goal: Tensor) -> Tensor:
    """Of each number, in fp32."""
    return (prediction.float() - goal.float()).square()


def pseudo_huber(prediction: Tensor, goal: Tensor, thresholds: Tensor) -> Tensor:
    """2 c (sqrt(d^2 + c^2) - c) of each difference d, in fp32: d^2 where it is small, 2 c |d| where it is large.

    Args:
        prediction: (N, ...).
        goal: of the same shape.
        thresholds: c of each sample, (N,), above 0 (arXiv 2403.16728).
    """
    squared, c = squared_error(prediction, goal), _like(thresholds.float(), prediction.float())
    return 2 * c * squared / ((squared + c.square()).sqrt() + c)  # the same, without a difference of nearly equals


def weighted_mean(errors: Tensor, weights: Tensor, masks: Tensor | None = None) -> Tensor:
    """Mean over the batch of weight times mean error: (N, ...) fp32, (N,) -> ().

    With masks (N, 1, h, w) each sample's mean is weighted by its mask, so that a small area counts as much as a large
    one; where a mask is 0 there is no gradient, and a sample whose mask is 0 all over has no loss.
    """
    if masks is None:
        return (weights * errors.flatten(1).mean(1)).mean()
    whole = masks.float().expand_as(errors).flatten(1)
    area = whole.sum(1)
    error = (whole * errors.flatten(1)).sum(1) / area.where(area > 0, 1)
    return (weights * error).mean()


def weighted_squared_error(prediction: Tensor, goal: Tensor, weights: Tensor, masks: Tensor | None = None) -> Tensor:
    """See `weighted_mean` and `squared_error`: (N, ...), (N, ...), (N,) -> ()."""
    return weighted_mean(squared_error(prediction, goal), weights, masks)
