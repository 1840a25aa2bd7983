"""The training loop of a base's denoiser, whatever its kind: batches of captioned latents, a loss, averaged weights."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dora_diffusion.pretrain import checkpoints
from dora_diffusion.pretrain.captions import SceneSampler
from dora_diffusion.pretrain.checkpoints import Progress
from dora_diffusion.pretrain.scenes import Scene

Model = TypeVar("Model", bound=nn.Module)
# (module, latents (N, 8, 16, 16), captions, generator) -> loss
Loss = Callable[[nn.Module, Tensor, list[str], torch.Generator], Tensor]


@dataclass(frozen=True)
class DenoiserRecipe:
    """How a denoiser is trained."""

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


def _learning_rate(step: int, recipe: DenoiserRecipe) -> float:
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    left = (recipe.steps - step) / (recipe.decay_share * recipe.steps)
    return recipe.learning_rate * warm * min(1.0, left)


def train_denoiser(
    model: Model, loss_of: Loss, latents: Tensor, scenes: list[Scene], recipe: DenoiserRecipe, folder: Path
) -> Model:
    """Train, or go on from the newest checkpoint in `folder`; return the averaged (EMA) weights.

    Args:
        model: the module that learns, in place; its weights are drawn by the caller.
        loss_of: what is minimised.
        latents: (N, 8, 16, 16), unit deviation; fp16 or fp32.
        scenes: what each latent shows.
        recipe: steps, rates, seed.
        folder: where checkpoints lie.
    """
    average = copy.deepcopy(model)
    parameters, averaged = dict(model.named_parameters()), dict(average.named_parameters())
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=1e-3, fused=True
    )
    sampler = SceneSampler(scenes, recipe)
    parts = {"model": parameters, "average": averaged}
    done = checkpoints.resume(folder, parts, optimizer)
    start, running = time.monotonic() - done.seconds, done.loss
    bar = tqdm(range(done.step, recipe.steps), initial=done.step, total=recipe.steps, desc="denoiser", mininterval=10)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, recipe)
        indices, captions = sampler.batch_at(step)
        generator = torch.Generator().manual_seed(recipe.seed * 7_000_003 + step)
        loss = loss_of(model, latents[indices].float(), captions, generator)
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
