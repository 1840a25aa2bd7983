"""Each mode on one layer as a sum of rows: R = diag(c) W + sum diag(k_i) D_i, from norms alone; nothing dense is made.

    additive             c = 1 + sum s_i (g_i - 1),   k_i = s_i g_i                               W' = R
    lycoris              c = 1 + sum (h_i - 1),       k_i = h_i = 1 + s_i (g_i - 1)               W' = R
    peft                 in order: k_i = s_i, then c and every k times g_i                        W' = R
    comfyui, a1111       in order: c and every k times 1 - s_i + s_i g_i, then k_i = s_i g_i      W' = R
    compose              c = 1,                       k_i = s_i                                   W' = R to length m
    direction-magnitude  c = N(W) `direction_factor`, k_i = s_i N(W) / N(V_i)                     W' = R to length m

The gains g_i are those of `blend_modes`. A LoRA's is 1, and its k_i is s_i; in a sequence it leaves c and every other k
as they are. On the in axis the diagonal matrices stand on the right. `a1111` has no such form for magnitudes of the out
axis.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_diffusion.functional.blend_modes import axis_norms, direction_factor, geometric_magnitude
from dora_diffusion.functional.dora import AXES, TINY_NORM, Axis, column_norms, row_norms, rows, static_gain
from dora_diffusion.state import ModuleState

# A row whose c is nearer to 0 than this has its differences divided by almost nothing: such a layer is approximated.
SMALLEST = 1e-2


@dataclass(frozen=True)
class Strand:
    """One adapter on the layer: its pair, magnitude flat, and its strength."""

    pair: ModuleState
    strength: float


@dataclass(frozen=True)
class Recipe:
    """R = diag(c) W + sum diag(k_i) D_i.

    Attributes:
        c: (out,), or (in,) on the in axis; anything where W is zero.
        factors: k_i, of the same shape.
        magnitude: what length R's rows are brought to, (out,) or (in,); None where R is W' itself.
    """

    c: Tensor
    factors: Sequence[Tensor]
    magnitude: Tensor | None = None


Maker = Callable[[Tensor, Sequence[Strand], Axis], Recipe | None]


def joined(strands: Sequence[Strand], factors: Sequence[Tensor], axis: Axis) -> tuple[Tensor, Tensor]:
    """P (out, R) and Q (R, in kh kw) of P Q = sum K_i D_i; K_i diagonal, (out,) or (in,), or one number."""
    lefts, rights = [], []
    for strand, factor in zip(strands, factors, strict=True):
        left, right = strand.pair.scale * rows(strand.pair.up), rows(strand.pair.down)
        factor = factor.to(left)
        if axis == "in" and factor.numel() > 1:
            right = right * factor.repeat_interleave(right.shape[1] // factor.numel())
        else:
            left = left * factor.reshape(-1, 1)
        lefts.append(left)
        rights.append(right)
    return torch.cat(lefts, dim=1), torch.cat(rights)


def norms_of(weight: Tensor, left: Tensor, right: Tensor, axis: Axis) -> Tensor:
    """N(W + P Q), factored, never 0."""
    return (column_norms if axis == "in" else row_norms)(weight, right, left, 1.0)


def _constant(weight: Tensor, strands: Sequence[Strand], axis: Axis, value: float) -> Tensor:
    dtype = strands[0].pair.down.dtype
    return torch.full((weight.shape[AXES.index(axis)],), value, dtype=dtype, device=weight.device)


def _own_norms(weight: Tensor, strand: Strand, axis: Axis, strength: float = 1.0) -> Tensor:
    """N(W + strength D_i)."""
    pair = strand.pair
    return norms_of(weight, strength * pair.scale * rows(pair.up), rows(pair.down), axis)


def _additive(weight: Tensor, strands: Sequence[Strand], axis: Axis) -> Recipe:
    c, factors = _constant(weight, strands, axis, 1.0), []
    for strand in strands:
        pair, g = strand.pair, _constant(weight, strands, axis, 1.0)
        if pair.magnitude is not None:
            g = static_gain(weight, pair.down, pair.up, pair.scale, pair.magnitude, axis=axis)
        c = c + strand.strength * (g - 1)
        factors.append(strand.strength * g)
    return Recipe(c, factors)


def _lycoris(weight: Tensor, strands: Sequence[Strand], axis: Axis) -> Recipe:
    c, factors = _constant(weight, strands, axis, 1.0), []
    for strand in strands:
        if strand.pair.magnitude is None:
            factors.append(_constant(weight, strands, axis, strand.strength))
            continue
        g = strand.pair.magnitude / _own_norms(weight, strand, axis)
        c = c + strand.strength * (g - 1)
        factors.append(1 + strand.strength * (g - 1))
    return Recipe(c, factors)


def _peft(weight: Tensor, strands: Sequence[Strand], axis: Axis) -> Recipe | None:
    if axis == "in":
        return None
    c, factors = _constant(weight, strands, axis, 1.0), list[Tensor]()
    for strand in strands:
        factors.append(_constant(weight, strands, axis, strand.strength))
        if strand.pair.magnitude is not None:
            g = strand.pair.magnitude / _own_norms(weight, strand, axis, strand.strength)
            c, factors = g * c, [g * factor for factor in factors]
    return Recipe(c, factors)


def _comfyui(weight: Tensor, strands: Sequence[Strand], axis: Axis) -> Recipe | None:
    c, factors = _constant(weight, strands, axis, 1.0), list[Tensor]()
    for strand in strands:
        s, magnitude = strand.strength, strand.pair.magnitude
        if magnitude is None:
            factors.append(_constant(weight, strands, axis, s))
            continue
        patched = [*factors, torch.ones_like(c)] if axis == "in" else factors  # whose norms: R + D_i, or R
        norms = _running_norms(weight, strands[: len(patched)], Recipe(c, patched), axis)
        if norms is None:
            return None
        g = magnitude / (norms + torch.finfo(norms.dtype).eps)
        kept = 1 - s + s * g
        c, factors = kept * c, [*(kept * factor for factor in factors), s * g]
    return Recipe(c, factors)


def _running_norms(weight: Tensor, strands: Sequence[Strand], recipe: Recipe, axis: Axis) -> Tensor | None:
    """N(R); None where c is too near 0."""
    base = axis_norms(weight, axis).to(recipe.c.dtype)
    if not strands:
        return recipe.c.abs() * base
    c = recipe.c.masked_fill(base <= TINY_NORM, 1.0)
    if bool((c.abs() < SMALLEST).any()):
        return None
    left, right = joined(strands, [factor / c for factor in recipe.factors], axis)
    return c.abs() * norms_of(weight, left, right, axis)


def _a1111(weight: Tensor, strands: Sequence[Strand], axis: Axis) -> Recipe | None:
    return _comfyui(weight, strands, axis) if axis == "in" else None


def _compose(weight: Tensor, strands: Sequence[Strand], axis: Axis) -> Recipe:
    factors = [_constant(weight, strands, axis, strand.strength) for strand in strands]
    return Recipe(_constant(weight, strands, axis, 1.0), factors, _mean_magnitude(weight, strands, axis))


def _directions(weight: Tensor, strands: Sequence[Strand], axis: Axis) -> Recipe:
    base, strengths = axis_norms(weight, axis), [strand.strength for strand in strands]
    norms = [_own_norms(weight, strand, axis) for strand in strands]
    length = base.clamp(min=TINY_NORM)
    c = length * direction_factor(base, norms, strengths)
    factors = [
        torch.where(base <= TINY_NORM, torch.full_like(c, s), s * length / n)
        for s, n in zip(strengths, norms, strict=True)
    ]
    return Recipe(c, factors, _mean_magnitude(weight, strands, axis))


def _mean_magnitude(weight: Tensor, strands: Sequence[Strand], axis: Axis) -> Tensor:
    own = [
        _own_norms(weight, strand, axis) if strand.pair.magnitude is None else strand.pair.magnitude
        for strand in strands
    ]
    return geometric_magnitude(axis_norms(weight, axis), own, [strand.strength for strand in strands])


RECIPES: Mapping[str, Maker] = {
    "additive": _additive,
    "compose": _compose,
    "direction-magnitude": _directions,
    "peft": _peft,
    "comfyui": _comfyui,
    "a1111": _a1111,
    "lycoris": _lycoris,
}
