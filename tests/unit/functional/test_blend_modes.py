"""What must hold of every way to put several adapters on one weight, whatever tool it copies."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dora_diffusion.functional import dora as f
from dora_diffusion.functional.blend_modes import MODE_SENTENCES, MODES, AdapterTerm, direction_factor
from dora_diffusion.functional.dora import Axis
from tests.tolerances import assert_close, assert_identical

OURS = ("additive", "compose", "direction-magnitude")
STILL_AT_ZERO = (*OURS, "comfyui", "a1111")
SHAPES = ((6, 5), (5, 5), (6, 4, 3, 3))


def made(
    shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32, axis: Axis = "out"
) -> tuple[Tensor, list[AdapterTerm]]:
    """A weight and three adapters: a DoRA, a LoRA, a DoRA."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=dtype)
    terms = []
    for number, strength in enumerate((0.7, -0.4, 1.3)):
        delta = 0.3 * torch.randn(shape, generator=generator, dtype=dtype)
        magnitude = 0.5 + 2 * torch.rand(shape[0 if axis == "out" else 1], generator=generator, dtype=dtype)
        terms.append(AdapterTerm(delta, None if number == 1 else magnitude, axis, strength))
    return weight, terms


def at(strengths: Sequence[float], terms: Sequence[AdapterTerm]) -> list[AdapterTerm]:
    return [AdapterTerm(term.delta, term.magnitude, term.axis, s) for term, s in zip(terms, strengths, strict=True)]


def alone(weight: Tensor, term: AdapterTerm) -> Tensor:
    """W' of one adapter, by the code that layers and conversion call."""
    eye = torch.eye(term.delta[0].numel(), dtype=weight.dtype).reshape(-1, *weight.shape[1:])
    return f.dora_weight(weight, eye, term.delta.flatten(1), 1.0, term.magnitude, axis=term.axis)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("mode", OURS)
def test_ours_do_not_depend_on_the_order(mode: str, axis: Axis, shape: tuple[int, ...]) -> None:
    weight, terms = made(shape, dtype=torch.float64, axis=axis)
    first, *others = (MODES[mode](weight, order) for order in itertools.permutations(terms))
    for other in others:
        assert float((first - other).norm() / first.norm()) <= 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("mode", OURS)
@pytest.mark.parametrize("number", range(3))
def test_one_at_strength_one_is_that_adapter(mode: str, axis: Axis, shape: tuple[int, ...], number: int) -> None:
    weight, terms = made(shape, axis=axis)
    strengths = [float(position == number) for position in range(3)]
    assert_close(MODES[mode](weight, at(strengths, terms)), alone(weight, terms[number]))


@pytest.mark.parametrize("mode", STILL_AT_ZERO)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_at_zero_is_the_base_bit_for_bit(mode: str, shape: tuple[int, ...]) -> None:
    weight, terms = made(shape)
    assert_identical(MODES[mode](weight, at([0.0, 0.0, 0.0], terms)), weight)
    assert_identical(MODES[mode](weight, []), weight)


@pytest.mark.parametrize("mode", OURS)
@pytest.mark.parametrize("number", range(3))
def test_a_strength_of_zero_is_an_adapter_that_is_not_there(mode: str, number: int) -> None:
    weight, terms = made((6, 5))
    strengths = [float(position == number) for position in range(3)]
    only = at([1.0], [terms[number]])
    assert_identical(MODES[mode](weight, at(strengths, terms)), MODES[mode](weight, only))


@pytest.mark.parametrize("number", range(2))
def test_one_adapter_at_one_is_its_own_weight_bit_for_bit(number: int) -> None:
    weight, terms = made((60, 50))
    v, m = weight + terms[number].delta, terms[number].magnitude
    own = v if m is None else v * (m / f.squared_row_norms(v).sqrt())[:, None]
    assert_identical(MODES["additive"](weight, at([1.0], [terms[number]])), own)


def test_additive_is_the_sum_of_gain_forms_that_layers_draw_with() -> None:
    weight, terms = made((6, 5))
    forms = [
        f.gain_form(weight, torch.eye(5), term.delta, 1.0, term.magnitude, strength=term.strength) for term in terms
    ]
    assert_close(MODES["additive"](weight, terms), f.apply_gain_form(weight, f.sum_gain_forms(forms)))


