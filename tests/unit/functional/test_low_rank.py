"""Low-rank pairs against LAPACK's SVD; extraction against DoRAs that are known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dora_diffusion.functional.dora import dora_weight, initial_magnitude, rows
from dora_diffusion.functional.low_rank import FARTHEST, extract_dora, low_rank, recompress, relative_error
from dora_diffusion.functional.lycoris import Pair
from tests.tolerances import assert_close, assert_identical


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def truncated(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def product(pair: Pair) -> Tensor:
    return pair.left @ pair.right


def tuned_from(weight: Tensor, rank: int, *, size: float = 0.5, seed: int = 1) -> Tensor:
    """What a DoRA of that rank makes of a weight: directions and lengths of rows change by about `size`."""
    out, columns = rows(weight).shape
    delta = normal(out, rank, seed=seed) @ normal(rank, columns, seed=seed + 1) * size / (rank * columns) ** 0.5
    direction = rows(weight) + delta.to(weight.dtype)
    lengths = initial_magnitude(weight) * torch.exp(0.4 * size * normal(out, seed=seed + 2))
    return (lengths[:, None] * torch.nn.functional.normalize(direction, dim=1)).reshape(weight.shape)


def reached(tuned: Tensor, base: Tensor, rank: int, *, rounds: int = 30, error: float = 0.0) -> float:
    parts = extract_dora(tuned, base, rank, rounds=rounds, error=error)
    pair = parts.pair
    return relative_error(dora_weight(rows(base), pair.right, pair.left, 1.0, parts.magnitude), tuned, base)


@pytest.mark.parametrize("shape", [(48, 32), (320, 640), (640, 320), (24, 16, 3, 3)])
def test_a_matrix_of_the_rank_is_found_whole(shape: tuple[int, ...]) -> None:
    matrix = normal(shape[0], 6) @ normal(6, rows(torch.empty(shape)).shape[1], seed=1)
    pair = low_rank(matrix.reshape(shape), 6)
    assert relative_error(product(pair), matrix) < 1e-5
    assert_close(torch.linalg.vector_norm(pair.left), torch.linalg.vector_norm(pair.right))


@pytest.mark.parametrize("rank", [1, 8, 40])
@pytest.mark.parametrize("decay", [0.0, 3.0], ids=["noise", "decaying"])
def test_low_rank_is_as_near_as_the_truncated_svd(rank: int, decay: float) -> None:
    left, _ = torch.linalg.qr(normal(384, 384))
    right, _ = torch.linalg.qr(normal(512, 384, seed=1))
    matrix = (left * torch.logspace(0, -decay, 384)) @ right.T
    best = relative_error(truncated(matrix, rank), matrix)
    assert best <= relative_error(product(low_rank(matrix, rank)), matrix) + 1e-6
    assert relative_error(product(low_rank(matrix, rank)), matrix) < best * 1.002


def test_small_matrices_are_cut_as_by_svd() -> None:
    matrix = normal(96, 640, dtype=torch.float64)
    assert_close(product(low_rank(matrix, 10)), truncated(matrix, 10))


def test_the_random_start_is_an_argument_and_fixed_by_default() -> None:
    matrix = normal(256, 256)
    assert_identical(product(low_rank(matrix, 4)), product(low_rank(matrix, 4)))
    other = low_rank(matrix, 4, generator=torch.Generator().manual_seed(7))
    assert not torch.equal(other.left, low_rank(matrix, 4).left)


@pytest.mark.parametrize("error", [0.7, 0.3, 0.05, 0.002])
@pytest.mark.parametrize("side", [64, 320])
def test_an_error_keeps_no_more_ranks_than_it_needs(error: float, side: int) -> None:
    left, _ = torch.linalg.qr(normal(side, side))
    matrix = (left * torch.logspace(0, -3, side)) @ torch.linalg.qr(normal(side, side, seed=1))[0]
    pair = low_rank(matrix, side, error=error)
    rank = pair.right.shape[0]
    assert relative_error(product(pair), matrix) <= error * 1.001
    assert relative_error(truncated(matrix, rank - 1), matrix) > error * 0.99
    assert low_rank(matrix, 3, error=error).right.shape[0] <= 3


def test_recompress_is_the_svd_of_the_product() -> None:
    left, right = normal(80, 24, dtype=torch.float64), normal(24, 8, 3, 3, seed=1, dtype=torch.float64)
    assert_close(product(recompress(left, right, 5)), truncated(left @ rows(right), 5))
    assert_close(product(recompress(left, right, 99)), left @ rows(right))
    assert recompress(left, right, 99).right.shape == (24, 72)


def test_ranks_beyond_the_smaller_side_are_capped_and_below_one_refused() -> None:
    assert low_rank(normal(6, 9), 20).left.shape == (6, 6)
    assert extract_dora(normal(6, 9), normal(6, 9, seed=1), 20).pair.right.shape == (6, 9)
    for call in (lambda: low_rank(normal(6, 9), 0), lambda: extract_dora(normal(6, 9), normal(6, 9), 0)):
        with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
            call()
    with pytest.raises(ValueError, match=r"tuned weight \(6, 8\) beside a base of \(6, 9\)"):
        extract_dora(normal(6, 8), normal(6, 9), 1)
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        extract_dora(normal(6, 9), normal(6, 9), 1, rounds=0)


@pytest.mark.parametrize("seed", [100, 300, 400, 500])
@pytest.mark.parametrize("shape", [(24, 40), (16, 160), (32, 24, 3, 3)])
def test_few_rows_are_recovered_as_well(shape: tuple[int, ...], seed: int) -> None:
    base = normal(*shape, seed=seed) / rows(torch.empty(shape)).shape[1] ** 0.5
    tuned = tuned_from(base, 8, seed=seed + 1)
    assert reached(tuned, base, 8) < 1e-5  # the alternation alone leaves up to 3e-3 in as many rounds


@pytest.mark.parametrize("shape", [(64, 64), (320, 320), (320, 1280), (640, 224), (32, 24, 3, 3)])
def test_a_dora_is_recovered_where_the_svd_of_the_difference_leaves_a_third(shape: tuple[int, ...]) -> None:
    base = normal(*shape) / rows(torch.empty(shape)).shape[1] ** 0.5
    tuned = tuned_from(base, 8)
    assert reached(tuned, base, 8) < 1e-5
    assert relative_error(rows(base) + truncated(rows(tuned - base), 8), tuned, base) > 0.25


def test_small_changes_are_recovered_to_the_digits_that_the_weights_have() -> None:
    for dtype, bound in ((torch.float32, 3e-4), (torch.float64, 1e-6)):
        base = normal(256, 256, dtype=dtype) / 16
        assert reached(tuned_from(base, 8, size=1e-3), base, 8) < bound


def test_with_noise_it_comes_where_exact_alternation_comes() -> None:
    base = normal(256, 320) / 320**0.5
    tuned = tuned_from(base, 8) + 0.1 * normal(256, 320, seed=9) / 320**0.5
    gains = tuned.norm(dim=1) / base.norm(dim=1)
    for _ in range(100):
        delta = truncated(tuned - gains[:, None] * base, 8) / gains[:, None]
        direction = base + delta
        gains = (tuned * direction).sum(1) / direction.square().sum(1)
    exact = dora_weight(base, torch.eye(320), delta, 1.0, tuned.norm(dim=1))
    assert abs(reached(tuned, base, 8) - relative_error(exact, tuned, base)) < 1e-4


def test_the_rows_have_the_lengths_of_the_tuned_weight() -> None:
    base, tuned = normal(40, 30), normal(40, 30, seed=1)
    parts = extract_dora(tuned, base, 4)
    made = dora_weight(base, parts.pair.right, parts.pair.left, 1.0, parts.magnitude)
    assert_close(made.norm(dim=1), tuned.norm(dim=1))
    assert_identical(parts.magnitude, parts.magnitude.float())


def test_an_error_keeps_fewer_directions_of_a_dora() -> None:
    base = normal(256, 256) / 16
    tuned = tuned_from(base, 12)
    assert extract_dora(tuned, base, 32, error=1e-4).pair.right.shape[0] == 12
    coarse = extract_dora(tuned, base, 32, error=0.4).pair.right.shape[0]
    assert coarse < 12
    assert reached(tuned, base, 32, error=0.4) <= 0.4
    assert extract_dora(tuned, base, 2, error=1e-4).pair.right.shape[0] == 2


def test_rows_that_are_zero_in_either_weight() -> None:
    base, rank = normal(48, 40) / 40**0.5, 4
    base[3] = 0  # the gain of such a row is 1
    magnitude = initial_magnitude(base) * torch.exp(0.2 * normal(48, seed=3))
    magnitude[5] = 0
    tuned = dora_weight(base, normal(rank, 40, seed=1) / 40**0.5, 0.2 * normal(48, rank, seed=2), 1.0, magnitude)
    parts = extract_dora(tuned, base, rank)
    made = dora_weight(base, parts.pair.right, parts.pair.left, 1.0, parts.magnitude)
    assert relative_error(made, tuned, base) < 1e-5
    assert float(made[5].abs().max()) == 0
    equal = extract_dora(base, base, 2)
    assert_close(dora_weight(base, equal.pair.right, equal.pair.left, 1.0, equal.magnitude), base)


def test_half_precision_weights_are_computed_in_fp32() -> None:
    base = (normal(64, 48) / 48**0.5).bfloat16()
    parts = extract_dora(tuned_from(base.float(), 4).bfloat16(), base, 4)
    assert {parts.pair.left.dtype, parts.pair.right.dtype, parts.magnitude.dtype} == {torch.float32}


def test_relative_error_beside_nothing() -> None:
    zero, one = torch.zeros(3, 2), torch.ones(3, 2)
    assert relative_error(zero, zero) == 0
    assert relative_error(one, zero) == float("inf")
    assert relative_error(one, one, one) == 0
    assert relative_error(2 * one, one) == 1


@settings(max_examples=100, deadline=None)
@given(exponent=st.integers(-60, 60), dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 10**6))
def test_a_relative_error_does_not_depend_on_the_scale(exponent: int, dtype: torch.dtype, seed: int) -> None:
    actual, expected, base = (normal(5, 3, seed=seed + index).to(dtype) for index in range(3))
    scale = 2.0**exponent
    error = relative_error(actual, expected, base)
    assert relative_error(scale * actual, scale * expected, scale * base) == pytest.approx(error, rel=1e-6)
    assert relative_error(scale * actual, scale * expected) == pytest.approx(relative_error(actual, expected), rel=1e-6)
    assert error == pytest.approx(float((actual - expected).norm() / (expected - base).norm()), rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(shape=st.lists(st.integers(1, 4), min_size=0, max_size=4), exponent=st.integers(-140, 60))
def test_nothing_missed_is_nothing_and_something_beside_nothing_is_infinite(shape: list[int], exponent: int) -> None:
    expected, off = normal(*shape) if shape else torch.tensor(1.0), torch.full(shape, 2.0**exponent)
    for same in (expected, torch.zeros(shape)):
        assert relative_error(same, same) == relative_error(same, same, same) == 0
    assert relative_error(off, torch.zeros(shape)) == math.inf
    assert relative_error(expected + 1, expected, expected) == math.inf


@settings(max_examples=50, deadline=None)
@given(bad=st.sampled_from([math.nan, math.inf, -math.inf]), at=st.integers(0, 5), which=st.integers(0, 2))
def test_what_is_no_number_is_never_near(bad: float, at: int, which: int) -> None:
    tensors = [normal(2, 3, seed=index) for index in range(3)]
    tensors[which].view(-1)[at] = bad
    assert relative_error(*tensors) == math.inf
    assert (
        relative_error(torch.full((2,), bad), torch.zeros(2))
        == relative_error(*[torch.full((2,), bad)] * 2)
        == math.inf
    )


def test_relative_errors_take_any_dtype_and_compare_numbers_in_their_order() -> None:
    weight = normal(4, 3, 1, 1)
    assert relative_error(weight.reshape(4, 3), weight) == 0
    assert 0 < relative_error(weight.half(), weight) < 1e-3
    assert relative_error(weight.double(), weight.bfloat16().double()) < 1e-2
    with pytest.raises(RuntimeError):
        relative_error(torch.ones(1), torch.ones(3))


@settings(max_examples=25, deadline=None)
@given(out=st.integers(2, 24), columns=st.integers(2, 24), rank=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_more_rounds_never_come_less_near(out: int, columns: int, rank: int, seed: int) -> None:
    base, tuned = normal(out, columns, seed=seed).double(), normal(out, columns, seed=seed + 1).double()

    def objective(rounds: int) -> float:
        parts = extract_dora(tuned, base, rank, rounds=rounds)
        direction = base + product(parts.pair)
        gains = (tuned * direction).sum(1) / direction.square().sum(1)
        start = tuned.norm(dim=1) / base.norm(dim=1)  # g is never negative, and stays near where it starts
        gains = gains.minimum(start * FARTHEST).maximum(start / FARTHEST)
        return float((tuned - gains[:, None] * direction).norm())

    few, many = objective(2), objective(40)
    assert many <= few + 1e-9
