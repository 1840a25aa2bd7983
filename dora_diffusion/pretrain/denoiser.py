"""The pocket base's UNet and text encoder, trained jointly to draw captions: v-prediction, zero terminal SNR.

The UNet's time embedding also receives the pooled text (diffusers' `addition_embed_type="text"`): every residual
block is told what to draw, which a small model learns several times faster than through cross-attention alone.
"""

import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dora_diffusion import storage
from dora_diffusion.pretrain.scenes import Scene, varied_caption

TEXT_WIDTH = 192


@dataclass(frozen=True)
class DenoiserRecipe:
    """How UNet and text encoder are trained."""

    steps: int = 18000
    batch: int = 12
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    decay_share: float = 0.35  # the last share of the steps over which the rate falls to zero
    empty_caption_share: float = 0.1
    styleless_share: float = 0.08
    small_share: float = 0.25
    high_noise_power: float = 0.6  # timestep = T * u^power: below 1 leans towards high noise, where layout is decided
    ema: float = 0.999
    seed: int = 0
    checkpoint_every: int = 500


@dataclass(frozen=True)
class Denoiser:
    """The trainable pair."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter under `unet.` or `text_encoder.`."""
        parts = {"unet": self.unet, "text_encoder": self.text_encoder}
        return {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}


def build_denoiser(tokenizer: CLIPTokenizer) -> Denoiser:
    """Random weights; UNet on 16 x 16 x 8 latents, three-layer text encoder."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=6,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=6,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return Denoiser(unet, text_encoder)


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


class SceneSampler:
    """Batches as a function of (seed, step) alone: a pair (object, style) evenly, then size and background."""

    def __init__(self, scenes: list[Scene], recipe: DenoiserRecipe) -> None:
        self._recipe = recipe
        self._scenes = scenes
        self._by_pair: dict[tuple[str, str], dict[str, list[int]]] = {}
        for index, scene in enumerate(scenes):
            assert scene.style is not None
            self._by_pair.setdefault((scene.object, scene.style), {}).setdefault(scene.size, []).append(index)
        self._pairs = sorted(self._by_pair)

    def batch_at(self, step: int) -> tuple[list[int], list[str]]:
        """Indices of the scenes and a caption for each."""
        rng = Random(self._recipe.seed * 1_000_003 + step)
        indices = []
        for _ in range(self._recipe.batch):
            sizes = self._by_pair[rng.choice(self._pairs)]
            size = "small" if rng.random() < self._recipe.small_share else "large"
            indices.append(rng.choice(sizes[size]))
        return indices, [self._caption(self._scenes[i], rng) for i in indices]

    def _caption(self, scene: Scene, rng: Random) -> str:
        draw = rng.random()
        if draw < self._recipe.empty_caption_share:
            return ""
        if draw < self._recipe.empty_caption_share + self._recipe.styleless_share:
            scene = Scene(scene.object, None, scene.background, scene.size)
        return varied_caption(scene, rng)


def _learning_rate(step: int, recipe: DenoiserRecipe) -> float:
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    left = (recipe.steps - step) / (recipe.decay_share * recipe.steps)
    return recipe.learning_rate * warm * min(1.0, left)


def _loss(denoiser: Denoiser, latents: Tensor, tokens: Tensor, step: int, recipe: DenoiserRecipe) -> Tensor:
    """Mean squared error on v, uniformly weighted."""
    generator = torch.Generator().manual_seed(recipe.seed * 7_000_003 + step)
    alphas_cumprod = _ALPHAS_CUMPROD
    noise = torch.randn(latents.shape, generator=generator)
    u = torch.rand(len(latents), generator=generator)
    t = (len(alphas_cumprod) * u**recipe.high_noise_power).long().clamp(max=len(alphas_cumprod) - 1)
    alpha = alphas_cumprod[t].sqrt()[:, None, None, None]
    sigma = (1 - alphas_cumprod[t]).sqrt()[:, None, None, None]
    noisy, target = alpha * latents + sigma * noise, alpha * noise - sigma * latents
    with torch.autocast("cpu", torch.bfloat16):  # a seventh faster here; parameters and gradients stay fp32
        hidden = denoiser.text_encoder(tokens).last_hidden_state
        predicted = denoiser.unet(noisy, t, hidden).sample
    return F.mse_loss(predicted.float(), target)


_ALPHAS_CUMPROD = build_scheduler().alphas_cumprod


def train_denoiser(
    latents: Tensor, scenes: list[Scene], tokenizer: CLIPTokenizer, recipe: DenoiserRecipe, folder: Path
) -> Denoiser:
    """Train, or go on from the newest checkpoint in `folder`; return the averaged (EMA) weights.

    Args:
        latents: (N, 8, 16, 16), unit deviation; fp16 or fp32.
        scenes: what each latent shows.
        tokenizer: the trained one.
        recipe: steps, rates, seed.
        folder: where checkpoints lie.
    """
    torch.manual_seed(recipe.seed)
    denoiser = build_denoiser(tokenizer)
    average = copy.deepcopy(denoiser)
    parameters, averaged = denoiser.named_parameters(), average.named_parameters()
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=1e-3, fused=True
    )
    sampler = SceneSampler(scenes, recipe)
    done, seconds = _resume(parameters, averaged, optimizer, folder)
    start, running = time.monotonic() - seconds, None
    bar = tqdm(range(done, recipe.steps), initial=done, total=recipe.steps, desc="denoiser", mininterval=10)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, recipe)
        indices, captions = sampler.batch_at(step)
        tokens = tokenizer(
            captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        loss = _loss(denoiser, latents[indices].float(), tokens, step, recipe)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _update_average(averaged, parameters, min(recipe.ema, (1 + step) / (10 + step)))
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        bar.set_postfix(loss=f"{running:.4f}", refresh=False)
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
            progress = {"step": step + 1, "seconds": time.monotonic() - start, "loss": running}
            _save(parameters, averaged, optimizer, progress, folder)
    return average


@torch.no_grad()
def _update_average(averaged: dict[str, nn.Parameter], parameters: dict[str, nn.Parameter], decay: float) -> None:
    torch._foreach_lerp_(list(averaged.values()), list(parameters.values()), 1 - decay)


def _save(
    parameters: dict[str, nn.Parameter],
    averaged: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: dict[str, float],
    folder: Path,
) -> None:
    state = storage.optimizer_tensors(optimizer)
    storage.save_checkpoint(
        folder / f"step-{progress['step']:08d}",
        {
            "model.safetensors": lambda path: storage.save_tensors(parameters, path),
            "average.safetensors": lambda path: storage.save_tensors(averaged, path),
            "optimizer.safetensors": lambda path: storage.save_tensors(state, path),
            "progress.json": lambda path: storage.write_atomically(path, json.dumps(progress).encode()),
        },
    )
    with open(folder / "curve.jsonl", "a") as file:
        file.write(json.dumps(progress) + "\n")


@torch.no_grad()
def _resume(
    parameters: dict[str, nn.Parameter],
    averaged: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    folder: Path,
) -> tuple[int, float]:
    checkpoints = storage.valid_checkpoints(folder)
    if not checkpoints:
        return 0, 0.0
    newest = checkpoints[-1]
    load_parameters(parameters, newest / "model.safetensors")
    load_parameters(averaged, newest / "average.safetensors")
    storage.load_optimizer_tensors(optimizer, storage.load_tensors(newest / "optimizer.safetensors"))
    progress = json.loads((newest / "progress.json").read_text())
    return progress["step"], progress["seconds"]


@torch.no_grad()
def load_parameters(parameters: dict[str, nn.Parameter], file: Path) -> None:
    """Copy a safetensors file's values into parameters of the same names."""
    for name, value in storage.load_tensors(file).items():
        parameters[name].copy_(value)