def test_loras_alone_add_up_under_compose() -> None:
    weight, terms = made((6, 5))
    plain = [AdapterTerm(term.delta, strength=term.strength) for term in terms]
    expected = weight + sum(term.strength * term.delta for term in terms)
    assert_close(MODES["compose"](weight, plain), expected)
    assert_close(MODES["additive"](weight, plain), expected)


@pytest.mark.parametrize("mode", ["compose", "direction-magnitude"])
def test_rows_have_the_weighted_geometric_mean_of_lengths(mode: str) -> None:
    weight, terms = made((6, 5), dtype=torch.float64)
    start = weight.norm(dim=1)
    lengths = [(weight + t.delta).norm(dim=1) if t.magnitude is None else t.magnitude for t in terms]
    expected = start * torch.stack([(m / start) ** t.strength for m, t in zip(lengths, terms, strict=True)]).prod(0)
    assert_close(MODES[mode](weight, terms).norm(dim=1), expected, computed_in=torch.float64)


def test_direction_magnitude_is_a_dora_of_the_same_differences() -> None:
    """V is a multiple of W + (a difference that the adapters' own factors span), so it can be saved."""
    weight, terms = made((6, 5), dtype=torch.float64)
    mixed = MODES["direction-magnitude"](weight, terms)
    base = weight.norm(dim=1)
    norms = [(weight + term.delta).norm(dim=1) for term in terms]
    c = direction_factor(base, norms, [term.strength for term in terms])
    delta = sum(t.strength / (c * norm)[:, None] * t.delta for t, norm in zip(terms, norms, strict=True))
    m = mixed.norm(dim=1) * c.sign()
    assert_close(alone(weight, AdapterTerm(delta, m)), mixed, computed_in=torch.float64)


@pytest.mark.parametrize("mode", MODES)
def test_a_dead_row_stays_finite_and_others_are_untouched(mode: str) -> None:
    weight, terms = made((6, 5))
    weight[2] = 0
    terms[0] = AdapterTerm(terms[0].delta.index_fill(0, torch.tensor([2]), 0.0), terms[0].magnitude, "out", 0.7)
    mixed = MODES[mode](weight, terms)
    assert torch.isfinite(mixed).all()
    if mode != "a1111":  # whose columns mix rows
        rest = [0, 1, 3, 4, 5]
        kept = [
            AdapterTerm(t.delta[rest], None if t.magnitude is None else t.magnitude[rest], "out", t.strength)
            for t in terms
        ]
        assert_close(mixed[rest], MODES[mode](weight[rest], kept))


@pytest.mark.parametrize("mode", OURS)
def test_a_row_of_zeros_adapts_as_lora(mode: str) -> None:
    weight, terms = made((6, 5))
    weight[2] = 0
    expected = sum(term.strength * term.delta[2] for term in terms)
    assert_close(MODES[mode](weight, terms)[2], expected)


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_weights_and_flat_differences_are_taken_in_fp32(mode: str) -> None:
    weight, terms = made((6, 4, 3, 3))
    half = weight.bfloat16()
    flat = [
        AdapterTerm(t.delta.flatten(1), None if t.magnitude is None else t.magnitude[:, None], "out", t.strength)
        for t in terms
    ]
    assert_identical(MODES[mode](half, flat), MODES[mode](half.float(), terms))


def test_both_axes_in_one_layer_are_refused_where_they_cannot_be_one_dora() -> None:
    weight, terms = made((5, 5))
    terms[2] = AdapterTerm(terms[2].delta, terms[2].magnitude, "in", 1.0)
    for mode in ("compose", "direction-magnitude"):
        with pytest.raises(ValueError, match="convert the adapter of the in axis to the out axis first"):
            MODES[mode](weight, terms)
    with pytest.raises(ValueError, match="out axis only"):
        MODES["peft"](weight, terms)
    assert torch.isfinite(MODES["additive"](weight, terms)).all()


def test_a_negative_magnitude_has_no_geometric_mean() -> None:
    weight, terms = made((5, 5))
    with pytest.raises(ValueError, match="blend additively"):
        MODES["compose"](weight, [AdapterTerm(terms[0].delta, -torch.ones(5), "out", 0.5)])


def test_every_mode_has_its_sentence() -> None:
    assert list(MODE_SENTENCES) == list(MODES)
    assert all(text.endswith(".") and "\n" not in text for text in MODE_SENTENCES.values())
