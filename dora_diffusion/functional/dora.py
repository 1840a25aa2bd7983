"""The mathematics of DoRA as pure functions. DoRA: arXiv 2402.09353; weight normalisation: arXiv 1602.07868.

Letters, as in the paper: W (out, in) frozen base weight; A (r, in) and B (out, r) the low-rank pair (here `down` and
`up`); s the scale, alpha / r; D = s B A; V = W + D; m (out,) the magnitude; N(V) the L2 norm of each row of V.

    W' = diag(g) V,   g = m / N(V)                                                              (paper, eq. 5)

A convolution's weights are flattened to rows: W (out, in kh kw), A (r, in kh kw), B (out, r). The bias never scales.
Norms and gains are fp32 whatever the weights' dtype: in bf16 the gain of most rows of a young adapter rounds to 1.

Older files hold magnitudes of the other axis, one per input: W' = V diag(m / N(V)) with the norms of V's columns.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Axis = Literal["out", "in"]
AXES: tuple[Axis, ...] = ("out", "in")  # in the order of a weight's dimensions

# A row of W counts as zero up to this norm: it has no direction, so its gain is 1 (it still moves through D).
TINY_NORM = 1e-8
# Below this share of ||W||^2 the factored norm has lost its digits to cancellation and is taken densely.
CANCELLATION = 2e-3
# A weight of another dtype is cast to fp32 this many numbers at a time, so that no fp32 copy of it is ever whole.
BLOCK = 2**20


def scale_of(alpha: float, rank: int, *, rank_stabilised: bool = False) -> float:
    """s = alpha / r, or alpha / sqrt(r) when rank-stabilised (arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if rank_stabilised else alpha / rank


def rows(weight: Tensor) -> Tensor:
    """(out, ...) -> (out, rest), a view where it can be."""
    return weight if weight.dim() == 2 else weight.reshape(weight.shape[0], -1)


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a weight in `dtype`: all at once where that copies nothing, else a block at a time."""
    if weight.dtype == dtype and (weight.dim() == 2 or weight.is_contiguous()):
        yield slice(0, weight.shape[0]), rows(weight)
        return
    # on the meta device there is nothing to spare
    count = weight.shape[0] if weight.is_meta else max(1, BLOCK // max(1, weight[0].numel()))
    for start in range(0, weight.shape[0], count):
        block = slice(start, min(start + count, weight.shape[0]))
        yield block, rows(weight[block]).to(dtype)


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """What norms and trained parameters are kept in beside a weight of `dtype`: fp32, or fp64 beside fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def squared_row_norms(weight: Tensor) -> Tensor:
    """||W_i||^2 of every row: (out, ...) any float dtype -> (out,) fp32 (fp64 stays fp64)."""
    dtype = master_dtype(weight.dtype)
    squares = torch.empty(weight.shape[0], dtype=dtype, device=weight.device)
    for block, w in _blocks(weight, dtype):
        squares[block] = torch.linalg.vector_norm(w, dim=1).square()
    return squares


def low_rank_delta(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """D = s B A, dense: down (r, in[, kh, kw]), up (out, r[, 1, 1]) -> (out, in[, kh, kw])."""
    return (scale * (rows(up) @ rows(down))).reshape(up.shape[0], *down.shape[1:])


@dataclass(frozen=True)
class RowSums:
    """All that the norm needs of W. It is read once for both, and no (out, in) temporary is made.

    Attributes:
        squares: ||W_i||^2, (out,).
        products: W A^T, (out, r).
    """

    squares: Tensor
    products: Tensor


@torch.no_grad()
def row_sums(weight: Tensor, down: Tensor) -> RowSums:
    """weight (out, in[, kh, kw]) of any float dtype, down (r, in[, kh, kw]) -> RowSums in the dtype of `down`."""
    a = rows(down)
    squares, products = a.new_empty(weight.shape[0]), a.new_empty(weight.shape[0], a.shape[0])
    with torch.autocast(weight.device.type, enabled=False):  # autocast would take the products in bf16
        for block, w in _blocks(weight, a.dtype):
            squares[block] = torch.linalg.vector_norm(w, dim=1).square()
            products[block] = w @ a.T
    return RowSums(squares, products)


class _Products(torch.autograd.Function):
    """W A^T as a function of A alone, its value known beforehand: dA = dP^T W, a block of W at a time."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, known: Tensor) -> Tensor:
        ctx.weight = weight  # frozen: neither a gradient nor a version to watch
        return known.clone()

    @staticmethod
    def backward(ctx: Any, d_products: Tensor) -> tuple[Tensor, None, None]:
        d_a = d_products.new_zeros(d_products.shape[1], ctx.weight[0].numel())
        for block, w in _blocks(ctx.weight, d_products.dtype):
            d_a.addmm_(d_products[block].T, w)
        return d_a, None, None


@dataclass(frozen=True)
class RowNorms:
    """N(V) of every row.

    Attributes:
        values: (out,), never 0; differentiable in A and B when they were.
        dead: (out,) bool, the rows that have no direction to scale; None when all have one.
    """

    values: Tensor
    dead: Tensor | None


@dataclass(frozen=True)
class SquaredNorms:
    """N(V)^2 of every row as the factored formula has it, and the rows for which it is not enough.

    Attributes:
        values: (out,); differentiable in A and B when they were.
        lost: (out,) bool, rows in which the terms cancel.
        dead: (out,) bool, rows of W without a direction.
    """

    values: Tensor
    lost: Tensor
    dead: Tensor


@dataclass(frozen=True)
class Rare:
    """Whether any row of a weight is lost, and whether any is dead; both depend on the values alone."""

    lost: bool
    dead: bool


def squared_norms(sums: RowSums, weight: Tensor, down: Tensor, up: Tensor, scale: float) -> SquaredNorms:
    """N(W + D)^2 of every row, from what is known of W; ||W + D|| of the paper's eq. 5, multiplied out.

    N(V)^2 = ||W||^2 + rowsum(B * (2 s W A^T + s^2 B (A A^T)))
    """
    with torch.autocast(weight.device.type, enabled=False):
        a, b = rows(down), rows(up)
        products = sums.products
        if torch.is_grad_enabled() and a.requires_grad:
            products = _Products.apply(a, weight, sums.products)  # type: ignore[no-untyped-call]
        mixed = torch.addmm(products, b, a @ a.T, beta=2 * scale, alpha=scale**2)
        squared = sums.squares + (b * mixed).sum(1)
        # N(V) can only be far below ||W|| where D is about -W
        return SquaredNorms(squared, squared.detach() < CANCELLATION * sums.squares, sums.squares <= TINY_NORM**2)


def rare_rows(squared: Sequence[SquaredNorms]) -> list[Rare]:
    """For each of several weights, what it has of rare rows; one wait for their device in all."""
    if not squared:
        return []
    device = squared[0].values.device
    flags = [torch.stack([one.lost.any(), one.dead.any()]).to(device, non_blocking=True) for one in squared]
    return [Rare(*pair) for pair in torch.stack(flags).tolist()]


def finished_norms(
    squared: SquaredNorms, rare: Rare, weight: Callable[[], Tensor], down: Tensor, up: Tensor, scale: float
) -> RowNorms:
    """N(W + D) of every row; those in which the terms cancel are taken densely: then alone `weight` is asked for."""
    values, dead, some_dead = squared.values, squared.dead, rare.dead
    with torch.autocast(values.device.type, enabled=False):
        if rare.lost:
            a, b, lost = rows(down), rows(up), squared.lost
            dense = (rows(weight()[lost]).to(a.dtype) + scale * (b[lost] @ a)).square().sum(1)
            values = values.masked_scatter(lost, dense)
            dead, some_dead = dead | (values.detach() <= TINY_NORM**2), True
        # sqrt has no gradient at 0; such a row's gain is fixed at 1 anyway.
        return RowNorms(values.clamp(min=TINY_NORM**2).sqrt(), dead if some_dead else None)


def norms_from(
    sums: RowSums, weight: Tensor, down: Tensor, up: Tensor, scale: float, *, rare: Rare | None = None
) -> RowNorms:
    """N(W + D) of every row, from what is known of W; see `squared_norms`.

    Args:
        sums: of the weight.
        weight: (out, in[, kh, kw]).
        down: (r, in[, kh, kw]).
        up: (out, r[, 1, 1]).
        scale: s.
        rare: what these very values have of rare rows, when it is known; else it is asked of the device.
    """
    squared = squared_norms(sums, weight, down, up, scale)
    if rare is None:
        (rare,) = rare_rows([squared])
    return finished_norms(squared, rare, lambda: weight, down, up, scale)


def row_norms(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """N(W + D) of every row, without forming D.

    Args:
        weight: (out, in[, kh, kw]), any float dtype.
        down: (r, in[, kh, kw]).
        up: (out, r[, 1, 1]).
        scale: s.

    Returns:
        (out,) fp32 (fp64 when the adapter is fp64), differentiable in `down` and `up`.
    """
    return norms_from(row_sums(weight, down), weight, down, up, scale).values


def column_norms(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """N(V) of every column, (in,): a convolution's columns run over outputs and kernel positions.

    Each kernel position is a matrix of its own, whose columns are the rows of its transpose: D^T = s A^T B^T.
    """
    b, count = rows(up), weight.shape[1]
    taps, a = weight.reshape(*weight.shape[:2], -1), down.reshape(-1, count, weight[0, 0].numel())
    squared = [row_norms(taps[..., k].T, b.T, a[..., k].T, scale).square() for k in range(taps.shape[2])]
    return torch.stack(squared).sum(0).sqrt()


def initial_magnitude(weight: Tensor) -> Tensor:
    """m = N(W) (paper, section 4.1), by the very operations of `row_norms` at B = 0, so that the gain is exactly 1."""
    return squared_row_norms(weight).clamp(min=TINY_NORM**2).sqrt()


def count_zero_rows(initial: Tensor) -> int:
    """How many rows of W have no direction, from its initial magnitude."""
    return int((initial < 1.5 * TINY_NORM).sum())


def gain(magnitude: Tensor, norms: RowNorms) -> Tensor:
    """g = m / N(V), (out,).

    A row of W that is zero has no magnitude to keep: its gain is 1, and it adapts as LoRA.
    """
    g = magnitude / norms.values
    return g if norms.dead is None else g.masked_fill(norms.dead, 1.0)


def dora_weight(
    weight: Tensor, down: Tensor, up: Tensor, scale: float, magnitude: Tensor | None, *, axis: Axis = "out"
) -> Tensor:
    """The dense W' = diag(g) (W + D), or (W + D) diag(g) for the in axis, or W + D: fp32 (out, in[, kh, kw])."""
    dense = weight.to(down.dtype) + low_rank_delta(down, up, scale)
    if magnitude is None:
        return dense
    shape = [1] * weight.dim()
    shape[AXES.index(axis)] = -1
    return dense * static_gain(weight, down, up, scale, magnitude, axis=axis).reshape(shape)


def static_gain(weight: Tensor, down: Tensor, up: Tensor, scale: float, magnitude: Tensor, *, axis: Axis) -> Tensor:
    """g of an adapter that is not being trained, one per output or one per input."""
    if axis == "in":
        dead = squared_row_norms(weight.transpose(0, 1)) <= TINY_NORM**2
        return gain(magnitude, RowNorms(column_norms(weight, down, up, scale), dead))
    return gain(magnitude, norms_from(row_sums(weight, down), weight, down, up, scale))


class _Compose(torch.autograd.Function):
    """y = g (base - b + low) + b; saves inner = base + low (when m is trained) and g, nothing else."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, low: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
        inner = base + low
        offset = (g - 1).to(base.dtype)
        y = torch.addcmul(inner, offset, inner)  # with g = 1 and low = 0 this is `base`, bit for bit
        if bias is not None:
            y.sub_(offset * bias)
        ctx.save_for_backward(inner if ctx.needs_input_grad[2] else None, g, bias)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        inner, g, bias = ctx.saved_tensors
        through = g.to(dy.dtype) * dy
        if inner is None:
            return through, through, None, None
        if bias is not None:
            inner = inner - bias
        dg = (dy.to(g.dtype) * inner.to(g.dtype)).sum_to_size(g.shape)
        return through, through, dg, None


def compose(base: Tensor, low: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
    """y = g (base - b + low) + b: a DoRA layer's output from its base's output and its low-rank branch.

    Args:
        base: the base layer's output, bias included: (..., out) or (N, out, H, W).
        low: s B(A x), of the same shape.
        g: fp32 gain, in a shape that broadcasts against `base`: (out,) or (out, 1, 1).
        bias: the base's bias in the shape of g, or None.

    Returns:
        Same shape and dtype as `base`; `base` itself, bit for bit, at g = 1 and low = 0. In the backward pass
        dg = sum over tokens of dy * (base - b + low), in fp32; base and low both receive g dy.
    """
    y: Tensor = _Compose.apply(base, low, g, bias)  # type: ignore[no-untyped-call]
    return y


@dataclass(frozen=True)
class GainForm:
    """One adapter, or any sum of adapters, on one layer:  W' = diag(c) W + W diag(c_in - 1) + P Q.

    Attributes:
        gain_offset: c - 1, (out,), kept apart from 1 so that small gains keep their digits; 0 for plain LoRA.
        left: P, (out, R).
        right: Q, (R, in kh kw).
        in_offset: c_in - 1, (in,), or None when no adapter has magnitudes of the in axis.
    """

    gain_offset: Tensor
    left: Tensor
    right: Tensor
    in_offset: Tensor | None = None


def gain_form(
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    magnitude: Tensor | None,
    *,
    strength: float = 1.0,
    axis: Axis = "out",
) -> GainForm:
    """W(strength) = W + strength (W' - W) as a gain form.

    Out axis: c = 1 + strength (g - 1), P = strength diag(g) s B, Q = A. In axis: c_in likewise, P = strength s B,
    Q = A diag(g). LoRA: c = 1, P = strength s B, Q = A.
    """
    none = torch.zeros(up.shape[0], dtype=up.dtype, device=up.device)
    left, right = strength * scale * rows(up), rows(down)
    if magnitude is None:
        return GainForm(none, left, right)
    g = static_gain(weight, down, up, scale, magnitude, axis=axis)
    if axis == "in":
        return GainForm(none, left, right * g.repeat_interleave(weight[0, 0].numel()), strength * (g - 1))
    return GainForm(strength * (g - 1), g[:, None] * left, right)


def scale_gain_form(form: GainForm, strength: float) -> GainForm:
    """The same change of the weight, times `strength`."""
    in_offset = None if form.in_offset is None else strength * form.in_offset
    return GainForm(strength * form.gain_offset, strength * form.left, form.right, in_offset)


def sum_gain_forms(forms: list[GainForm]) -> GainForm:
    """The additive blend of several adapters on one layer, exact for any mix of LoRA and DoRA; order is nothing."""
    offset = torch.stack([form.gain_offset for form in forms]).sum(0)
    inputs = [form.in_offset for form in forms if form.in_offset is not None]
    in_offset = torch.stack(inputs).sum(0) if inputs else None
    left, right = torch.cat([f.left for f in forms], dim=1), torch.cat([f.right for f in forms])
    return GainForm(offset, left, right, in_offset)


def apply_gain_form(weight: Tensor, form: GainForm) -> Tensor:
    """The dense weight of a gain form, computed in fp32 and rounded once to the dtype of `weight`."""
    folded = torch.empty_like(weight, memory_format=torch.contiguous_format)
    factor = form.gain_offset[:, None]
    if form.in_offset is not None:
        factor = factor + form.in_offset.repeat_interleave(weight[0, 0].numel())
    for block, w in _blocks(weight, form.left.dtype):
        target = rows(folded)[block]
        dense = torch.addcmul(w, w, factor[block], out=target if target.dtype == w.dtype else None)
        dense.addmm_(form.left[block], form.right)
        if dense.dtype != target.dtype:
            target.copy_(dense)
    return folded
