"""How far rows turn and stretch, from norms and products: beside dense weights and another formula of the angle."""

import math

import pytest
import torch
from torch import Tensor

from dora_diffusion.functional.dora import dora_weight, initial_magnitude
from dora_diffusion.functional.row_changes import RowChanges, mean_changes, row_changes

SHAPES = ((6, 10), (5, 4, 3, 3))


def parts(shape: tuple[int, ...], *, size: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, A, B and m."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    down = torch.randn(3, *shape[1:], generator=generator)
    up = size * torch.randn(shape[0], 3, *[1] * (len(shape) - 2), generator=generator)
    magnitude = initial_magnitude(weight) * (1 + size * torch.randn(shape[0], generator=generator))
    return weight, down, up, magnitude


def dense(weight: Tensor, new: Tensor) -> RowChanges:
    """The angle as 2 atan2(||u - v||, ||u + v||) of unit rows u and v (Kahan), in fp64."""
    before, after = (each.double().flatten(1) for each in (weight, new))
    u, v = (each / each.norm(dim=1, keepdim=True) for each in (before, after))
    angles = 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))
    return RowChanges(angles, (after.norm(dim=1) / before.norm(dim=1) - 1).abs())


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_dora", [True, False])
def test_they_are_those_of_the_dense_weight(shape, size, is_dora) -> None:
    weight, down, up, magnitude = parts(shape, size=size)
    m = magnitude if is_dora else None
    found = row_changes(weight, down, up, 0.5, m)
    new = dora_weight(*(part.double() for part in (weight, down, up)), 0.5, None if m is None else m.double())
    expected = dense(weight, new)
    torch.testing.assert_close(found.angles, expected.angles, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found.stretches, expected.stretches, rtol=1e-3, atol=1e-6)


def test_nothing_has_moved_before_the_first_step() -> None:
    weight, down, up, _ = parts((6, 10), size=0.0)
    assert mean_changes([row_changes(weight, down, up, 1.0, initial_magnitude(weight))]) == (0.0, 0.0)


def test_a_change_along_the_row_stretches_it_and_turns_nothing() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    found = row_changes(weight, torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]), 1.0, None)
    assert found.angles.tolist() == pytest.approx([0.0, 0.0], abs=1e-7)
    assert found.stretches.tolist() == pytest.approx([1.0, 0.0])


def test_a_row_can_be_turned_round() -> None:
    found = row_changes(torch.tensor([[1.0, 0.0]]), torch.tensor([[-3.0, 0.0]]), torch.tensor([[1.0]]), 1.0, None)
    assert found.angles.item() == pytest.approx(math.pi)
    assert found.stretches.item() == pytest.approx(1.0)


def test_what_cancels_a_frozen_pair_leaves_no_angle_of_rounding() -> None:
    weight, down, up, _ = parts((64, 96), size=1.0)
    pair = torch.cat([down, down]), torch.cat([up, -up], dim=1)
    angle, _ = mean_changes([row_changes(weight, *pair, 1.0, None)])
    assert angle < 1e-6


def test_rows_without_a_direction_do_not_count() -> None:
    weight, down, up, magnitude = parts((6, 10), size=0.1)
    weight[2] = 0
    found = row_changes(weight, down, up, 1.0, magnitude)
    assert len(found.angles) == len(found.stretches) == 5
    kept = torch.arange(6) != 2
    expected = row_changes(weight[kept], down, up[kept], 1.0, magnitude[kept])
    torch.testing.assert_close(found.angles, expected.angles)


def test_means_are_over_rows_and_not_over_layers() -> None:
    one = RowChanges(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 0.0]))
    other = RowChanges(torch.tensor([5.0]), torch.tensor([0.4]))
    assert mean_changes([one, other]) == pytest.approx((2.0, 0.1))
