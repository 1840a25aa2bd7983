"""Merging in the space of differences: what each adapter changes of one weight, T_i = W'_i - W, made into one.

    svd                sum w_i T_i                            task arithmetic, arXiv 2212.04089; saved at its best rank
    magnitude-prune    sum w_i top(T_i)                       top: the `density` largest entries of each
    dare-linear        sum w_i drop(T_i)                      DARE, arXiv 2311.03099: a random share, times 1 / density
    ties               mean over the agreeing of w_i top(T_i)                               TIES, arXiv 2306.01708
    dare-ties          mean over the agreeing of w_i drop(T_i)

An entry agrees when its sign is the elected one: of the sum over all adapters (of their signs, by `elect="frequency"`).
As in PEFT the sign is elected before the weights, so that a negative weight subtracts, and the mean counts the
agreeing adapters, not their weights. What entries are kept is decided over the whole layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Election = Literal["total", "frequency"]


@dataclass(frozen=True)
class Sparsity:
    """How differences are thinned out before they are merged.

    Attributes:
        density: the share of entries that stays, above 0 and at most 1.
        generator: where DARE's choice comes from, on the device of the tensors; None for torch's own.
        elect: whether a sign is elected by the sum of entries or by their number.
    """

    density: float = 0.5
    generator: torch.Generator | None = None
    elect: Election = "total"

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be above 0 and at most 1, got {self.density}")
        if self.elect not in ("total", "frequency"):
            raise ValueError(f"elect must be 'total' or 'frequency', got {self.elect!r}")


Method = Callable[[Sequence[Tensor], Sequence[float], Sparsity], Tensor]


def keep_largest(delta: Tensor, density: float) -> Tensor:
    """The int(density n) entries of the largest magnitude, zeros elsewhere; same shape and dtype."""
    if density == 1:
        return delta
    kept = torch.topk(delta.abs().flatten(), int(density * delta.numel())).indices
    mask = torch.zeros_like(delta).flatten()
    mask[kept] = 1
    return delta * mask.reshape(delta.shape)


def drop_and_rescale(delta: Tensor, density: float, generator: torch.Generator | None = None) -> Tensor:
    """Each entry kept with probability `density`, and divided by it, so that its mean stays; same shape and dtype."""
    if density == 1:
        return delta
    return delta * torch.bernoulli(torch.full_like(delta, density), generator=generator) / density


def linear(deltas: Sequence[Tensor], weights: Sequence[float], sparsity: Sparsity) -> Tensor:
    """sum w_i T_i; nothing is thinned out. Tensors of one shape and dtype -> the same."""
    return _weighted(deltas, weights).sum(0)


def magnitude_prune(deltas: Sequence[Tensor], weights: Sequence[float], sparsity: Sparsity) -> Tensor:
    """sum w_i of the largest entries of each T_i."""
    return _weighted([keep_largest(delta, sparsity.density) for delta in deltas], weights).sum(0)


def dare_linear(deltas: Sequence[Tensor], weights: Sequence[float], sparsity: Sparsity) -> Tensor:
    """sum w_i of a random share of each T_i; the generator serves the adapters in turn."""
    return _weighted(_dropped(deltas, sparsity), weights).sum(0)


def ties(deltas: Sequence[Tensor], weights: Sequence[float], sparsity: Sparsity) -> Tensor:
    """The largest entries of each T_i, the elected signs of those, and the mean of the adapters that agree."""
    return _elected([keep_largest(delta, sparsity.density) for delta in deltas], weights, sparsity.elect)


def dare_ties(deltas: Sequence[Tensor], weights: Sequence[float], sparsity: Sparsity) -> Tensor:
    """A random share of each T_i, the elected signs of those, and the mean of the adapters that agree."""
    return _elected(_dropped(deltas, sparsity), weights, sparsity.elect)


METHODS: Mapping[str, Method] = {
    "svd": linear,
    "magnitude-prune": magnitude_prune,
    "dare-linear": dare_linear,
    "ties": ties,
    "dare-ties": dare_ties,
}

METHOD_SENTENCES: Mapping[str, str] = {
    "svd": "Adds up whole differences and keeps the best rank of the sum (a singular value decomposition).",
    "magnitude-prune": "Keeps the largest entries of each difference and adds them up.",
    "dare-linear": "Drops entries at random, makes up for them in the rest, and adds up.",
    "ties": "Keeps the largest entries, lets the adapters vote on each sign, and averages those that agree.",
    "dare-ties": "Drops entries at random, lets the adapters vote on each sign, and averages those that agree.",
}


def _dropped(deltas: Sequence[Tensor], sparsity: Sparsity) -> list[Tensor]:
    return [drop_and_rescale(delta, sparsity.density, sparsity.generator) for delta in deltas]


def _weighted(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """(adapters, ...)."""
    stacked = torch.stack(list(deltas))
    factors = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device)
    return stacked * factors.reshape(-1, *[1] * (stacked.dim() - 1))


def _elected(deltas: Sequence[Tensor], weights: Sequence[float], elect: Election) -> Tensor:
    signs = torch.stack([delta.sign() for delta in deltas])
    votes = torch.stack(list(deltas)).sum(0) if elect == "total" else signs.sum(0)
    agreeing = signs == torch.where(votes >= 0, 1, -1)
    return (_weighted(deltas, weights) * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)
