"""The values A and B start from. Each leaves the model drawing what it drew: s B A is 0 at the first step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dora_diffusion.functional.dora import master_dtype, rows

Init = Literal["default", "gaussian", "orthogonal", "pissa"]
INITS: tuple[Init, ...] = ("default", "gaussian", "orthogonal", "pissa")


@dataclass(frozen=True)
class InitialPair:
    """A (r, in[, kernel]) and B (out, r[, 1, 1]); with an anchor, D = s (B A - anchor.B anchor.A)."""

    down: Tensor
    up: Tensor
    anchor: "InitialPair | None" = None

    def to(self, device: torch.device, dtype: torch.dtype) -> "InitialPair":
        """The same numbers elsewhere."""
        anchor = None if self.anchor is None else self.anchor.to(device, dtype)
        return InitialPair(self.down.to(device, dtype), self.up.to(device, dtype), anchor)


Fill = Callable[[Tensor, torch.Generator], object]


def _kaiming(down: Tensor, generator: torch.Generator) -> None:
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)


def _gaussian(down: Tensor, generator: torch.Generator) -> None:
    nn.init.normal_(down, std=1 / down.shape[0], generator=generator)


def _orthogonal(down: Tensor, generator: torch.Generator) -> None:
    nn.init.orthogonal_(down, generator=generator)


FILLS: dict[Init, Fill] = {"default": _kaiming, "gaussian": _gaussian, "orthogonal": _orthogonal}


def initial_pair(shape: tuple[int, ...], rank: int, init: Init, generator: torch.Generator) -> InitialPair:
    """A by `init` and B = 0, fp32 on the CPU, for a weight of `shape` (out, in[, kernel]).

    "default": Kaiming-uniform, as PEFT and the paper; "gaussian": N(0, 1/r), as PEFT; "orthogonal": orthonormal rows
    (as many as there are columns; beyond that, columns).
    """
    out, *rest = shape
    down = torch.empty(rank, *rest)
    FILLS[init](down, generator)
    return InitialPair(down, torch.zeros(out, rank, *[1] * (len(rest) - 1)))


def embedding_pair(shape: tuple[int, ...], rank: int, generator: torch.Generator) -> InitialPair:
    """A = 0 and B ~ N(0, 1), as PEFT: every token learns its own r numbers, of which B makes a direction."""
    dimension, tokens = shape
    return InitialPair(torch.zeros(rank, tokens), torch.randn(dimension, rank, generator=generator))


def principal_pair(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> InitialPair:
    """PiSSA (arXiv 2404.02948): s B A is W's best approximation of rank r, by a randomised SVD.

    PiSSA takes that part out of the base. Here the base stays as it is and the same pair, frozen, is subtracted: the
    same gradients at the first step, no change to the base's bytes, and a file of rank 2 r that fits anyone's base.
    """
    dense = rows(weight).to(master_dtype(weight.dtype))
    seed = int(torch.randint(0, 2**31, (1,), generator=generator))
    count = min(rank, *dense.shape)
    with torch.random.fork_rng(devices=[dense.device] if dense.is_cuda else []):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(dense, q=min(count + 8, *dense.shape), niter=4)
    root = (s[:count] / scale).sqrt()
    down = dense.new_zeros(rank, dense.shape[1])
    up = dense.new_zeros(dense.shape[0], rank)
    down[:count], up[:, :count] = root[:, None] * v[:, :count].T, u[:, :count] * root
    down, up = down.reshape(rank, *weight.shape[1:]), up.reshape(-1, rank, *[1] * (weight.dim() - 2))
    return InitialPair(down, up, InitialPair(down.clone(), up.clone()))
