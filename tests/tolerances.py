"""How close is close enough: one table for all tests, and the two ways to compare tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


@dataclass(frozen=True)
class Tolerance:
    """|actual - expected| <= absolute + relative * |expected|, element by element."""

    relative: float
    absolute: float


# The same mathematics in another order of operations, computed in this dtype.
TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(relative=1e-9, absolute=1e-11),
    torch.float32: Tolerance(relative=1e-5, absolute=1e-5),
    torch.float16: Tolerance(relative=2e-3, absolute=2e-3),
    torch.bfloat16: Tolerance(relative=1.6e-2, absolute=1.6e-2),
}


def assert_close(actual: Tensors, expected: Tensors, *, computed_in: torch.dtype = torch.float32) -> None:
    """Shapes, dtypes and every element agree, within the table's tolerance; NaN is never close to anything.

    Args:
        actual: a tensor, or a sequence or mapping of tensors.
        expected: the same structure.
        computed_in: the coarsest dtype on the way, which may differ from the tensors' own.
    """
    tolerance = TOLERANCES[computed_in]
    torch.testing.assert_close(actual, expected, rtol=tolerance.relative, atol=tolerance.absolute)


def assert_near(actual: Tensor, expected: Tensor, relative: float) -> None:
    """Shapes and dtypes agree, and no element is further off than `relative` times the largest expected; NaN is far."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error <= relative, f"relative error {error:.2e}, expected at most {relative:.2e}"


def assert_identical(actual: Tensors, expected: Tensors) -> None:
    """Shapes, dtypes and every bit agree: 0.0 differs from -0.0, and a NaN equals itself."""
    torch.testing.assert_close(_bytes(actual), _bytes(expected), rtol=0, atol=0)


def _bytes(tensors: Tensors) -> dict[str, Tensor]:
    """Raw bytes under keys that spell name, dtype and shape, so that a difference in those shows in the message."""
    if isinstance(tensors, Tensor):
        tensors = [tensors]
    named = tensors if isinstance(tensors, Mapping) else {str(index): tensor for index, tensor in enumerate(tensors)}
    return {
        f"{name} {tensor.dtype} {tuple(tensor.shape)}": tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        for name, tensor in named.items()
    }
