"""Every way to write a difference is also an exact low-rank pair, of the shape and rank that it says beforehand."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dora_diffusion.functional.dora import rows
from dora_diffusion.functional.lycoris import (
    Pair,
    dense_pair,
    hadamard_delta,
    hadamard_pair,
    kronecker_delta,
    kronecker_factor,
    kronecker_pair,
    tucker_down,
)
from dora_diffusion.state import FactoredState, Module, ModuleState
from tests.tolerances import assert_close, assert_identical

Half = Literal["whole", "pair", "tucker"]
SIZES = st.integers(1, 5)
RANKS = st.integers(1, 3)
KERNELS = st.sampled_from([(), (1, 1), (3, 3), (2,), (1, 2, 2)])
SEEDS = st.integers(0, 2**16)
UNHURRIED = settings(deadline=None)  # the first einsum of a process is slow


def draws(seed: int):
    """(shape) -> numbers of fp64."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_is(pair: Pair, delta: Tensor) -> None:
    """P Q = D within 1e-12 of the largest number."""
    flat = rows(delta)
    assert pair.left.shape[0] == flat.shape[0]
    assert (pair.left @ pair.right - flat).abs().max() <= 1e-12 * max(1.0, float(flat.abs().max()))


def hadamard(draw, out: int, columns: int, kernel: tuple[int, ...], rank: int) -> dict[str, Tensor]:
    """LoHa's factors; with Tucker cores when there is a kernel."""
    factors = {}
    for half in (1, 2):
        if kernel:
            factors[f"hada_t{half}"] = draw(rank, rank, *kernel)
        factors[f"hada_w{half}_a"] = draw(rank, out) if kernel else draw(out, rank)
        factors[f"hada_w{half}_b"] = draw(rank, columns)
    return factors


def kronecker(
    draw, halves: tuple[Half, Half], outs: tuple[int, int], ins: tuple[int, int], kernel: tuple[int, ...], rank: int
) -> dict[str, Tensor]:
    """LoKr's factors as LyCORIS shapes them: the kernel is the second half's, flat in a pair that has no core."""
    factors = {}
    for number, half, out, columns in zip((1, 2), halves, outs, ins, strict=True):
        own = kernel if number == 2 else ()
        if half == "whole":
            factors[f"lokr_w{number}"] = draw(out, columns, *own)
        elif half == "pair":
            factors[f"lokr_w{number}_a"] = draw(out, rank)
            factors[f"lokr_w{number}_b"] = draw(rank, columns * int(torch.tensor(own).prod()))
        else:
            factors[f"lokr_w{number}_a"] = draw(rank, out)
            factors[f"lokr_w{number}_b"] = draw(rank, columns)
            factors[f"lokr_t{number}"] = draw(rank, rank, *own)
    return factors


@UNHURRIED
@given(SIZES, SIZES, KERNELS.filter(len), RANKS, SEEDS)
def test_a_tucker_pair_is_its_core_between_down_and_up(out, columns, kernel, rank, seed) -> None:
    draw = draws(seed)
    up, down, mid = draw(out, rank), draw(rank, columns), draw(rank, rank, *kernel)
    expected = torch.einsum("om,mn...,ni->oi...", up, mid, down)
    flat = [1] * len(kernel)
    assert_is(Pair(up, rows(tucker_down(down.reshape(rank, columns, *flat), mid))), expected)
    module = ModuleState(down.reshape(rank, columns, *flat), up.reshape(out, rank, *flat), 2.0, mid=mid)
    assert_close(module.delta(), 2 / rank * expected, computed_in=torch.float64)
    assert module.as_pair().mid is None
    says_what_it_is(module, expected)


@UNHURRIED
@given(SIZES, SIZES, st.booleans(), KERNELS.filter(len), RANKS, SEEDS)
def test_loha_is_the_product_of_its_halves_element_by_element(out, columns, has_core, kernel, rank, seed) -> None:
    factors = hadamard(draws(seed), out, columns, kernel if has_core else (), rank)
    halves = [
        torch.einsum("ij...,io,jn->on...", factors[f"hada_t{half}"], factors[f"hada_w{half}_a"], b)
        if has_core
        else factors[f"hada_w{half}_a"] @ b
        for half in (1, 2)
        for b in [factors[f"hada_w{half}_b"]]
    ]
    expected = halves[0] * halves[1]
    assert_close(hadamard_delta(factors), expected, computed_in=torch.float64)
    assert_is(hadamard_pair(factors), expected)
    state = FactoredState("loha", factors, scale=0.5)
    assert state.rank == rank**2
    says_what_it_is(state, expected)


