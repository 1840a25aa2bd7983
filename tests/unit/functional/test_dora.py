"""The formulas against dense fp64 references, and their properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dora_diffusion.functional import dora as f
from tests.tolerances import assert_close, assert_identical

SHAPES = {"linear": ((7, 5), (3, 5), (7, 3)), "conv": ((6, 4, 3, 3), (2, 4, 3, 3), (6, 2, 1, 1))}
AXES = ("out", "in")


def triple(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, down, up = (torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES[kind])
    return weight, down, up


def dense_norm(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    rows = weight.flatten(1).double() + scale * up.flatten(1).double() @ down.flatten(1).double()
    return rows.square().sum(1).sqrt()


@pytest.mark.parametrize("kind", SHAPES)
@given(seed=st.integers(0, 10_000), scale=st.floats(-4, 4))
@settings(max_examples=25, deadline=None)
def test_factored_norm_equals_dense(kind: str, seed: int, scale: float) -> None:
    weight, down, up = triple(kind, seed)
    assert_close(f.row_norms(weight, down, up, scale), dense_norm(weight, down, up, scale), computed_in=torch.float64)


def test_factored_norm_survives_cancellation() -> None:
    weight, down, up = triple("linear", dtype=torch.float32)
    weight[2] = -0.5 * (up[2] @ down) * (1 + 1e-5)
    weight[4] = -0.5 * (up[4] @ down)
    expected = dense_norm(weight, down, up, 0.5).float()
    got = f.row_norms(weight, down, up, 0.5)
    keep = torch.arange(7) != 4
    torch.testing.assert_close(got[keep], expected[keep], rtol=2e-2, atol=0)
    assert got[4] < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", SHAPES)
def test_gain_is_exactly_one_at_initialisation(kind: str, dtype: torch.dtype) -> None:
    weight, down, up = triple(kind, dtype=torch.float32)
    weight[1] = 0
    weight = weight.to(dtype)
    norms = f.norms_from(f.row_sums(weight, down), weight, down, torch.zeros_like(up), 2.0)
    g = f.gain(f.initial_magnitude(weight), norms)
    assert_identical(g, torch.ones(weight.shape[0]))


def test_zero_row_adapts_as_plain_lora() -> None:
    weight, down, up = triple("linear")
    weight[0] = 0
    tuned = f.dora_weight(weight, down, up, 0.5, f.initial_magnitude(weight))
    assert_close(tuned[0], 0.5 * (up @ down)[0], computed_in=torch.float64)


def test_compose_passes_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    base, low = (torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    g = torch.rand(1, 1, 5, generator=generator, dtype=torch.float64).add(0.5).requires_grad_()
    bias = torch.randn(5, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda b, x, y: f.compose(b, x, y, bias), (base, low, g))


def test_exact_gain_passes_gradcheck() -> None:
    weight, down, up = triple("linear")
    magnitude = f.initial_magnitude(weight).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b, m: f.gain(m, f.norms_from(f.row_sums(weight, a), weight, a, b, 0.7)),
        (down.requires_grad_(), up.requires_grad_(), magnitude),
    )


def magnitude_on(axis: f.Axis, weight: Tensor) -> Tensor:
    return f.initial_magnitude(weight if axis == "out" else weight.transpose(0, 1)) * 1.3


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("strength", [-1.0, 0.5, 1.0, 2.0])
def test_gain_form_interpolates_the_weight(kind: str, axis: f.Axis, strength: float) -> None:
    weight, down, up = triple(kind)
    magnitude = magnitude_on(axis, weight)
    tuned = f.dora_weight(weight, down, up, 0.5, magnitude, axis=axis)
    expected = weight + strength * (tuned - weight)
    form = f.gain_form(weight, down, up, 0.5, magnitude, strength=strength, axis=axis)
    assert_close(f.apply_gain_form(weight, form), expected, computed_in=torch.float64)
    at_one = f.gain_form(weight, down, up, 0.5, magnitude, axis=axis)
    scaled = f.apply_gain_form(weight, f.scale_gain_form(at_one, strength))
    assert_close(scaled, expected, computed_in=torch.float64)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("axis", AXES)
@given(strength=st.floats(-1e-3, 1e-3))
@settings(max_examples=25, deadline=None)
def test_the_weight_goes_to_the_base_as_the_strength_goes_to_0(kind: str, axis: f.Axis, strength: float) -> None:
    weight, down, up = triple(kind)
    magnitude = magnitude_on(axis, weight)
    change = f.dora_weight(weight, down, up, 0.5, magnitude, axis=axis) - weight
    got = f.apply_gain_form(weight, f.gain_form(weight, down, up, 0.5, magnitude, strength=strength, axis=axis))
    assert float((got - weight).norm()) <= abs(strength) * float(change.norm()) * (1 + 1e-6) + 1e-14
    if strength == 0:
        assert_identical(got, weight)


@pytest.mark.parametrize("kind", SHAPES)
@given(seed=st.integers(0, 10_000), scale=st.floats(-4, 4))
@settings(max_examples=25, deadline=None)
def test_column_norms_equal_dense(kind: str, seed: int, scale: float) -> None:
    weight, down, up = triple(kind, seed)
    dense = weight + f.low_rank_delta(down, up, scale)
    expected = dense.transpose(0, 1).flatten(1).norm(dim=1)
    assert_close(f.column_norms(weight, down, up, scale), expected, computed_in=torch.float64)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("axis", AXES)
def test_a_blend_of_both_axes_and_lora_is_the_sum_of_their_changes(kind: str, axis: f.Axis) -> None:
    weight, _, _ = triple(kind)
    expected, forms = weight.clone(), []
    for seed, (kept, here) in enumerate([(True, axis), (True, "in"), (False, "out")], start=1):
        _, down, up = triple(kind, seed)
        magnitude = magnitude_on(here, weight) if kept else None
        expected += 0.4 * seed * (f.dora_weight(weight, down, up, 0.5, magnitude, axis=here) - weight)
        forms.append(f.gain_form(weight, down, up, 0.5, magnitude, strength=0.4 * seed, axis=here))
    assert_close(f.apply_gain_form(weight, f.sum_gain_forms(forms)), expected, computed_in=torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1, 40, 10_000])
def test_norms_of_a_half_weight_are_those_of_its_fp32_copy_whatever_the_blocks(dtype, block, monkeypatch) -> None:
    weight, down, up = triple("conv", dtype=torch.float32)
    half = weight.to(dtype)
    monkeypatch.setattr(f, "BLOCK", block)
    assert_close(f.row_norms(half, down, up, 0.7), f.row_norms(half.float(), down, up, 0.7))
    down.requires_grad_()
    (got,) = torch.autograd.grad(f.row_norms(half, down, up, 0.7).sum(), down)
    (expected,) = torch.autograd.grad(dense_norm(half.float(), down, up, 0.7).sum(), down)
    assert_close(got, expected)
    form = f.gain_form(half, down.detach(), up, 0.7, f.initial_magnitude(half) * 1.1)
    assert_identical(f.apply_gain_form(half, form), f.apply_gain_form(half.float(), form).to(dtype))


def test_a_channels_last_convolution_is_read_as_any_other() -> None:
    weight, down, up = triple("conv", dtype=torch.float32)
    last = weight.contiguous(memory_format=torch.channels_last)
    assert_close(f.row_norms(last, down, up, 0.7), f.row_norms(weight, down, up, 0.7))


def test_a_frozen_magnitude_saves_no_activation() -> None:
    base, low = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape), lambda t: t):
        f.compose(base, low, torch.rand(5), None)
    assert saved == [(5,)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape), lambda t: t):
        f.compose(base, low, torch.rand(5, requires_grad=True), None)
    assert saved[1:] == [(3, 5), (5,)]


def test_tuned_rows_have_the_magnitude_as_norm() -> None:
    weight, down, up = triple("conv")
    magnitude = f.initial_magnitude(weight) * torch.linspace(0.5, 2, 6, dtype=torch.float64)
    tuned = f.dora_weight(weight, down, up, 1.5, magnitude)
    assert_close(tuned.flatten(1).norm(dim=1), magnitude, computed_in=torch.float64)


@given(order=st.permutations(range(3)))
@settings(max_examples=6, deadline=None)
def test_sum_of_gain_forms_ignores_order(order: list[int]) -> None:
    weight, _, _ = triple("linear")
    forms = []
    for seed in range(3):
        _, down, up = triple("linear", seed + 1)
        magnitude = f.initial_magnitude(weight) * (1 + 0.1 * seed) if seed else None
        forms.append(f.gain_form(weight, down, up, 0.5, magnitude, strength=0.3 + seed))
    expected = f.apply_gain_form(weight, f.sum_gain_forms(forms))
    got = f.apply_gain_form(weight, f.sum_gain_forms([forms[i] for i in order]))
    assert_close(got, expected, computed_in=torch.float64)
