"""The blends of one layer that are one low-rank adapter exactly, of rank sum r_i: nothing dense is made.

From a recipe R = diag(c) W + sum diag(k_i) D_i: V = W + sum diag(k_i / c) D_i, whose rows lie along R's. If R is W'
itself, m = c N(V); if its rows are to have a length, m is that length with the sign of c. Rows of W that are zero have
m = N(V), so that they adapt as LoRA for every tool.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_diffusion.blending.closed_forms import RECIPES, SMALLEST, Strand, joined, norms_of
from dora_diffusion.blending.layer_inputs import Piece
from dora_diffusion.functional.blend_modes import axis_norms
from dora_diffusion.functional.dora import TINY_NORM, Axis


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


def why_weight(names: Sequence[str], mode: str, *, as_dora: bool | None) -> str:
    """Why W is needed, or nothing: not where plain differences are added up, or merged, to a plain one.

    Args:
        names: of the adapters with a magnitude.
        mode: any of `blend`.
        as_dora: as in `BlendOptions`.
    """
    if as_dora:
        return "as_dora asks for magnitudes, which are lengths of the base's rows"
    if mode == "direction-magnitude":
        return "the mode 'direction-magnitude' turns the base's rows"
    return f"{names[0]!r} is a DoRA, whose difference is reckoned from the base's rows" if names else ""


def side_by_side(weight: Tensor | None, pieces: Sequence[Piece], mode: str, *, as_dora: bool | None) -> Side | None:
    """The blend of a layer, or None where it has no such form, or one that divides by almost nothing.

    Args:
        weight: W, any float dtype; may be None where `why_weight` has no reason.
        pieces: at least one.
        mode: any of `blend`.
        as_dora: as in `BlendOptions`.
    """
    strands = [Strand(piece.pair(), piece.strength) for piece in pieces]
    if mode in RECIPES and not why_weight([p.name for p in pieces if p.is_dora], mode, as_dora=as_dora):
        numbers = [torch.tensor(piece.strength, dtype=torch.float64) for piece in pieces]
        return Side(*joined(strands, numbers, "out"), None, "out")
    axes = {strand.pair.axis for strand in strands if strand.pair.magnitude is not None} or {"out"}
    if mode not in RECIPES or as_dora is False or len(axes) > 1:
        return None
    assert weight is not None
    axis: Axis = "in" if "in" in axes else "out"
    recipe = RECIPES[mode](weight, strands, axis)
    if recipe is None:
        return None
    dead = axis_norms(weight, axis) <= TINY_NORM
    c = recipe.c.masked_fill(dead, 1.0)  # what c is there is nothing to W, but the differences are divided by it
    if bool((c.abs() < SMALLEST).any()):
        return None
    left, right = joined(strands, [factor / c for factor in recipe.factors], axis)
    norms = norms_of(weight, left, right, axis)
    length = c * norms if recipe.magnitude is None else torch.where(dead, norms, recipe.magnitude * c.sign())
    return Side(left, right, length, axis)
