"""The pocket base's AutoencoderKL: 128 x 128 RGB -> 16 x 16 x 8 latents of unit deviation, trained on drawings."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from dora_diffusion.pretrain import checkpoints
from dora_diffusion.pretrain.checkpoints import Progress


@dataclass(frozen=True)
class AutoencoderRecipe:
    """How the VAE is trained. Steps at 64-pixel crops, then a stretch at whole pictures (group norms see both)."""

    steps: int = 8500
    whole_picture_steps: int = 700
    batch: int = 16
    whole_picture_batch: int = 6
    learning_rate: float = 1.5e-3
    kl_weight: float = 2e-5
    gradient_loss_weight: float = 0.5
    seed: int = 0
    checkpoint_every: int = 500


def build_autoencoder() -> AutoencoderKL:
    """2.7 M parameters, factor 8, 8 latent channels, random weights."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=1.0,
        force_upcast=False,
    )


def _gradient_difference(a: Tensor, b: Tensor) -> Tensor:
    """L1 between the horizontal and vertical differences of two pictures: keeps outlines sharp."""
    rows = (a.diff(dim=-2) - b.diff(dim=-2)).abs().mean()
    return rows + (a.diff(dim=-1) - b.diff(dim=-1)).abs().mean()


def _augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Mix the colour channels at random, so that the VAE knows colours its drawings do not have."""
    batch = pictures.shape[0]
    mix = torch.eye(3) + 0.35 * torch.randn(batch, 3, 3, generator=generator)
    keep = (torch.rand(batch, 1, 1, generator=generator) < 0.5).float()
    mix = keep * torch.eye(3) + (1 - keep) * mix / mix.sum(-1, keepdim=True).clamp(min=0.5)
    return torch.einsum("bij,bjhw->bihw", mix, pictures).clamp(-1, 1)


def _batch_at(pictures: Tensor, step: int, recipe: AutoencoderRecipe) -> Tensor:
    """The batch of a step, a function of (seed, step) alone, so that a resumed run sees the same."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    whole = step >= recipe.steps - recipe.whole_picture_steps
    size, count = (128, recipe.whole_picture_batch) if whole else (64, recipe.batch)
    chosen = torch.randint(len(pictures), (count,), generator=generator)
    corners = torch.randint(0, 128 - size + 1, (count, 2), generator=generator)
    crops = [
        pictures[i, :, y : y + size, x : x + size] for i, (y, x) in zip(chosen.tolist(), corners.tolist(), strict=True)
    ]
    return _augment(torch.stack(crops).float() / 127.5 - 1, generator)


def _learning_rate(step: int, recipe: AutoencoderRecipe) -> float:
    warm = min(1.0, (step + 1) / 200)
    decay = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / recipe.steps)).item())
    return recipe.learning_rate * warm * max(decay, 0.02)


def train_autoencoder(pictures: Tensor, recipe: AutoencoderRecipe, folder: Path) -> AutoencoderKL:
    """Train, or go on from the newest checkpoint in `folder`.

    Args:
        pictures: uint8 (N, 3, 128, 128).
        recipe: steps, losses, seed.
        folder: where checkpoints lie.

    Returns:
        The VAE, its latents not yet whitened (see `whiten`).
    """
    torch.manual_seed(recipe.seed)
    vae = build_autoencoder().train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    parts = {"model": vae.state_dict()}  # views: they follow the training
    done = checkpoints.resume(folder, parts, optimizer)
    start = time.monotonic() - done.seconds
    bar = tqdm(
        range(done.step, recipe.steps), initial=done.step, total=recipe.steps, desc="autoencoder", mininterval=10
    )
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, recipe)
        loss, psnr = _loss(vae, _batch_at(pictures, step, recipe), step, recipe)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{psnr:.1f}")
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
            checkpoints.save(folder, parts, optimizer, Progress(step + 1, time.monotonic() - start, loss.item()))
    return vae.eval()


def _loss(vae: AutoencoderKL, pictures: Tensor, step: int, recipe: AutoencoderRecipe) -> tuple[Tensor, float]:
    generator = torch.Generator().manual_seed(recipe.seed * 7_000_003 + step)
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(pictures).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        latents = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
        drawn = vae.decode(latents).sample.float()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    squared = F.mse_loss(drawn, pictures)
    loss = F.l1_loss(drawn, pictures) + squared + recipe.gradient_loss_weight * _gradient_difference(drawn, pictures)
    psnr = -10 * torch.log10(squared.detach() / 4).item()
    return loss + recipe.kl_weight * kl * latents.shape[1], psnr


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Tensor, batch: int = 32) -> Tensor:
    """uint8 (N, 3, 128, 128) -> latent means, fp32 (N, 8, 16, 16)."""
    parts = []
    for start in tqdm(range(0, len(pictures), batch), desc="encoding", mininterval=10):
        rgb = pictures[start : start + batch].float() / 127.5 - 1
        parts.append(vae.encode(rgb).latent_dist.mode())
    return torch.cat(parts)


@torch.no_grad()
def whiten(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Fold an affine map into the VAE's 1x1 quant convolutions so that each latent channel has mean 0, deviation 1.

    StableDiffusionPipeline knows one scaling factor for all channels and no shift; the 1x1 convolutions around the
    latents can carry both exactly.

    Args:
        vae: changed in place.
        latents: (N, 8, 16, 16), what the VAE gives now.

    Returns:
        The same latents under the new scale.
    """
    mean = latents.mean((0, 2, 3))
    deviation = latents.std((0, 2, 3))
    channels = len(mean)
    vae.quant_conv.weight[:channels] /= deviation[:, None, None, None]
    vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - mean) / deviation
    vae.quant_conv.bias[channels:] -= 2 * deviation.log()
    weight = vae.post_quant_conv.weight
    vae.post_quant_conv.bias += weight[:, :, 0, 0] @ mean
    weight *= deviation[None, :, None, None]
    return (latents - mean[None, :, None, None]) / deviation[None, :, None, None]


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean PSNR in dB over whole pictures, uint8 (N, 3, 128, 128)."""
    values = []
    for picture in pictures:
        rgb = picture[None].float() / 127.5 - 1
        drawn = vae.decode(vae.encode(rgb).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * torch.log10(F.mse_loss(drawn, rgb) / 4).item())
    return sum(values) / len(values)