@UNHURRIED
@given(
    st.sampled_from([(a, b) for a in ("whole", "pair") for b in ("whole", "pair", "tucker")]),
    st.tuples(SIZES, SIZES),
    st.tuples(SIZES, SIZES),
    KERNELS,
    RANKS,
    SEEDS,
)
def test_lokr_is_the_kronecker_product_of_its_halves(halves, outs, ins, kernel, rank, seed) -> None:
    kernel = (3, 3) if "tucker" in halves and not kernel else kernel
    factors = kronecker(draws(seed), halves, outs, ins, kernel, rank)
    first = rows(kronecker_factor(factors, 1))
    second = kronecker_factor(factors, 2).reshape(outs[1], ins[1], -1)
    # D[o1 o2, i1 i2, k] = w1[o1, i1] w2[o2, i2, k], by nothing but the definition
    expected = torch.einsum("ab,cdk->acbdk", first, second).reshape(outs[0] * outs[1], -1)
    assert_close(rows(kronecker_delta(factors)), expected, computed_in=torch.float64)
    assert_is(kronecker_pair(factors), expected)
    says_what_it_is(FactoredState("lokr", factors, scale=1.5), expected)


@UNHURRIED
@given(SIZES, SIZES, KERNELS, SEEDS)
def test_a_whole_difference_is_a_pair_on_its_smaller_side(out, columns, kernel, seed) -> None:
    delta = draws(seed)(out, columns, *kernel)
    pair = dense_pair(delta)
    assert_identical((pair.left @ pair.right).reshape(delta.shape), delta)  # beside an identity: to the last bit
    state = FactoredState("full", {"diff": delta})
    assert state.rank == min(rows(delta).shape)
    says_what_it_is(state, delta)


def says_what_it_is(state: Module, expected: Tensor) -> None:
    """`shape`, `rank`, `delta` and `as_pair` agree with each other and with D before scaling."""
    pair = state.as_pair()
    assert state.shape == rows(expected).shape
    assert pair.shape == state.shape
    assert pair.rank == state.rank
    scale = state.scale
    tolerance = 1e-12 * max(1.0, float(expected.abs().max()) * abs(scale))
    assert (rows(state.delta()) - scale * rows(expected)).abs().max() <= tolerance
    assert (rows(pair.delta()) - scale * rows(expected)).abs().max() <= tolerance
    assert pair.delta().dtype == expected.dtype


@pytest.mark.parametrize("algorithm", ["loha", "lokr", "full"])
def test_magnitude_and_axis_go_with_the_pair_and_the_pair_keeps_the_scale(algorithm) -> None:
    draw = draws(0)
    factors = {
        "loha": hadamard(draw, 4, 6, (), 2),
        "lokr": kronecker(draw, ("whole", "pair"), (2, 2), (2, 3), (), 1),
        "full": {"diff": draw(4, 6)},
    }[algorithm]
    state = FactoredState(algorithm, factors, scale=0.25, alpha=1.0, magnitude=draw(6), axis="in")
    pair = state.as_pair()
    assert pair.axis == "in"
    assert pair.scale == 0.25
    assert_identical(pair.magnitude, state.magnitude)
    assert state.tensors.keys() == {*factors, "magnitude"}
    half = state.to(dtype=torch.float16)
    assert {tensor.dtype for tensor in half.tensors.values()} == {torch.float16}
    assert (half.scale, half.alpha, half.axis) == (0.25, 1.0, "in")


def test_a_module_moves_and_casts_with_its_core() -> None:
    draw = draws(0)
    module = ModuleState(draw(2, 3, 1, 1), draw(4, 2, 1, 1), 1.0, draw(4), mid=draw(2, 2, 3, 3))
    assert module.to(dtype=torch.float32).tensors.keys() == {"down", "up", "mid", "magnitude"}
    assert {tensor.dtype for tensor in module.to(dtype=torch.float32).tensors.values()} == {torch.float32}
