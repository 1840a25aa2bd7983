"""Best low-rank pairs: of a dense difference, of a product of factors, of a DoRA that turns one weight into another.

A truncated SVD is the best approximation of its rank (Eckart and Young, 1936). Small matrices are decomposed exactly;
of a large one only the leading subspace is found, by iterating on a random start (Halko, Martinsson and Tropp, 2011,
algorithm 4.4) until it settles. Everything is fp32 (fp64 beside fp64) and one layer at a time; weights of convolutions
are flattened to rows.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_diffusion.factorisations import Pair
from dora_diffusion.functional import TINY_NORM, dora_weight, master_dtype, rows, squared_row_norms

# Directions beyond the rank that is asked for: the others settle the faster for them.
OVERSAMPLING = 16
# Up to this smaller side the whole decomposition costs no more than iterating.
SMALL_SIDE = 192
# A subspace has settled when a step adds less than this share of the energy it holds; it takes at most so many steps.
SETTLED = 1e-6
STEPS = 12
# Extraction stops when a round moves diag(c) T by less than this share of T - W.
STEADY = 1e-6
# c stays within this factor of its start: beyond it V would turn against T, and c below 0 has no meaning.
FARTHEST = 100.0


@dataclass(frozen=True)
class DoRAParts:
    """W' = diag(m / N(V)) V with V = W + P Q.

    Attributes:
        pair: P (out, r) and Q (r, in kh kw), of equal size.
        magnitude: m, (out,).
    """

    pair: Pair
    magnitude: Tensor


@torch.no_grad()
def low_rank(delta: Tensor, rank: int, *, error: float = 0.0, generator: torch.Generator | None = None) -> Pair:
    """The best pair of a rank for a dense D.

    Args:
        delta: D, (out, in[, kh, kw]), any float dtype.
        rank: r, at least 1; what is above the smaller side is capped.
        error: keep no more ranks than leave a relative error ||D - P Q|| / ||D|| of this, as far as `rank` reaches.
        generator: where the random start of large matrices comes from; None for one of a fixed seed.

    Returns:
        P (out, r) and Q (r, in kh kw) with factors of equal size, fp32 (fp64 of fp64).
    """
    matrix, most = _matrix(delta), _capped(rank, delta)
    sought = most if error == 0 else min(most, OVERSAMPLING)
    while True:
        found = _leading(matrix, _start(matrix, sought, generator))
        kept = sought if error == 0 else _ranks_within(matrix, found, error)
        if kept <= sought or sought == most:
            return found.pair(min(kept, most))
        sought = min(2 * sought, most)


@torch.no_grad()
def recompress(left: Tensor, right: Tensor, rank: int, *, error: float = 0.0) -> Pair:
    """The best pair of a rank for the product P Q of another pair, which is not formed.

    Args:
        left: P, (out, R[, 1, 1]).
        right: Q, (R, in[, kh, kw]).
        rank: r, at least 1; what is above R or a side of the matrix is capped.
        error: as in `low_rank`.

    Returns:
        As `low_rank`.
    """
    outer, first = torch.linalg.qr(_matrix(left))
    inner, second = torch.linalg.qr(_matrix(right).T)
    core = low_rank(first @ second.T, rank, error=error)
    return Pair(outer @ core.left, core.right @ inner.T)


@torch.no_grad()
def extract_dora(
    tuned: Tensor,
    base: Tensor,
    rank: int,
    *,
    rounds: int = 30,
    error: float = 0.0,
    generator: torch.Generator | None = None,
) -> DoRAParts:
    """The DoRA of a rank that comes nearest to turning W into T.

    m = N(T). D and c = N(V) / m are found in turn, from c = N(W) / N(T):

        D = SVD_r(diag(c) T - W),   c_i = <T_i, (W + D)_i> / <T_i, T_i>

    which makes ||diag(c) T - (W + D)|| smaller with each half of a round. A row of W that is zero has no magnitude
    (its gain is 1), so its c is 1; for a row of T that is zero m = 0 is enough, and D leaves it alone.

    Args:
        tuned: T, (out, in[, kh, kw]), any float dtype.
        base: W, of the same shape.
        rank: r, at least 1; what is above the smaller side is capped.
        rounds: at most this many; it stops when c does.
        error: keep no more ranks than leave ||W' - T|| / ||T - W|| at this, as far as `rank` reaches.
        generator: as in `low_rank`.
    """
    if tuned.shape != base.shape:
        raise ValueError(f"tuned weight {tuple(tuned.shape)} beside a base of {tuple(base.shape)}: expected one shape")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    t, w = _matrix(tuned), _matrix(base)
    most, delta, magnitude = _capped(rank, t), t - w, squared_row_norms(t).sqrt()
    known = _what_is_known(t, w, delta)
    best = _alternate(t, delta, known, _start(t, most, generator), most, rounds)
    low = 1 if error > 0 else most
    while low < most:  # a D of more directions than needed uses them all, so each rank is tried for itself
        middle = (low + most) // 2
        found = _alternate(t, delta, known, best.right, middle, rounds)
        pair = found.pair(middle)
        if relative_error(dora_weight(w, pair.right, pair.left, 1.0, magnitude), t, w) <= error:
            most, best = middle, found
        else:
            low = middle + 1
    return DoRAParts(best.pair(most), magnitude)


def relative_error(actual: Tensor, expected: Tensor, base: Tensor | None = None) -> float:
    """||actual - expected|| / ||expected - base||, base 0 by default; 0 where both norms are 0. Any float dtype."""
    goal = _matrix(expected)
    missed = float(torch.linalg.vector_norm(_matrix(actual) - goal))
    size = float(torch.linalg.vector_norm(goal if base is None else goal - _matrix(base)))
    return missed / size if size > 0 else (math.inf if missed > 0 else 0.0)


@dataclass(frozen=True)
class _Triplets:
    """matrix ~ left diag(values) right^T: left (out, k), values (k,) descending, right (columns, k)."""

    left: Tensor
    values: Tensor
    right: Tensor

    def pair(self, rank: int) -> Pair:
        """The leading ranks, with factors of equal size."""
        root = self.values[:rank].sqrt()
        return Pair(self.left[:, :rank] * root, root[:, None] * self.right[:, :rank].T)


@dataclass(frozen=True)
class _Rows:
    """What extraction knows of each row, (out,).

    Attributes:
        squares: <T, T>, never 0.
        shared: <T, T - W>.
        start: c - 1 to start from.
        fixed: the rows whose c is not sought, because W or T is zero.
    """

    squares: Tensor
    shared: Tensor
    start: Tensor
    fixed: Tensor

    def sought(self, products: Tensor) -> Tensor:
        """The best c - 1 for a D, from <T, D>."""
        first = 1 + self.start
        best = (products - self.shared) / self.squares
        best = torch.minimum(torch.maximum(best, first / FARTHEST - 1), first * FARTHEST - 1)
        return torch.where(self.fixed, self.start, best)


def _what_is_known(t: Tensor, w: Tensor, delta: Tensor) -> _Rows:
    """Also takes the rows out of T - W that m = 0 alone makes zero."""
    squares, base_squares = squared_row_norms(t), squared_row_norms(w)
    silent, dead = (sums <= TINY_NORM**2 for sums in (squares, base_squares))
    delta.masked_fill_(silent[:, None], 0.0)
    squares = squares.clamp(min=TINY_NORM**2)
    start = ((base_squares / squares).sqrt() - 1).masked_fill(silent | dead, 0.0)
    return _Rows(squares, (t * delta).sum(1), start, silent | dead)


def _alternate(t: Tensor, delta: Tensor, known: _Rows, right: Tensor, rank: int, rounds: int) -> _Triplets:
    """One step of the subspace a round, from `right` (columns, k), warm from the round before.

    diag(c) T - W = diag(c - 1) T + (T - W) is never formed; both meet the new directions once, for c and the next
    round. c is kept as c - 1, so that small changes keep their digits.
    """
    enough = STEADY * torch.linalg.vector_norm(delta)
    offset, tuned, changed = known.start, t @ right, delta @ right
    for _ in range(rounds):
        left = torch.linalg.qr(offset[:, None] * tuned + changed).Q
        found = _rotated(left, t.T @ (offset[:, None] * left) + delta.T @ left)
        tuned, changed = t @ found.right, delta @ found.right
        before, offset = offset, known.sought((tuned * found.left * found.values)[:, :rank].sum(1))
        if bool(torch.linalg.vector_norm((offset - before) * known.squares.sqrt()) <= enough):
            break
    return found


def _leading(matrix: Tensor, right: Tensor) -> _Triplets:
    """Subspace iteration from a start (columns, k); a start as wide as the smaller side is exact at once."""
    energy, is_whole = 0.0, right.shape[1] == min(matrix.shape)
    for _ in range(STEPS):
        found = _rotated(left := torch.linalg.qr(matrix @ right).Q, matrix.T @ left)
        before, energy, right = energy, float(found.values.square().sum()), found.right
        if is_whole or energy - before <= SETTLED * energy:
            break
    return found


def _rotated(left: Tensor, right: Tensor) -> _Triplets:
    """The singular triplets of left right^T, where the columns of left (out, k) are orthonormal; right (columns, k)."""
    directions, values, turn = torch.linalg.svd(right, full_matrices=False)
    return _Triplets(left @ turn.T, values, directions)


def _start(matrix: Tensor, rank: int, generator: torch.Generator | None) -> Tensor:
    """A random basis (columns, k) for `rank` directions and some to spare."""
    side = min(matrix.shape)
    width = side if side <= SMALL_SIDE else min(rank + OVERSAMPLING, side)
    source = torch.Generator().manual_seed(0) if generator is None else generator
    basis = torch.randn(matrix.shape[1], width, generator=source, dtype=matrix.dtype, device=source.device)
    return basis.to(matrix.device)


def _ranks_within(matrix: Tensor, found: _Triplets, error: float) -> int:
    """How many of the triplets leave a relative error of at most this; one more than there are when all leave more."""
    rest = (matrix - (found.left * found.values) @ found.right.T).double().square().sum()
    tails = rest + found.values.double().square().flip(0).cumsum(0).flip(0)  # what 0, 1, 2 ... triplets leave
    allowed = (error * torch.linalg.vector_norm(matrix).double()) ** 2
    count = int((torch.cat([tails, rest[None]]) > allowed).sum())
    return max(1, count)


def _matrix(weight: Tensor) -> Tensor:
    return rows(weight).to(master_dtype(weight.dtype))


def _capped(rank: int, weight: Tensor) -> int:
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    return min(rank, *rows(weight).shape)
