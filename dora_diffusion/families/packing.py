"""Latents as sequences of tokens: what FLUX and Qwen-Image do between the VAE and the transformer.

N batch, C channels, h and w the latents' height and width, T tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def space_to_depth(latents: Tensor) -> Tensor:
    """2 x 2 patches into channels: (N, C, h, w) -> (N, 4C, h/2, w/2); channel-major, as `depth_to_space` undoes it."""
    return F.pixel_unshuffle(latents, 2)


def depth_to_space(patched: Tensor) -> Tensor:
    """(N, 4C, h/2, w/2) -> (N, C, h, w); the inverse of `space_to_depth`."""
    return F.pixel_shuffle(patched, 2)


def flatten(latents: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, hw, C): one token a latent pixel, row by row."""
    return latents.flatten(2).transpose(1, 2)


def unflatten(tokens: Tensor, height: int, width: int) -> Tensor:
    """(N, hw, C) -> (N, C, h, w); the inverse of `flatten`."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def pack(latents: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, hw/4, 4C): tokens of 2 x 2 patches, row by row."""
    return flatten(space_to_depth(latents))


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(N, hw/4, 4C) -> (N, C, h, w); the inverse of `pack`."""
    return depth_to_space(unflatten(tokens, height // 2, width // 2))


def grid_ids(height: int, width: int, device: torch.device) -> Tensor:
    """(height * width, 2), int64: each token's row and column."""
    return torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(device)


def thousandth(timestep: Tensor) -> Tensor:
    """A timestep in 0..1, as these transformers are given it, in the scheduler's 0..1000."""
    return timestep * 1000
