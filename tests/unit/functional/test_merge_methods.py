"""Merging of differences against PEFT's own functions, on whole tensors, and what must hold of it anyway."""

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from dora_diffusion.functional.merge_methods import METHOD_SENTENCES, METHODS, Sparsity, drop_and_rescale, keep_largest
from tests.tolerances import assert_close, assert_identical

WEIGHTS = (0.7, -0.4, 1.3)
DENSITIES = pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
SHAPES = pytest.mark.parametrize("shape", [(7, 5), (4, 3, 3, 3)])
ELECTIONS = pytest.mark.parametrize("elect", ["total", "frequency"])


def differences(shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in WEIGHTS]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@SHAPES
def test_the_sum_is_pefts_task_arithmetic(shape: tuple[int, ...]) -> None:
    expected = merge_utils.task_arithmetic(differences(shape), torch.tensor(WEIGHTS))
    assert_identical(METHODS["svd"](differences(shape), WEIGHTS, Sparsity()), expected)


@SHAPES
@DENSITIES
def test_magnitude_prune_is_pefts(shape: tuple[int, ...], density: float) -> None:
    expected = merge_utils.magnitude_prune(differences(shape), torch.tensor(WEIGHTS), density)
    assert_identical(METHODS["magnitude-prune"](differences(shape), WEIGHTS, Sparsity(density)), expected)


@SHAPES
@DENSITIES
@ELECTIONS
def test_ties_is_pefts(shape: tuple[int, ...], density: float, elect: str) -> None:
    expected = merge_utils.ties(differences(shape), torch.tensor(WEIGHTS), density, elect)
    assert_close(METHODS["ties"](differences(shape), WEIGHTS, Sparsity(density, None, elect)), expected)


@SHAPES
@DENSITIES
def test_dare_linear_is_pefts_from_the_same_seed(shape: tuple[int, ...], density: float) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = merge_utils.dare_linear(differences(shape), torch.tensor(WEIGHTS), density)
    assert_close(METHODS["dare-linear"](differences(shape), WEIGHTS, Sparsity(density, seeded())), expected)


@SHAPES
@DENSITIES
@ELECTIONS
def test_dare_ties_is_pefts_from_the_same_seed(shape: tuple[int, ...], density: float, elect: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = merge_utils.dare_ties(differences(shape), torch.tensor(WEIGHTS), density, elect)
    assert_close(METHODS["dare-ties"](differences(shape), WEIGHTS, Sparsity(density, seeded(), elect)), expected)


def test_ties_by_hand() -> None:
    deltas = [torch.tensor([3.0, -1.0, 0.5, 2.0]), torch.tensor([-1.0, -2.0, 4.0, 0.1])]
    # kept: [3, 0, 0, 2] and [0, -2, 4, 0]; each sign is elected by the only adapter that kept the entry
    merged = METHODS["ties"](deltas, [1.0, 0.5], Sparsity(0.5))
    assert_identical(merged, torch.tensor([3.0, -1.0, 2.0, 2.0]))
    # nothing thinned: the sums are 2, -3, 4.5, 2.1, and entry 0 of the second does not agree
    merged = METHODS["ties"](deltas, [1.0, 1.0], Sparsity(1.0))
    assert_close(merged, torch.tensor([3.0, -1.5, 2.25, 1.05]))


def test_the_largest_stay() -> None:
    kept = keep_largest(torch.tensor([[1.0, -5.0], [0.5, 3.0]]), 0.5)
    assert_identical(kept, torch.tensor([[0.0, -5.0], [0.0, 3.0]]))


def test_dropping_keeps_the_mean_and_the_share() -> None:
    dropped = drop_and_rescale(torch.ones(200, 200), 0.25, seeded())
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    assert abs(float(dropped.mean()) - 1) < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_density_one_thins_nothing_out_and_one_adapter_is_itself(method: str) -> None:
    (delta, *_) = differences((7, 5))
    assert_identical(METHODS[method]([delta], [1.0], Sparsity(1.0)), delta)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_generator_makes_the_same_merge(method: str) -> None:
    one, two = (METHODS[method](differences((7, 5)), WEIGHTS, Sparsity(0.5, seeded())) for _ in range(2))
    assert_identical(one, two)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5])
def test_a_density_that_is_no_share_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        Sparsity(density)


def test_an_unknown_election_is_refused() -> None:
    with pytest.raises(ValueError, match="'total' or 'frequency'"):
        Sparsity(elect="most")


def test_every_method_has_its_sentence() -> None:
    assert list(METHOD_SENTENCES) == list(METHODS)
