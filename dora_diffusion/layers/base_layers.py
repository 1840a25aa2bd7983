"""The base layers an adapter can stand beside: what their weight is, and how each applies a low-rank pair.

Every kind is seen as one matrix W (out, in[, kernel]). An embedding's is its table transposed, so that one output is
one dimension of the embedding, as PEFT has it; so is the weight of transformers' Conv1D (GPT-2), a linear layer kept as
(in, out). A grouped convolution shares A among its groups, as LyCORIS has it.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dora_diffusion.layers.offloaded import at_hand, value_of
from dora_diffusion.layers.quantisation import dequantise, is_quantised, refuse_unknown
from dora_diffusion.state import ModuleState

Base = Any  # an nn.Linear, nn.Conv1d/2d/3d, nn.Embedding, or a quantised linear of another library
Drop = Callable[[Tensor], Tensor]
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Kind:
    """How one kind of layer applies a low-rank pair.

    Attributes:
        shrink: (base, x, A, dropout) -> A x.
        expand: (base, h, B, bias) -> B h + bias, in the layout of the base's output.
        per_output: one number per output channel -> a shape that broadcasts over the base's output.
        per_input: one number per column of W -> a shape that broadcasts over x; None where x holds no channels.
    """

    shrink: Callable[[Base, Tensor, Tensor, Drop], Tensor]
    expand: Callable[[Base, Tensor, Tensor, Tensor | None], Tensor]
    per_output: Callable[[Base, Tensor], Tensor]
    per_input: Callable[[Base, Tensor], Tensor] | None


def _as_it_is(base: Base, values: Tensor) -> Tensor:
    return values


LINEAR = Kind(
    shrink=lambda base, x, down, drop: F.linear(drop(x), down),
    expand=lambda base, h, up, bias: F.linear(h, up, bias),
    per_output=_as_it_is,
    per_input=_as_it_is,
)


def _embed(base: Base, ids: Tensor, down: Tensor, drop: Drop) -> Tensor:
    return drop(F.embedding(ids, down.T, base.padding_idx))


EMBEDDING = Kind(
    shrink=_embed,
    expand=lambda base, h, up, bias: F.linear(h, up, bias),
    per_output=_as_it_is,
    per_input=None,
)


def _convolve_down(base: Base, x: Tensor, down: Tensor, drop: Drop) -> Tensor:
    """The base's own stride, padding, padding mode and dilation; every group sees the same A."""
    tiled = down.repeat(base.groups, *[1] * (down.dim() - 1)) if base.groups > 1 else down
    h: Tensor = base._conv_forward(drop(x), tiled, None)
    return h


def _convolve_up(base: Base, h: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    return _CONVOLVE[up.dim() - 2](h, up, bias, groups=base.groups)


def _over_space(base: Base, values: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (base.weight.dim() - 2))


CONVOLUTION = Kind(
    shrink=_convolve_down,
    expand=_convolve_up,
    per_output=_over_space,
    per_input=lambda base, values: _over_space(base, values.repeat(base.groups)),
)


def kind_of(base: Base) -> Kind:
    """The kind of a layer that `check_adaptable` has let through."""
    if isinstance(base, nn.Embedding):
        return EMBEDDING
    return CONVOLUTION if isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d) else LINEAR


def is_transposed(base: Base) -> bool:
    """Whether a layer keeps its weight as (in, out)."""
    return isinstance(base, nn.Embedding) or _is_gpt2_linear(base)


def _is_gpt2_linear(base: Base) -> bool:
    """transformers' Conv1D, known by its name: the library is not imported for it."""
    kinds = type(base).__mro__
    return any(kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" for kind in kinds)


def dense_weight(base: Base) -> Tensor:
    """W (out, in[, kernel]), detached: a view of the layer's weight, a copy of one kept elsewhere, or dequantised."""
    with at_hand(base) if is_quantised(base) else nullcontext():
        dense = dequantise(base)
    if dense is not None:
        return dense.detach()
    weight = value_of(base, "weight").detach()
    return weight.T if is_transposed(base) else weight


def stored_as(base: Base, weight: Tensor) -> Tensor:
    """W (out, in[, kernel]) as this layer keeps it."""
    return weight.T.contiguous() if is_transposed(base) else weight


def logical_shape(base: Base) -> tuple[int, ...]:
    """(out, in[, kernel]), without dequantising."""
    if is_transposed(base):
        columns, rows = base.weight.shape
        return rows, columns
    if kind_of(base) is LINEAR:
        return base.out_features, base.in_features
    return tuple(base.weight.shape)


def check_adaptable(path: str, module: nn.Module) -> Base:
    """The module, if it can carry an adapter; else a ValueError of one line that names it."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise ValueError(
            f"{path}: nn.MultiheadAttention reads this weight past the layer, an adapter here would do nothing; "
            "leave it out of target_modules"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise ValueError(f"{path}: an embedding with max_norm rescales its own weight and cannot be adapted")
    if is_quantised(module):
        return module
    if is_peft_layer(module):
        raise ValueError(f"{path}: an adapter of PEFT's stands there: call unload_lora_weights() first")
    refuse_unknown(path, module)
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding) or _is_gpt2_linear(module):
        return module
    raise ValueError(
        f"{path}: expected nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d or nn.Embedding, got {type(module).__name__}"
    )


def is_peft_layer(module: nn.Module) -> bool:
    """Whether a module is a layer that PEFT (diffusers' load_lora_weights) has put into a model."""
    return hasattr(module, "base_layer") and type(module).__module__.startswith("peft.")


def check_shapes(path: str, state: ModuleState, base: Base) -> None:
    """Raise a ValueError of one line when an adapter's tensors do not fit a layer."""
    out, *rest = logical_shape(base)
    flat = math.prod(rest)
    fits = list(state.down.shape[1:]) in (rest, [flat]) and state.up.flatten(1).shape == (out, state.rank)
    if not fits:
        got = f"A {tuple(state.down.shape)}, B {tuple(state.up.shape)}"
        raise ValueError(f"{path}: {got} do not fit a weight of {(out, *rest)}; is this another base model?")
    if state.axis == "in" and isinstance(base, nn.Embedding):
        raise ValueError(f"{path}: an embedding takes token ids, so magnitudes of the in axis cannot scale its input")
    expected = rest[0] if state.axis == "in" else out
    if state.magnitude is not None and state.magnitude.shape != (expected,):
        raise ValueError(f"{path}: magnitude has shape {tuple(state.magnitude.shape)}, expected ({expected},)")


def branch_dtype(x: Tensor, base: Tensor) -> torch.dtype:
    """What the low-rank branch computes in: the input's dtype, or the base's output's where the input is token ids."""
    return x.dtype if x.is_floating_point() else base.dtype
