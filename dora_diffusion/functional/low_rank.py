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

from dora_diffusion.functional.dora import TINY_NORM, dora_weight, master_dtype, rows, squared_row_norms
from dora_diffusion.functional.lycoris import Pair
from dora_diffusion.utils.hardware import in_float64

# Directions beyond the rank that is asked for: the others settle the faster for them.
OVERSAMPLING = 16
# Up to this smaller side the whole decomposition costs no more than iterating.
SMALL_SIDE = 192
# A subspace has settled when a step adds less than this share of the energy it holds; it takes at most so many steps.
SETTLED = 1e-6
STEPS = 12
# Extraction stops when a round moves diag(g) W by less than this share of T - W.
STEADY = 1e-6
# It also stops when a round takes less than this share off what D leaves, squared; below the floor, a share of
# ||T - W||^2, what is left has too few digits to tell.
STALLED = 1e-4
FLOOR = 1e-3
# The gains of a round are mixed from so many rounds before it.
MEMORY = 5
# What D leaves, squared, is told apart to so many roundings of ||T - W||^2.
ROUNDINGS = 16
# g stays within this factor of its start: a row of V that is all but 0, or against T, is no direction.
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

    m = N(T). D and the gains g are found in turn, from g = N(T) / N(W):

        D = diag(1 / g) SVD_r(T - diag(g) W),   g_i = <T_i, V_i> / <V_i, V_i>,   V = W + D

    Each half is the best for the other, so ||T - diag(g) V|| only falls: all that W' misses, for m / N(V) is this g but
    for the cosine between T_i and V_i. In turn they near their end by about a third a round, and much slower where rows
    are few; so the next g is mixed from those of the rounds before (Anderson acceleration: Walker and Ni, 2011,
    doi:10.1137/10078356X), and where a mixed one does not fall, the round is taken back and goes on unmixed. A row of W
    that is zero has no magnitude (its gain is 1), so its g is 1; for a row of T that is zero m = 0 is enough, and D
    leaves it alone.

    Args:
        tuned: T, (out, in[, kh, kw]), any float dtype.
        base: W, of the same shape.
        rank: r, at least 1; what is above the smaller side is capped.
        rounds: at most this many; it stops when g does, or when a round gains next to nothing.
        error: keep no more ranks than leave ||W' - T|| / ||T - W|| at this, as far as `rank` reaches.
        generator: as in `low_rank`.
    """
    if tuned.shape != base.shape:
        raise ValueError(f"tuned weight {tuple(tuned.shape)} beside a base of {tuple(base.shape)}: expected one shape")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    t, w = _matrix(tuned), _matrix(base)
    most, magnitude, problem = _capped(rank, t), squared_row_norms(t).sqrt(), _problem(t, w)
    best = _alternate(problem, _start(t, most, generator), most, rounds)
    low = 1 if error > 0 else most
    while low < most:  # a D of more directions than needed uses them all, so each rank is tried for itself
        middle = (low + most) // 2
        found = _alternate(problem, best.triplets.right, middle, rounds)
        pair = found.pair(middle)
        if relative_error(dora_weight(w, pair.right, pair.left, 1.0, magnitude), t, w) <= error:
            most, best = middle, found
        else:
            low = middle + 1
    return DoRAParts(best.pair(most), magnitude)


def relative_error(actual: Tensor, expected: Tensor, base: Tensor | None = None) -> float:
    """The share of a change that was missed:

        e = ||actual - expected|| / ||expected - base||

    in Frobenius norms. Where nothing should have changed e is 0 if nothing did, else infinite. Where a norm is NaN or
    infinite e is infinite, too: an error that cannot be told is worse than any other, in `max` and beside a limit.

    Args:
        actual: as many numbers as `expected`, in its order; any float dtype.
        expected: any shape and float dtype.
        base: what the change starts from, as `expected`; None for 0.
    """
    goal = expected.to(master_dtype(expected.dtype))
    missed = _norm(actual.to(master_dtype(actual.dtype)).reshape(goal.shape) - goal)
    size = _norm(goal if base is None else goal - base.to(master_dtype(base.dtype)).reshape(goal.shape))
    if not (math.isfinite(missed) and math.isfinite(size)):
        return math.inf
    return missed / size if size > 0 else (math.inf if missed > 0 else 0.0)


def _norm(tensor: Tensor) -> float:
    """||tensor||, in fp64 where fp32's squares may have left its range."""
    norm = float(torch.linalg.vector_norm(tensor))
    return norm if 1e-12 < norm < 1e18 else float(torch.linalg.vector_norm(in_float64(tensor)))


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
class _Problem:
    """What extraction works on. Gains are kept as g - 1, so that small changes keep their digits.

    Attributes:
        base: W; a row is 0 where T's is.
        delta: T - W, likewise.
        squares: <W_i, W_i>, (out,).
        shared: <T_i - W_i, W_i>, (out,).
        start: g - 1 to start from, (out,).
        fixed: the rows whose g is not sought, (out,), because W or T is zero.
    """

    base: Tensor
    delta: Tensor
    squares: Tensor
    shared: Tensor
    start: Tensor
    fixed: Tensor

    def best_gains(self, with_delta: Tensor, with_base: Tensor, own: Tensor) -> Tensor:
        """g - 1 = <T_i - V_i, V_i> / <V_i, V_i>, from the products of D with T - W, with W and with itself."""
        squares = self.squares + 2 * with_base + own
        return self.within((self.shared + with_delta - with_base - own) / squares.clamp(min=TINY_NORM**2))

    def within(self, offset: Tensor) -> Tensor:
        """g - 1 where g may be: as it starts in the fixed rows, near its start in the others."""
        first = 1 + self.start
        near = torch.minimum(torch.maximum(offset, first / FARTHEST - 1), first * FARTHEST - 1)
        return torch.where(self.fixed, self.start, near)

    def growth(self, offset: Tensor) -> Tensor:
        """||T - diag(g) W||^2 - ||T - W||^2, from g - 1."""
        return (offset * (offset * self.squares - 2 * self.shared)).sum()


