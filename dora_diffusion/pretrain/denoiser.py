"""The pocket base's UNet, trained to draw captions: v-prediction, zero terminal SNR, uniform weighting on v.

The UNet's time embedding also receives the pooled text (diffusers' `addition_embed_type="text"`): every residual
block is told what to draw, which a small model learns several times faster than through cross-attention alone.
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from dora_diffusion.objectives import add_noise, target
from dora_diffusion.pretrain import checkpoints
from dora_diffusion.pretrain.captions import SceneSampler, tokenize
from dora_diffusion.pretrain.checkpoints import Progress
from dora_diffusion.pretrain.scenes import Scene
from dora_diffusion.pretrain.text import TEXT_WIDTH

# timestep = T * u^power for uniform u: below 1 leans towards high noise, where the layout is decided
HIGH_NOISE_POWER = 0.6


@dataclass(frozen=True)
class TextPart:
    """The trained text side, frozen here."""

    tokenizer: CLIPTokenizer
    encoder: CLIPTextModel


@dataclass(frozen=True)
class DenoiserRecipe:
    """How the UNet is trained."""

    steps: int = 11500
    batch: int = 12
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    decay_share: float = 0.35  # the last share of the steps over which the rate falls to zero
    empty_caption_share: float = 0.1
    styleless_share: float = 0.08
    small_share: float = 0.25
    ema: float = 0.999
    seed: int = 0
    checkpoint_every: int = 500


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


def _learning_rate(step: int, recipe: DenoiserRecipe) -> float:
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    left = (recipe.steps - step) / (recipe.decay_share * recipe.steps)
    return recipe.learning_rate * warm * min(1.0, left)


def _loss(
    unet: UNet2DConditionModel, latents: Tensor, hidden: Tensor, alphas_cumprod: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error on v, uniformly weighted, at timesteps that lean towards high noise."""
    noise = torch.randn(latents.shape, generator=generator)
    u = torch.rand(len(latents), generator=generator)
    t = (len(alphas_cumprod) * u**HIGH_NOISE_POWER).long().clamp(max=len(alphas_cumprod) - 1)
    noisy = add_noise(latents, noise, t, alphas_cumprod)
    goal = target(latents, noise, t, alphas_cumprod, prediction="v_prediction")
    with torch.autocast("cpu", torch.bfloat16):  # a seventh faster here; parameters and gradients stay fp32
        predicted = unet(noisy, t, hidden).sample
    return F.mse_loss(predicted.float(), goal)


def train_denoiser(
    latents: Tensor,
    scenes: list[Scene],
    text: TextPart,
    recipe: DenoiserRecipe,
    folder: Path,
) -> UNet2DConditionModel:
    """Train, or go on from the newest checkpoint in `folder`; return the averaged (EMA) weights.

    Args:
        latents: (N, 8, 16, 16), unit deviation; fp16 or fp32.
        scenes: what each latent shows.
        text: the trained tokenizer and text encoder, which stay as they are.
        recipe: steps, rates, seed.
        folder: where checkpoints lie.
    """
    torch.manual_seed(recipe.seed)
    unet = build_unet()
    average = copy.deepcopy(unet)
    parameters, averaged = dict(unet.named_parameters()), dict(average.named_parameters())
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=1e-3, fused=True
    )
    sampler, alphas_cumprod = SceneSampler(scenes, recipe), build_scheduler().alphas_cumprod
    parts = {"model": parameters, "average": averaged}
    done = checkpoints.resume(folder, parts, optimizer)
    start, running = time.monotonic() - done.seconds, done.loss
    bar = tqdm(range(done.step, recipe.steps), initial=done.step, total=recipe.steps, desc="denoiser", mininterval=10)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, recipe)
        indices, captions = sampler.batch_at(step)
        with torch.no_grad():
            hidden = text.encoder(tokenize(text.tokenizer, captions)).last_hidden_state
        generator = torch.Generator().manual_seed(recipe.seed * 7_000_003 + step)
        loss = _loss(unet, latents[indices].float(), hidden, alphas_cumprod, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _update_average(averaged, parameters, min(recipe.ema, (1 + step) / (10 + step)))
        running += 0.01 * (loss.item() - running)
        bar.set_postfix(loss=f"{running:.4f}", refresh=False)
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
            checkpoints.save(folder, parts, optimizer, Progress(step + 1, time.monotonic() - start, running))
    return average


@torch.no_grad()
def _update_average(averaged: dict[str, nn.Parameter], parameters: dict[str, nn.Parameter], decay: float) -> None:
    torch._foreach_lerp_(list(averaged.values()), list(parameters.values()), 1 - decay)
