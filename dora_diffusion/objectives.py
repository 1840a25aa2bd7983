"""Diffusion training objectives as pure functions: noising, targets, loss weights.

x_t = a_t x_0 + sigma_t eps, with a_t^2 = alphas_cumprod[t] and sigma_t^2 = 1 - a_t^2; SNR = a_t^2 / sigma_t^2.
"""

from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]


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


def weighted_squared_error(prediction: Tensor, goal: Tensor, weights: Tensor) -> Tensor:
    """Mean over the batch of weight times mean squared error, in fp32: (N, ...), (N, ...), (N,) -> ()."""
    error = (prediction.float() - goal.float()).square().flatten(1).mean(1)
    return (weights * error).mean()
