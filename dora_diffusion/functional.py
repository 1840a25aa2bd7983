"""The mathematics of DoRA as pure functions. DoRA: arXiv 2402.09353; weight normalisation: arXiv 1602.07868.

Letters, as in the paper: W (out, in) frozen base weight; A (r, in) and B (out, r) the low-rank pair (here `down` and
`up`); s the scale, alpha / r; D = s B A; V = W + D; m (out,) the magnitude; N(V) the L2 norm of each row of V.

    W' = diag(g) V,   g = m / N(V)                                                              (paper, eq. 5)

A convolution's weights are flattened to rows: W (out, in kh kw), A (r, in kh kw), B (out, r). The bias never scales.
Norms and gains are fp32 whatever the weights' dtype: in bf16 the gain of most rows of a young adapter rounds to 1.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A row of W counts as zero up to this norm: it has no direction, so its gain is 1 (it still moves through D).
TINY_NORM = 1e-8
# Below this share of ||W||^2 + ||D||^2 the factored norm has lost its digits to cancellation and is taken densely.
CANCELLATION = 1e-3


def scale_of(alpha: float, rank: int, *, rank_stabilised: bool = False) -> float:
    """s = alpha / r, or alpha / sqrt(r) when rank-stabilised (arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if rank_stabilised else alpha / rank


def rows(weight: Tensor) -> Tensor:
    """(out, ...) -> (out, rest), a view where it can be."""
    return weight.reshape(weight.shape[0], -1)


def squared_row_norms(weight: Tensor) -> Tensor:
    """||W_i||^2 of every row: (out, ...) any float dtype -> (out,) fp32 (fp64 stays fp64)."""
    flat = rows(weight)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    norms: Tensor = torch.linalg.vector_norm(flat, dim=1)
    return norms.square()


def low_rank_delta(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """D = s B A, dense: down (r, in[, kh, kw]), up (out, r[, 1, 1]) -> (out, in[, kh, kw])."""
    return (scale * (rows(up) @ rows(down))).reshape(up.shape[0], *down.shape[1:])


def row_norms(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """N(W + D) of every row, without forming D.

        N(V)^2 = ||W||^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B (A A^T)) * B)

    W A^T (out, r) is the only large product. Rows in which the terms cancel are taken densely.

    Args:
        weight: (out, in[, kh, kw]), any float dtype.
        down: (r, in[, kh, kw]).
        up: (out, r[, 1, 1]).
        scale: s.

    Returns:
        (out,) fp32 (fp64 when the adapter is fp64), differentiable in `down` and `up`.
    """
    a, b = rows(down), rows(up)
    w = rows(weight).to(a.dtype)
    w_squared = squared_row_norms(w)
    cross = 2 * scale * ((w @ a.T) * b).sum(1)
    d_squared = scale**2 * ((b @ (a @ a.T)) * b).sum(1)
    squared = w_squared + cross + d_squared
    lost = (squared < CANCELLATION * (w_squared + d_squared)).detach()
    if bool(lost.any()):
        dense = (w[lost] + scale * (b[lost] @ a)).square().sum(1)
        squared = squared.masked_scatter(lost, dense)
    # sqrt has no gradient at 0; such a row's gain is fixed at 1 anyway.
    return squared.clamp(min=TINY_NORM**2).sqrt()


def initial_magnitude(weight: Tensor) -> Tensor:
    """m = N(W) (paper, section 4.1), by the very operations of `row_norms` at B = 0, so that the gain is exactly 1."""
    w = rows(weight)
    w = w if w.dtype == torch.float64 else w.float()
    return squared_row_norms(w).clamp(min=TINY_NORM**2).sqrt()


def gain(weight: Tensor, magnitude: Tensor, norm: Tensor) -> Tensor:
    """g = m / N(V), (out,). A row of W that is zero has no magnitude to keep: its gain is 1, and it adapts as LoRA."""
    has_direction = (squared_row_norms(weight) > TINY_NORM**2) & (norm > TINY_NORM)
    return torch.where(has_direction, magnitude / norm, torch.ones_like(norm))


def dora_gain(weight: Tensor, down: Tensor, up: Tensor, scale: float, magnitude: Tensor, *, exact: bool) -> Tensor:
    """g for the forward pass. `exact=False` holds N(V) constant in the backward pass (paper, section 4.3)."""
    with torch.autocast(weight.device.type, enabled=False):  # autocast would take the products in bf16
        if exact:
            return gain(weight, magnitude, row_norms(weight, down, up, scale))
        with torch.no_grad():
            norm = row_norms(weight, down, up, scale)
        return gain(weight, magnitude, norm)


def dora_weight(weight: Tensor, down: Tensor, up: Tensor, scale: float, magnitude: Tensor | None) -> Tensor:
    """The dense W' = diag(g) (W + D), or W + D without magnitude: fp32 (out, in[, kh, kw])."""
    dense = weight.to(down.dtype) + low_rank_delta(down, up, scale)
    if magnitude is None:
        return dense
    g = gain(weight, magnitude, row_norms(weight, down, up, scale))
    return g.reshape(-1, *[1] * (weight.dim() - 1)) * dense


class _Compose(torch.autograd.Function):
    """y = base + (g - 1) * inner + low,  inner = base - b + low; saves `inner` and g, nothing else."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, low: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
        inner = (base if bias is None else base - bias.to(base.dtype)) + low
        ctx.save_for_backward(inner, g)
        return base + (g - 1).to(base.dtype) * inner + low

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        inner, g = ctx.saved_tensors
        through = g.to(dy.dtype) * dy
        dg = (dy.to(g.dtype) * inner.to(g.dtype)).sum_to_size(g.shape)
        return through, through, dg, None


def compose(base: Tensor, low: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
    """y = g (base - b + low) + b, written so that g = 1 and low = 0 give `base` bit for bit.

    Args:
        base: the base layer's output, bias included: (..., out) or (N, out, H, W).
        low: s B(A x), of the same shape.
        g: fp32 gain, shaped to broadcast against `base` with as many dimensions: (1, ..., out) or (1, out, 1, 1).
        bias: the base's bias in a shape that broadcasts, or None.

    Returns:
        Same shape and dtype as `base`. In the backward pass dg = sum over tokens of dy * inner, in fp32.
    """
    y: Tensor = _Compose.apply(base, low, g, bias)  # type: ignore[no-untyped-call]
    return y


@dataclass(frozen=True)
class GainForm:
    """One adapter, or any sum of adapters, on one layer: W' = diag(1 + gain_offset) W + left right.

    `gain_offset` (out,) is c - 1, kept apart from 1 so that small gains keep their digits; `left` (out, R) and
    `right` (R, in kh kw) are the low-rank part, fp32.
    """

    gain_offset: Tensor
    left: Tensor
    right: Tensor

    def to(self, device: torch.device) -> "GainForm":
        """The same form on a device; itself when it is there already."""
        if self.left.device == device:
            return self
        return GainForm(self.gain_offset.to(device), self.left.to(device), self.right.to(device))


def gain_form(
    weight: Tensor, down: Tensor, up: Tensor, scale: float, magnitude: Tensor | None, *, strength: float
) -> GainForm:
    """W(strength) = W + strength (W' - W) as a gain form: c = 1 + strength (g - 1), P = strength diag(g) s B, Q = A."""
    left = strength * scale * rows(up)
    if magnitude is None:
        return GainForm(torch.zeros(up.shape[0], dtype=up.dtype, device=up.device), left, rows(down))
    g = gain(weight, magnitude, row_norms(weight, down, up, scale))
    return GainForm(strength * (g - 1), g[:, None] * left, rows(down))


def sum_gain_forms(forms: list[GainForm]) -> GainForm:
    """The additive blend of several adapters on one layer, exact for any mix of LoRA and DoRA; order is nothing."""
    offset = torch.stack([form.gain_offset for form in forms]).sum(0)
    return GainForm(offset, torch.cat([f.left for f in forms], dim=1), torch.cat([f.right for f in forms]))


def apply_gain_form(weight: Tensor, form: GainForm) -> Tensor:
    """The dense weight of a gain form, rounded once to the dtype of `weight`."""
    w = rows(weight).to(form.left.dtype)
    return (w + form.gain_offset[:, None] * w + form.left @ form.right).reshape(weight.shape).to(weight.dtype)
