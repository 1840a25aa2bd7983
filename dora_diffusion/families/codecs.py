"""The autoencoders' ways of scaling latents, each as its pipeline does it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.families.packing import depth_to_space, space_to_depth
from dora_diffusion.families.record import Codec


def _to(vae: Any, tensor: Tensor) -> Tensor:
    return tensor.to(vae.device, vae.dtype)


@contextmanager
def _upcast(vae: Any) -> Iterator[None]:
    """fp32 for as long as it takes, for an autoencoder in fp16 whose config says that it overflows there (SDXL's)."""
    overflows = vae.dtype == torch.float16 and vae.config.get("force_upcast")
    if overflows:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if overflows:
            vae.to(torch.float16)


@torch.no_grad()
def _encode_scaled(pipe: Any, pixels: Tensor) -> Tensor:
    vae = pipe.vae
    with _upcast(vae):
        latents: Tensor = vae.encode(_to(vae, pixels)).latent_dist.mode()
    return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


@torch.no_grad()
def _decode_scaled(pipe: Any, latents: Tensor) -> Tensor:
    vae = pipe.vae
    with _upcast(vae):
        raw = _to(vae, latents) / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        pixels: Tensor = vae.decode(raw).sample
    return pixels


@torch.no_grad()
def _encode_compressed(pipe: Any, pixels: Tensor) -> Tensor:
    latents: Tensor = pipe.vae.encode(_to(pipe.vae, pixels)).latent
    return latents * pipe.vae.config.scaling_factor


@torch.no_grad()
def _decode_compressed(pipe: Any, latents: Tensor) -> Tensor:
    pixels: Tensor = pipe.vae.decode(_to(pipe.vae, latents) / pipe.vae.config.scaling_factor).sample
    return pixels


def _batch_norm(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, deviation) of the patched latents, (1, 4C, 1, 1)."""
    mean, variance = vae.bn.running_mean, vae.bn.running_var + vae.config.batch_norm_eps
    return mean.reshape(1, -1, 1, 1).to(like), variance.sqrt().reshape(1, -1, 1, 1).to(like)


@torch.no_grad()
def _encode_patched(pipe: Any, pixels: Tensor) -> Tensor:
    patched = space_to_depth(pipe.vae.encode(_to(pipe.vae, pixels)).latent_dist.mode())
    mean, deviation = _batch_norm(pipe.vae, patched)
    return (patched - mean) / deviation


@torch.no_grad()
def _decode_patched(pipe: Any, latents: Tensor) -> Tensor:
    latents = _to(pipe.vae, latents)
    mean, deviation = _batch_norm(pipe.vae, latents)
    latents = latents * deviation + mean
    pixels: Tensor = pipe.vae.decode(depth_to_space(latents)).sample
    return pixels


def _frame_scale(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, deviation = (torch.tensor(values).to(like) for values in (vae.config.latents_mean, vae.config.latents_std))
    return mean.reshape(1, -1, 1, 1), deviation.reshape(1, -1, 1, 1)


@torch.no_grad()
def _encode_frame(pipe: Any, pixels: Tensor) -> Tensor:
    latents = pipe.vae.encode(_to(pipe.vae, pixels)[:, :, None]).latent_dist.mode()[:, :, 0]
    mean, deviation = _frame_scale(pipe.vae, latents)
    return (latents - mean) / deviation


@torch.no_grad()
def _decode_frame(pipe: Any, latents: Tensor) -> Tensor:
    latents = _to(pipe.vae, latents)
    mean, deviation = _frame_scale(pipe.vae, latents)
    pixels: Tensor = pipe.vae.decode((latents * deviation + mean)[:, :, None]).sample[:, :, 0]
    return pixels


SCALED = Codec(_encode_scaled, _decode_scaled)  # AutoencoderKL: a scaling factor, in newer models a shift
COMPRESSED = Codec(_encode_compressed, _decode_compressed)  # AutoencoderDC: no distribution
PATCHED = Codec(_encode_patched, _decode_patched)  # AutoencoderKLFlux2: 2 x 2 patches, then a batch norm's statistics
FRAME = Codec(_encode_frame, _decode_frame)  # AutoencoderKLQwenImage: a film of one frame, a scale for every channel
