"""One layer's module and its base weight: what the one changes of the other, and modules from pairs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dora_diffusion.functional.dora import Axis, gain_form, master_dtype, rows
from dora_diffusion.functional.lycoris import Pair
from dora_diffusion.pipelines.base_weights import WeightOf
from dora_diffusion.state import Module, ModuleState


def weight_for(module: Module, weights: WeightOf, path: str) -> Tensor:
    """W of a layer, fp32 (fp64 stays fp64); a ValueError when the module is for another shape."""
    weight = weights(path)
    if tuple(rows(weight).shape) != module.shape:
        got, expected = tuple(weight.shape), module.shape
        raise ValueError(f"{path}: the adapter is for a weight of {expected}, the base has {got}; is it another model?")
    return weight.to(master_dtype(weight.dtype))


@torch.no_grad()
def change_of(module: Module, weight: Tensor) -> Tensor:
    """W' - W of a module, in the shape and dtype of W: D, or (g - 1) W + g D, which keeps the digits of small gains."""
    module = module.to(dtype=weight.dtype)
    if module.magnitude is None:
        return module.delta().reshape(weight.shape)
    pair = module.as_pair()
    form = gain_form(weight, pair.down, pair.up, pair.scale, module.magnitude, axis=module.axis)
    change = torch.addmm(form.gain_offset[:, None] * rows(weight), form.left, form.right)
    if form.in_offset is not None:
        change += rows(weight) * form.in_offset.repeat_interleave(weight[0, 0].numel())
    return change.reshape(weight.shape)


def error_of(new: Module, old: Tensor, weight: Tensor) -> float:
    """||W'_new - W'_old|| / ||W'_old - W||, from W'_old - W."""
    return relative(change_of(new, weight), old)


def relative(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; 0 where both are 0."""
    missed = float(torch.linalg.vector_norm(rows(actual) - rows(expected)))
    size = float(torch.linalg.vector_norm(expected))
    return missed / size if size > 0 else (math.inf if missed > 0 else 0.0)


def module_of(
    pair: Pair, shape: Sequence[int], dtype: torch.dtype, magnitude: Tensor | None = None, *, axis: Axis = "out"
) -> ModuleState:
    """A pair as a module for a weight (out, in[, kh, kw]), at scale 1; the magnitude keeps its own dtype."""
    rank, kernel = pair.right.shape[0], len(shape) - 2
    down = pair.right.reshape(rank, *shape[1:]).to(dtype)
    up = pair.left.reshape(shape[0], rank, *[1] * kernel).to(dtype)
    return ModuleState(down.contiguous(), up.contiguous(), float(rank), magnitude, axis=axis)


def dtype_of(module: Module) -> torch.dtype:
    """What the difference is stored in; magnitudes may be finer."""
    return next(tensor.dtype for name, tensor in module.tensors.items() if name != "magnitude")
