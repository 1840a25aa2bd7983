"""Training objectives as values: how latents are noised, what the denoiser should answer, how much each answer weighs.

Diffusion (epsilon, v):  x_t = a_t x_0 + sigma_t eps, with a_t^2 = alphas_cumprod[t], sigma_t^2 = 1 - a_t^2, and
                         SNR = a_t^2 / sigma_t^2.
Rectified flow:          x_s = (1 - s) x_0 + s eps for s in 0..1, timestep 1000 s; the velocity is eps - x_0.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]
Density = Literal["uniform", "logit_normal", "mode"]
FlowWeighting = Literal["none", "sigma_sqrt", "cosmap"]

# Where SD3's loss weighting sigma^-2 would end in infinity, it stops.
_LEAST_SIGMA = 1e-3
_DRAWN_FOR_LADDER = 2**14


class Objective(Protocol):
    """What a training step needs to know of the noise."""

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Random timesteps (count,) on the generator's device, in the scheduler's unit: 0 to 1000, more is noisier."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean latents (N, ...), noise of the same shape, timesteps (N,) -> noisy latents."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should say of the noisy latents."""

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
    """Denoising diffusion at uniform timesteps.

    Attributes:
        alphas_cumprod: (T,), the scheduler's.
        prediction: what the denoiser predicts.
        min_snr_gamma: min-SNR weighting (arXiv 2303.09556); None weighs all alike.
    """

    alphas_cumprod: Tensor
    prediction: Prediction
    min_snr_gamma: float | None = None

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Uniform integers."""
        return torch.randint(0, len(self.alphas_cumprod), (count,), generator=generator, device=generator.device)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See `add_noise`."""
        return add_noise(latents, noise, timesteps, self.alphas_cumprod)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See `target`."""
        return target(latents, noise, timesteps, self.alphas_cumprod, prediction=self.prediction)

    def weights(self, timesteps: Tensor) -> Tensor:
        """See `min_snr_weights`."""
        gamma = self.min_snr_gamma
        return min_snr_weights(timesteps, self.alphas_cumprod, gamma=gamma, prediction=self.prediction)


@dataclass(frozen=True)
class FlowObjective:
    """Rectified flow (Stable Diffusion 3, arXiv 2403.03206).

    Attributes:
        shift: of the timesteps towards noise, s' = shift s / (1 + (shift - 1) s); as the scheduler does when drawing.
        density: of s before the shift: "uniform"; "logit_normal", sigmoid of a normal variable; "mode", heavier tails.
        logit_mean: of that normal variable; above 0 leans to noise.
        logit_std: its deviation.
        mode_scale: of "mode"; 0 is uniform.
        weighting: of the loss: "none"; "sigma_sqrt", s^-2; "cosmap", 2 / (pi (1 - 2s + 2s^2)).
    """

    shift: float = 1.0
    density: Density = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    weighting: FlowWeighting = "none"

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """fp32 in 0..1000."""
        from diffusers.training_utils import compute_density_for_timestep_sampling

        u: Tensor = compute_density_for_timestep_sampling(
            self.density,
            count,
            self.logit_mean,
            self.logit_std,
            self.mode_scale,
            device=generator.device,
            generator=generator,
        ).clamp(0, 1)
        return 1000 * self.shift * u / (1 + (self.shift - 1) * u)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(1 - s) latents + s noise."""
        return torch.lerp(latents, noise, _like(timesteps / 1000, latents))

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity noise - latents, wherever on the line."""
        return noise - latents

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


def min_snr_weights(
    timesteps: Tensor, alphas_cumprod: Tensor, *, gamma: float | None, prediction: Prediction
) -> Tensor:
    """Min-SNR-gamma loss weights (arXiv 2303.09556), (N,): min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v.

    A scheduler with zero terminal SNR gives its last timestep weight 0 here: leave min-SNR off for such a base when
    the layout has to be learnt too. `gamma` None gives ones.
    """
    if gamma is None:
        return torch.ones(timesteps.shape, device=timesteps.device)
    chosen = alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
    snr = chosen / (1 - chosen).clamp(min=1e-8)
    clipped = snr.clamp(max=gamma)
    return clipped / snr.clamp(min=1e-8) if prediction == "epsilon" else clipped / (snr + 1)


def weighted_squared_error(prediction: Tensor, goal: Tensor, weights: Tensor, masks: Tensor | None = None) -> Tensor:
    """Mean over the batch of weight times mean squared error, in fp32: (N, ...), (N, ...), (N,) -> ().

    With masks (N, 1, h, w) each sample's mean is weighted by its mask, so that a small area counts as much as a large
    one; where a mask is 0 there is no gradient, and a sample whose mask is 0 all over has no loss.
    """
    squared = (prediction.float() - goal.float()).square()
    if masks is None:
        return (weights * squared.flatten(1).mean(1)).mean()
    whole = masks.float().expand_as(squared).flatten(1)
    area = whole.sum(1)
    error = (whole * squared.flatten(1)).sum(1) / area.where(area > 0, 1)
    return (weights * error).mean()
