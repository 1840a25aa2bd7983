"""The pocket base's UNet, trained to draw captions: v-prediction, zero terminal SNR, uniform weighting on v.

The UNet's time embedding also receives the pooled text (diffusers' `addition_embed_type="text"`): every residual
block is told what to draw, which a small model learns several times faster than through cross-attention alone.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from dora_diffusion.functional.objectives import add_noise, target
from dora_diffusion.pretrain.captions import tokenize
from dora_diffusion.pretrain.text import TEXT_WIDTH

# timestep = T * u^power for uniform u: below 1 leans towards high noise, where the layout is decided
HIGH_NOISE_POWER = 0.6


@dataclass(frozen=True)
class TextPart:
    """The trained text side, frozen here."""

    tokenizer: CLIPTokenizer
    encoder: CLIPTextModel


def build_unet() -> UNet2DConditionModel:
    """11 M parameters on 16 x 16 x 8 latents, cross-attention at 16, 8 and 4; random weights."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=8,
    )


def build_scheduler() -> DDIMScheduler:
    """Trailing spacing, zero terminal SNR, v-prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@cache
def _alphas_cumprod() -> Tensor:
    return build_scheduler().alphas_cumprod


def velocity_loss(
    text: TextPart, unet: nn.Module, latents: Tensor, captions: list[str], generator: torch.Generator
) -> Tensor:
    """Mean squared error on v, uniformly weighted, at timesteps that lean towards high noise."""
    with torch.no_grad():
        hidden = text.encoder(tokenize(text.tokenizer, captions)).last_hidden_state
    alphas_cumprod = _alphas_cumprod()
    noise = torch.randn(latents.shape, generator=generator)
    u = torch.rand(len(latents), generator=generator)
    t = (len(alphas_cumprod) * u**HIGH_NOISE_POWER).long().clamp(max=len(alphas_cumprod) - 1)
    noisy = add_noise(latents, noise, t, alphas_cumprod)
    goal = target(latents, noise, t, alphas_cumprod, prediction="v_prediction")
    with torch.autocast("cpu", torch.bfloat16):  # a seventh faster here; parameters and gradients stay fp32
        predicted = unet(noisy, t, hidden).sample
    return F.mse_loss(predicted.float(), goal)
