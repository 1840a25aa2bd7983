"""Several adapters on one weight: ours, and as other tools compute it. Pure functions on dense weights.

Letters as in `functional`: W the base weight, D_i an adapter's difference at its scale, V_i = W + D_i, m_i its
magnitude, s_i its strength, N the L2 norm of each row (of each column on the in axis), W'_i what the adapter makes of W
alone.

    additive             W + sum s_i (W'_i - W)
    compose              V = W + sum s_i D_i,                              m = N(W) prod (m_i / N(W))^s_i
    direction-magnitude  V = W/N(W) + sum s_i (V_i/N(V_i) - W/N(W)),       m as compose
    peft                 in order: R <- g_i (R + s_i D_i),                 g_i = m_i / N(W + s_i D_i)
    comfyui              in order: R <- R + s_i (g_i (R + D_i) - R),       g_i = m_i / N(R); in axis m_i / N(R + D_i)
    a1111                in order: the same,                               g_i = m_i / column norms of R + D_i
    lycoris              W + sum (V_i (1 + s_i (g_i - 1)) - W),            g_i = m_i / N(V_i)

A plain LoRA adds s_i D_i in every mode but the second and third, where it is a DoRA with m_i = N(V_i); `compose` of
LoRAs alone is W + sum s_i D_i. The first three do not depend on the order of the adapters, and a strength of 0 is an
adapter that is not there. `peft` and `lycoris` leave the base changed at strength 0, as those tools do.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from dora_diffusion.functional.dora import AXES, TINY_NORM, Axis, RowNorms, gain, squared_row_norms


@dataclass(frozen=True)
class AdapterTerm:
    """One adapter on one layer.

    Attributes:
        delta: D at its scale, (out, in[, kh, kw]) or flat (out, in kh kw).
        magnitude: m, (out,), or (in,) on the in axis; None for plain LoRA.
        axis: what m scales.
        strength: s.
    """

    delta: Tensor
    magnitude: Tensor | None = None
    axis: Axis = "out"
    strength: float = 1.0


def axis_norms(weight: Tensor, axis: Axis) -> Tensor:
    """N of a dense weight: of its rows, (out,), or of its columns, (in,); fp32 (fp64 stays fp64)."""
    return squared_row_norms(weight.transpose(0, AXES.index(axis))).sqrt()


def geometric_magnitude(base: Tensor, magnitudes: Sequence[Tensor], strengths: Sequence[float]) -> Tensor:
    """m = N(W) exp(sum s_i log(m_i / N(W))): `base` N(W), and m_i, of one shape (n,) -> (n,).

    Raises:
        ValueError: a magnitude is negative, so it has no logarithm.
    """
    base = base.clamp(min=TINY_NORM)
    exponent = torch.zeros_like(base)
    for magnitude, strength in zip(magnitudes, strengths, strict=True):
        if bool((magnitude < 0).any()):
            raise ValueError("a magnitude is negative, and these modes multiply powers of magnitudes; blend additively")
        exponent += strength * (magnitude.clamp(min=TINY_NORM) / base).log()
    return base * exponent.exp()


def direction_factor(base: Tensor, norms: Sequence[Tensor], strengths: Sequence[float]) -> Tensor:
    """c of V = c W + sum (s_i / N(V_i)) D_i, which is `direction-magnitude`'s V with its brackets multiplied out."""
    factor = (1 - sum(strengths)) / base.clamp(min=TINY_NORM)
    for norm, strength in zip(norms, strengths, strict=True):
        factor = factor + strength / norm.clamp(min=TINY_NORM)
    return factor


def over_base_norms(magnitude: Tensor, weight: Tensor, direction: Tensor) -> Tensor:
    """m' of `comfyui`'s  g = m' / N(W)  that draws what m / N(V) does:  m' = m N(W) / N(V).

    Args:
        magnitude: m of the out axis, (out,).
        weight: W, (out, in[, kh, kw]).
        direction: V = W + D, as W.

    Returns:
        m', (out,), in the dtype of `axis_norms`; rows of V that are 0 keep their m.
    """
    ratio, is_row = _norm_ratio(weight, direction)
    return torch.where(is_row, magnitude * ratio, magnitude.to(ratio))


def from_base_norms(magnitude: Tensor, weight: Tensor, direction: Tensor) -> Tensor:
    """m of an m' that `over_base_norms` made; arguments and result as there."""
    ratio, is_row = _norm_ratio(weight, direction)
    return torch.where(is_row, magnitude / ratio, magnitude.to(ratio))


