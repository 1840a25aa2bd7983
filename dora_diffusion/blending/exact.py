"""The blends of one layer that are one low-rank adapter exactly: nothing dense is made.

Whatever the mode, such a blend is W' = diag(m / N(V)) V with V = W + sum K_i D_i, K_i diagonal: a DoRA whose pair holds
the adapters' pairs side by side, of rank sum r_i. (On the in axis the diagonal matrices stand on the right.)

    additive             W' = diag(c) W + sum s_i G_i D_i,  c = 1 + sum s_i (g_i - 1):  K_i = s_i G_i / c,      m = c N(V)
    compose                                                                              K_i = s_i
    direction-magnitude  c = direction_factor:                                           K_i = s_i / (N(V_i) c), m sign(c)

G_i = diag(g_i) is an adapter's own gain, 1 for LoRA. Rows of W that are zero adapt as LoRA: m = N(V) there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_diffusion.blending.pieces import Piece
from dora_diffusion.functional import TINY_NORM, Axis, column_norms, row_norms, rows, static_gain
from dora_diffusion.mixing import axis_norms, common_axis, direction_factor, geometric_magnitude
from dora_diffusion.state import ModuleState

# A row whose c is nearer to 0 than this has its pair divided by almost nothing: such a layer is approximated instead.
SMALLEST = 1e-2


@dataclass(frozen=True)
class Side:
    """All pairs side by side, and what scales V's rows or columns.

    Attributes:
        left: P, (out, R).
        right: Q, (R, in kh kw); V = W + P Q.
        magnitude: m, signed, or None for plain LoRA.
        axis: what m scales.
    """

    left: Tensor
    right: Tensor
    magnitude: Tensor | None
    axis: Axis


@dataclass(frozen=True)
class _Recipe:
    """K_i, and m as a function of N(V); None of it where the blend cannot be written so."""

    factors: Sequence[Tensor]
    magnitude: Callable[[Tensor], Tensor]


def side_by_side(weight: Tensor | None, pieces: Sequence[Piece], mode: str, *, as_dora: bool | None) -> Side | None:
    """The blend of a layer, or None where it has no such form.

    Args:
        weight: W, any float dtype; may be None where only plain LoRAs add up.
        pieces: at least one, none of strength 0.
        mode: any; only three have this form.
        as_dora: as in `BlendOptions`.
    """
    if mode not in _RECIPES:
        return None
    pairs = [piece.pair() for piece in pieces]
    plain = mode != "direction-magnitude" and not any(piece.is_dora for piece in pieces)
    if plain and not as_dora:
        return _joined(pairs, [torch.tensor(piece.strength) for piece in pieces], "out")
    if as_dora is False or len({pair.axis for pair in pairs if pair.magnitude is not None}) > 1:
        return None
    assert weight is not None
    axis = common_axis((pair.magnitude, pair.axis) for pair in pairs)
    recipe = _RECIPES[mode](weight, pieces, pairs, axis)
    if recipe is None:
        return None
    joined = _joined(pairs, recipe.factors, axis)
    norms = _norms(weight, joined.right, joined.left, 1.0, axis)
    return Side(joined.left, joined.right, recipe.magnitude(norms), axis)


def _joined(pairs: Sequence[ModuleState], factors: Sequence[Tensor], axis: Axis) -> Side:
    lefts, rights = [], []
    for pair, factor in zip(pairs, factors, strict=True):
        left, right = pair.scale * rows(pair.up), rows(pair.down)
        factor = factor.to(left)
        if axis == "in":
            right = right * factor.repeat_interleave(right.shape[1] // factor.numel())
        else:
            left = left * factor.reshape(-1, 1)
        lefts.append(left)
        rights.append(right)
    return Side(torch.cat(lefts, dim=1), torch.cat(rights), None, axis)


def _norms(weight: Tensor, down: Tensor, up: Tensor, scale: float, axis: Axis) -> Tensor:
    """N(W + s B A), factored."""
    return (column_norms if axis == "in" else row_norms)(weight, down, up, scale)


def _own_norms(weight: Tensor, pairs: Sequence[ModuleState], axis: Axis) -> list[Tensor]:
    return [_norms(weight, pair.down, pair.up, pair.scale, axis) for pair in pairs]


def _additive(weight: Tensor, pieces: Sequence[Piece], pairs: Sequence[ModuleState], axis: Axis) -> _Recipe | None:
    gains = []
    for pair in pairs:
        if pair.magnitude is None:
            gains.append(torch.ones(weight.shape[1 if axis == "in" else 0], device=weight.device))
        else:
            gains.append(static_gain(weight, pair.down, pair.up, pair.scale, pair.magnitude, axis=axis))
    c = 1 + sum(piece.strength * (g - 1) for piece, g in zip(pieces, gains, strict=True))
    assert isinstance(c, Tensor)
    if bool((c.abs() < SMALLEST).any()):
        return None
    return _Recipe([p.strength * g / c for p, g in zip(pieces, gains, strict=True)], lambda norms: c * norms)


def _compose(weight: Tensor, pieces: Sequence[Piece], pairs: Sequence[ModuleState], axis: Axis) -> _Recipe:
    base, mean = _mean_magnitude(weight, pieces, pairs, axis)
    factors = [torch.full_like(mean, piece.strength) for piece in pieces]
    return _Recipe(factors, lambda norms: torch.where(base <= TINY_NORM, norms, mean))


def _directions(weight: Tensor, pieces: Sequence[Piece], pairs: Sequence[ModuleState], axis: Axis) -> _Recipe | None:
    base, mean = _mean_magnitude(weight, pieces, pairs, axis)
    strengths, norms_of = [piece.strength for piece in pieces], _own_norms(weight, pairs, axis)
    c, dead = direction_factor(base, norms_of, strengths), base <= TINY_NORM
    if bool(((c * base).abs() < SMALLEST)[~dead].any()):
        return None
    factors = [
        torch.where(dead, torch.full_like(c, strength), strength / (norms.clamp(min=TINY_NORM) * c))
        for strength, norms in zip(strengths, norms_of, strict=True)
    ]
    return _Recipe(factors, lambda norms: torch.where(dead, norms, mean * c.sign()))


def _mean_magnitude(
    weight: Tensor, pieces: Sequence[Piece], pairs: Sequence[ModuleState], axis: Axis
) -> tuple[Tensor, Tensor]:
    """N(W), and m of `compose`."""
    base = axis_norms(weight, axis)
    own = [
        norms if pair.magnitude is None else pair.magnitude
        for pair, norms in zip(pairs, _own_norms(weight, pairs, axis), strict=True)
    ]
    return base, geometric_magnitude(base, own, [piece.strength for piece in pieces])


_RECIPES: Mapping[str, Callable[[Tensor, Sequence[Piece], Sequence[ModuleState], Axis], _Recipe | None]] = {
    "additive": _additive,
    "compose": _compose,
    "direction-magnitude": _directions,
}