@dataclass(frozen=True)
class _Scaled:
    """D = diag(1 / g) times a matrix that is known by its singular triplets."""

    triplets: _Triplets
    gains: Tensor

    def pair(self, rank: int) -> Pair:
        """The leading ranks, with factors of equal size."""
        pair = self.triplets.pair(rank)
        left, right = pair.left / self.gains[:, None], pair.right
        sizes = [torch.linalg.vector_norm(factor).clamp(min=torch.finfo(left.dtype).tiny) for factor in (left, right)]
        balance = (sizes[1] / sizes[0]).sqrt()
        return Pair(left * balance, right / balance)


def _problem(t: Tensor, w: Tensor) -> _Problem:
    squares, base_squares = squared_row_norms(t), squared_row_norms(w)
    silent, dead = (sums <= TINY_NORM**2 for sums in (squares, base_squares))
    if bool(silent.any()):
        t, w = (matrix.masked_fill(silent[:, None], 0.0) for matrix in (t, w))
    start = (squares.sqrt() / base_squares.clamp(min=TINY_NORM**2).sqrt() - 1).masked_fill(silent | dead, 0.0)
    delta = t - w
    return _Problem(w, delta, base_squares, (delta * w).sum(1), start, silent | dead)


def _alternate(problem: _Problem, right: Tensor, rank: int, rounds: int) -> _Scaled:
    """One step of the subspace a round, from `right` (columns, k), warm from the round before.

    T - diag(g) W = (T - W) - diag(g - 1) W is never formed; both meet the new directions once, for g and the next
    round.
    """
    w, delta, offset = problem.base, problem.delta, problem.start
    whole, norms, least = delta.square().sum(), problem.squares.sqrt(), math.inf
    rounding, mixing = ROUNDINGS * torch.finfo(w.dtype).eps * float(whole), _Mixing(norms)
    changed, base = delta @ right, w @ right
    for _ in range(rounds):
        left = torch.linalg.qr(changed - offset[:, None] * base).Q
        found = _rotated(left, delta.T @ left - w.T @ (offset[:, None] * left))
        remaining = float(whole + problem.growth(offset) - found.values[:rank].square().sum())
        changed, base = delta @ found.right, w @ found.right
        if remaining > least + rounding:
            if not mixing.is_mixed:
                break
            offset = mixing.restart()
            continue
        best = _Scaled(found, 1 + offset)
        own = (found.left * found.values)[:, :rank] / best.gains[:, None]  # D in the basis of its rows
        products = ((changed[:, :rank] * own).sum(1), (base[:, :rank] * own).sum(1), own.square().sum(1))
        image = problem.best_gains(*products)
        is_steady = torch.linalg.vector_norm((image - offset) * norms) <= STEADY * whole.sqrt()
        if bool(is_steady) or (1 - STALLED) * least < remaining and remaining > FLOOR * whole:
            break
        offset, least = problem.within(mixing.next(offset, image)), min(least, remaining)
    return best


class _Mixing:
    """Anderson acceleration of x -> f(x): the mix of the last f(x), summing to 1, whose f(x) - x is least.

    Args:
        weights: of the entries of x in the norm, of its shape.
    """

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights
        self._images: list[Tensor] = []
        self._residuals: list[Tensor] = []

    @property
    def is_mixed(self) -> bool:
        """Whether the last `next` came from more than one f(x)."""
        return len(self._images) > 1

    def next(self, point: Tensor, image: Tensor) -> Tensor:
        """The next x, from x and f(x)."""
        self._images = [*self._images, image][-MEMORY:]
        self._residuals = [*self._residuals, ((image - point) * self._weights).cpu().double()][-MEMORY:]
        if not self.is_mixed:
            return image
        steps = torch.stack(self._residuals).diff(dim=0)
        shares = torch.linalg.pinv(steps.T) @ self._residuals[-1]
        turned: Tensor = torch.stack(self._images).diff(dim=0).T @ shares.to(image)
        return image - turned

    def restart(self) -> Tensor:
        """The last f(x) unmixed, and nothing before it is looked at again."""
        last = self._images[-1]
        self._images, self._residuals = [], []
        return last


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
    rest = in_float64(matrix - (found.left * found.values) @ found.right.T).square().sum()
    tails = rest + in_float64(found.values).square().flip(0).cumsum(0).flip(0)  # what 0, 1, 2 ... triplets leave
    allowed = (error * in_float64(torch.linalg.vector_norm(matrix))) ** 2
    return max(1, int((torch.cat([tails, rest[None]]) > allowed).sum()))


def _matrix(weight: Tensor) -> Tensor:
    return rows(weight).to(master_dtype(weight.dtype))


def _capped(rank: int, weight: Tensor) -> int:
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    out, columns = rows(weight).shape
    return min(rank, out, columns)
