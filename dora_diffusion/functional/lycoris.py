"""Other ways to write a difference D of a weight: Tucker, LoHa, LoKr, whole. Each is also an exact low-rank pair.

LoHa (FedPara): arXiv 2108.06098. LoKr, and Tucker for convolutions: LyCORIS, arXiv 2309.14859. Names as in LyCORIS'
files. So that everything that draws knows one form only, each has a pair P Q = D: of rank r for Tucker, r^2 for LoHa,
i1 r for LoKr (i1: columns of the small factor), min(out, in) at most.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_diffusion.functional.dora import rows

Factors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Pair:
    """D = P Q.

    Attributes:
        left: P, (out, R).
        right: Q, (R, in kh kw).
    """

    left: Tensor
    right: Tensor


def tucker_down(down: Tensor, mid: Tensor) -> Tensor:
    """A of a Tucker pair: the core (r, r, kh, kw) over down (r, in, 1, 1) -> (r, in, kh, kw)."""
    return torch.einsum("mn...,nj->mj...", mid, rows(down))


def _tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """core (i, j, kh, kw), left (i, p), right (j, q) -> (p, q, kh, kw)."""
    return torch.einsum("ij...,ip,jq->pq...", core, left, right)


def hadamard_delta(factors: Factors) -> Tensor:
    """LoHa: D = (w1_a w1_b) * (w2_a w2_b), (out, in kh kw), or (out, in, kh, kw) with Tucker cores."""
    first, second = (_hadamard_half(factors, number) for number in (1, 2))
    return first * second


def _hadamard_half(factors: Factors, number: int) -> Tensor:
    a, b, core = (factors.get(f"hada_{name}") for name in (f"w{number}_a", f"w{number}_b", f"t{number}"))
    assert a is not None and b is not None
    return a @ b if core is None else _tucker(core, a, b)


def hadamard_pair(factors: Factors) -> Pair:
    """The r^2 products of columns of w1_a and w2_a, and of rows of w1_b and w2_b (their Khatri-Rao products)."""
    halves = [_hadamard_pair_half(factors, number) for number in (1, 2)]
    (a1, b1), (a2, b2) = ((half.left, half.right) for half in halves)
    left = (a1[:, :, None] * a2[:, None, :]).flatten(1)
    right = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)
    return Pair(left, right)


def _hadamard_pair_half(factors: Factors, number: int) -> Pair:
    a, b, core = (factors.get(f"hada_{name}") for name in (f"w{number}_a", f"w{number}_b", f"t{number}"))
    assert a is not None and b is not None
    if core is None:
        return Pair(a, b)
    return Pair(a.T, torch.einsum("ij...,jq->iq...", core, b).flatten(1))


def kronecker_factor(factors: Factors, number: int) -> Tensor:
    """w1 or w2 of LoKr, multiplied out: whole, a pair, or (w2 of a convolution) a Tucker pair."""
    whole = factors.get(f"lokr_w{number}")
    if whole is not None:
        return whole
    a, b, core = factors[f"lokr_w{number}_a"], factors[f"lokr_w{number}_b"], factors.get(f"lokr_t{number}")
    return (a @ rows(b)).reshape(a.shape[0], *b.shape[1:]) if core is None else _tucker(core, a, b)


def kronecker_delta(factors: Factors) -> Tensor:
    """LoKr: D = kron(w1, w2), (out, in[, kh, kw]); flat where a convolution's w2 is, (o2, i2 kh kw)."""
    return _kron(kronecker_factor(factors, 1), kronecker_factor(factors, 2))


def _kron(first: Tensor, second: Tensor) -> Tensor:
    """(o1, i1[, ...]) and (o2, i2[, kh, kw]) -> (o1 o2, i1 i2[, kh, kw]).

    torch.kron fails on some strides of dimensions of one element, which `contiguous()` leaves as they are.
    """
    (o1, i1), (o2, i2, *kernel) = first.shape[:2], second.shape
    wide = first.reshape(o1, 1, i1, 1, *[1] * len(kernel)) * second.reshape(1, o2, 1, i2, *kernel)
    return wide.reshape(o1 * o2, i1 * i2, *kernel)


def kronecker_pair(factors: Factors) -> Pair:
    """kron(P1 Q1, P2 Q2) = kron(P1, P2) kron(Q1, Q2)."""
    first, second = _kronecker_half(factors, 1), _kronecker_half(factors, 2)
    return Pair(_kron(first.left, second.left), _kron(first.right, second.right))


def _kronecker_half(factors: Factors, number: int) -> Pair:
    a, b = factors.get(f"lokr_w{number}_a"), factors.get(f"lokr_w{number}_b")
    if a is None or b is None:
        return dense_pair(kronecker_factor(factors, number))
    core = factors.get(f"lokr_t{number}")
    if core is None:
        return Pair(a, rows(b))
    return Pair(a.T, torch.einsum("ij...,jq->iq...", core, b).flatten(1))


def pair_norm(left: Tensor, right: Tensor) -> Tensor:
    """||P Q||, the root of the sum of squares, without forming P Q where its rank is low: sum(P^T P * Q Q^T)."""
    (out, rank), columns = left.shape, right.shape[1]
    if out * columns <= rank * rank:
        whole: Tensor = torch.linalg.vector_norm(left @ right)
        return whole
    return ((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt()


def kronecker_norm(factors: Factors) -> Tensor:
    """||kron(w1, w2)|| = ||w1|| ||w2||."""
    halves = [_kronecker_half(factors, number) if f"lokr_w{number}" not in factors else None for number in (1, 2)]
    norms = [
        torch.linalg.vector_norm(factors[f"lokr_w{number}"]) if half is None else pair_norm(half.left, half.right)
        for number, half in enumerate(halves, start=1)
    ]
    product: Tensor = norms[0] * norms[1]
    return product


def dense_pair(delta: Tensor) -> Pair:
    """D itself beside an identity, on the smaller side."""
    flat = rows(delta)
    out, columns = flat.shape
    if out < columns:
        return Pair(torch.eye(out, dtype=flat.dtype, device=flat.device), flat)
    return Pair(flat, torch.eye(columns, dtype=flat.dtype, device=flat.device))