def _norm_ratio(weight: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """N(W) / N(V), the first as `as_comfyui` has it, and which rows of V have a direction."""
    base, norms = axis_norms(weight, "out"), axis_norms(direction, "out")
    return (base + torch.finfo(base.dtype).eps) / norms.clamp(min=TINY_NORM), norms > TINY_NORM


def common_axis(terms: Iterable[tuple[Tensor | None, Axis]]) -> Axis:
    """The axis of the magnitudes among (magnitude, axis); "out" where there is none.

    Raises:
        ValueError: there are both.
    """
    found = {axis for magnitude, axis in terms if magnitude is not None}
    if len(found) > 1:
        raise ValueError(
            "magnitudes of both axes on one layer: convert the adapter of the in axis to the out axis first"
        )
    return found.pop() if found else "out"


def additive(weight: Tensor, terms: Sequence[AdapterTerm]) -> Tensor:
    """W + sum s_i (W'_i - W). One adapter is exact to the bit at 0 and at 1."""
    weight, terms = _prepared(weight, terms)
    terms = _present(terms)
    if len(terms) == 1:
        return torch.lerp(weight, _alone(weight, terms[0]), terms[0].strength)
    return reduce(lambda total, term: total + term.strength * _difference(weight, term), terms, weight)


def compose(weight: Tensor, terms: Sequence[AdapterTerm]) -> Tensor:
    """One DoRA of all differences and the weighted geometric mean of all magnitudes."""
    weight, terms = _prepared(weight, terms)
    terms = _present(terms)
    total = reduce(lambda v, term: v + term.strength * term.delta, terms, weight)
    if all(term.magnitude is None for term in terms):
        return total
    axis = common_axis((term.magnitude, term.axis) for term in terms)
    return total * _spread(_static_gain(_mean_magnitude(weight, terms, axis), total, weight, axis), total, axis)


def direction_magnitude(weight: Tensor, terms: Sequence[AdapterTerm]) -> Tensor:
    """Directions added as unit rows, magnitudes as in `compose`."""
    weight, terms = _prepared(weight, terms)
    terms = _present(terms)
    if not terms:
        return weight
    axis, strengths = common_axis((term.magnitude, term.axis) for term in terms), [term.strength for term in terms]
    base, norms = axis_norms(weight, axis), [axis_norms(weight + term.delta, axis) for term in terms]
    direction = _spread(direction_factor(base, norms, strengths), weight, axis) * weight
    for term, norm in zip(terms, norms, strict=True):
        direction = direction + _spread(term.strength / norm.clamp(min=TINY_NORM), weight, axis) * term.delta
    g = _static_gain(_mean_magnitude(weight, terms, axis), direction, weight, axis)
    plain = reduce(lambda v, term: v + term.strength * term.delta, terms, weight)  # rows without a direction
    return torch.where(_spread(base <= TINY_NORM, weight, axis), plain, direction * _spread(g, weight, axis))


def as_peft(weight: Tensor, terms: Sequence[AdapterTerm]) -> Tensor:
    """As PEFT draws with several active adapters, and merges them: in order, each norm against the bare W.

    Raises:
        ValueError: magnitudes of the in axis, which PEFT does not know.
    """
    weight, terms = _prepared(weight, terms)
    running = weight
    for term in terms:
        step = term.strength * term.delta
        running = running + step
        if term.magnitude is None:
            continue
        if term.axis == "in":
            raise ValueError("mode 'peft' knows magnitudes of the out axis only: convert the adapter to it first")
        norms = axis_norms(weight + step, "out")
        g = gain(term.magnitude, RowNorms(norms.clamp(min=TINY_NORM), norms <= TINY_NORM))
        running = running * _spread(g, running, "out")
    return running


def as_comfyui(weight: Tensor, terms: Sequence[AdapterTerm]) -> Tensor:
    """As ComfyUI and Forge patch: in order; out-axis magnitudes are divided by the norms before D is added."""
    weight, terms = _prepared(weight, terms)
    for term in terms:
        patched = weight + term.delta
        if term.magnitude is not None:
            norms = axis_norms(weight if term.axis == "out" else patched, term.axis) + torch.finfo(weight.dtype).eps
            patched = patched * _spread(term.magnitude / norms, weight, term.axis)
        weight = torch.lerp(weight, patched, term.strength)
    return weight


def as_a1111(weight: Tensor, terms: Sequence[AdapterTerm]) -> Tensor:
    """As Stable Diffusion WebUI patches: in order; it takes every norm of columns, even under out-axis magnitudes."""
    weight, terms = _prepared(weight, terms)
    for term in terms:
        patched = weight + term.delta
        if term.magnitude is not None:
            norms = axis_norms(patched, "in").clamp(min=TINY_NORM)  # of columns that are 0, theirs makes NaN
            patched = patched * _spread(term.magnitude, weight, term.axis) / _spread(norms, weight, "in")
        weight = torch.lerp(weight, patched, term.strength)
    return weight


def as_lycoris(weight: Tensor, terms: Sequence[AdapterTerm]) -> Tensor:
    """As LyCORIS' hooks draw: differences summed on W; the strength reaches only the gain, never a DoRA's D."""
    weight, terms = _prepared(weight, terms)
    total = weight
    for term in terms:
        if term.magnitude is None:
            total = total + term.strength * term.delta
            continue
        v = weight + term.delta
        norms = axis_norms(v, term.axis) + torch.finfo(weight.dtype).eps
        total = total + v * _spread(1 + term.strength * (term.magnitude / norms - 1), v, term.axis) - weight
    return total


ADDITIVE = "additive"

MODES: Mapping[str, Callable[[Tensor, Sequence[AdapterTerm]], Tensor]] = {
    ADDITIVE: additive,
    "compose": compose,
    "direction-magnitude": direction_magnitude,
    "peft": as_peft,
    "comfyui": as_comfyui,
    "a1111": as_a1111,
    "lycoris": as_lycoris,
}

# To these an adapter at strength 0 is not one that is not there, as in the tools that they follow.
ACTIVE_AT_ZERO = frozenset({"peft", "lycoris"})
# In these one adapter after another meets the weight, and their order changes it.
IN_ORDER = frozenset({"peft", "comfyui", "a1111"})

MODE_SENTENCES: Mapping[str, str] = {
    "additive": "Adds what each adapter changes, times its strength; order does not matter.",
    "compose": "Makes one DoRA of all: differences add up, magnitudes multiply; order does not matter.",
    "direction-magnitude": "Adds directions of equal length, so that a strong adapter does not drown a weak one.",
    "peft": "As PEFT and diffusers do: one adapter after another, the strength inside the norm; not the base at 0.",
    "comfyui": "As ComfyUI and Forge do: one patch after another, each on the weight that the last one left.",
    "a1111": "As Stable Diffusion WebUI does: one patch after another, every norm taken of columns.",
    "lycoris": "As LyCORIS does while drawing: changes add up, but the strength scales a DoRA's magnitude only.",
}


def _prepared(weight: Tensor, terms: Sequence[AdapterTerm]) -> tuple[Tensor, list[AdapterTerm]]:
    """Everything in one dtype, fp32 or fp64, and differences in the shape of the weight."""
    dtype = reduce(torch.promote_types, (term.delta.dtype for term in terms), weight.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    return weight.to(dtype), [
        replace(
            term,
            delta=term.delta.to(dtype).reshape(weight.shape),
            magnitude=None if term.magnitude is None else term.magnitude.to(dtype).flatten(),
        )
        for term in terms
    ]


def _present(terms: Sequence[AdapterTerm]) -> list[AdapterTerm]:
    return [term for term in terms if term.strength != 0]


def _spread(values: Tensor, weight: Tensor, axis: Axis) -> Tensor:
    """One value per row or column, in a shape that broadcasts against the weight."""
    return values.reshape(*(-1 if dim == AXES.index(axis) else 1 for dim in range(weight.dim())))


def _static_gain(magnitude: Tensor, direction: Tensor, weight: Tensor, axis: Axis) -> Tensor:
    """m / N(V), and 1 where W or V has no direction."""
    norms = axis_norms(direction, axis)
    dead = (axis_norms(weight, axis) <= TINY_NORM) | (norms <= TINY_NORM)
    return gain(magnitude, RowNorms(norms.clamp(min=TINY_NORM), dead))


def difference(weight: Tensor, term: AdapterTerm) -> Tensor:
    """W'_i - W of one adapter at strength 1: (out, in[, kh, kw]) fp32 or fp64."""
    weight, (term,) = _prepared(weight, [term])
    return _difference(weight, term)


def _difference(weight: Tensor, term: AdapterTerm) -> Tensor:
    """D, or (g - 1) W + g D."""
    if term.magnitude is None:
        return term.delta
    g = _spread(_static_gain(term.magnitude, weight + term.delta, weight, term.axis), weight, term.axis)
    return (g - 1) * weight + g * term.delta


def _alone(weight: Tensor, term: AdapterTerm) -> Tensor:
    """W'_i."""
    v = weight + term.delta
    if term.magnitude is None:
        return v
    return v * _spread(_static_gain(term.magnitude, v, weight, term.axis), v, term.axis)


def _mean_magnitude(weight: Tensor, terms: Sequence[AdapterTerm], axis: Axis) -> Tensor:
    magnitudes = [axis_norms(weight + term.delta, axis) if term.magnitude is None else term.magnitude for term in terms]
    return geometric_magnitude(axis_norms(weight, axis), magnitudes, [term.strength for term in terms])
