"""Quantised linear layers: which there are, and what dense weight each stands for.

An adapter beside such a layer needs its weight for the norm only, once an optimiser step; the layer itself goes on
drawing from its quantised numbers. None of the libraries is imported here: a layer of theirs has brought it along.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from dora_diffusion.layers.offloaded import is_spread


@dataclass(frozen=True)
class Quantisation:
    """One kind of quantised layer.

    Attributes:
        name: for people.
        recognises: whether a module is of this kind.
        dequantise: its dense weight (out, in), floating point.
    """

    name: str
    recognises: Callable[[Any], bool]
    dequantise: Callable[[Any], Tensor]


def _is_class(module: nn.Module, name: str) -> bool:
    return any(kind.__name__ == name and kind.__module__.startswith("bitsandbytes.") for kind in type(module).__mro__)


def _is_4bit(module: Any) -> bool:
    return _is_class(module, "Linear4bit") and getattr(module.weight, "quant_state", None) is not None


def _from_4bit(module: Any) -> Tensor:
    """On some CPUs the library packs a weight anew at its first forward without gradients, in an order of its own."""
    library: Any = import_module("bitsandbytes.functional")
    weight, state = module.weight.data, module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        state, scales = copy.copy(state), state.absmax
        state.original_nested = False  # or the scales would be rounded once more: those of the packed weight are taken
        weight, state = library._convert_weight_packed_for_cpu_inverse(weight, state)
        state.absmax = scales.T.reshape(-1).float()
    dense: Tensor = library.dequantize_4bit(weight, state)
    return dense


def _is_8bit(module: Any) -> bool:
    return _is_class(module, "Linear8bitLt") and module.weight.dtype == torch.int8


def _from_8bit(module: Any) -> Tensor:
    """W = CB * SCB / 127 by rows; the first forward moves both from the weight to the layer's state."""
    scales: Tensor = module.weight.SCB if getattr(module.weight, "SCB", None) is not None else module.state.SCB
    dense: Tensor = module.weight.data.to(torch.float32) * (scales.to(torch.float32) / 127)[:, None]
    return dense


def _is_tensor_subclass(module: Any) -> bool:
    """torchao keeps nn.Linear and puts a tensor of its own class in, which says it is bf16 and can dequantise."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not isinstance(weight, Tensor):
        return False
    return type(weight.data).__module__.startswith("torchao.") and callable(getattr(weight, "dequantize", None))


def _from_tensor_subclass(module: Any) -> Tensor:
    dense: Tensor = module.weight.dequantize()
    return dense


def _is_gguf(module: Any) -> bool:
    return any(
        kind.__name__ == "GGUFLinear" and kind.__module__.startswith("diffusers.") for kind in type(module).__mro__
    )


def _from_gguf(module: Any) -> Tensor:
    dense: Tensor = import_module("diffusers.quantizers.gguf.utils").dequantize_gguf_tensor(module.weight)
    return dense


QUANTISATIONS: tuple[Quantisation, ...] = (
    Quantisation("bitsandbytes 4-bit", _is_4bit, _from_4bit),
    Quantisation("bitsandbytes 8-bit", _is_8bit, _from_8bit),
    Quantisation("torchao", _is_tensor_subclass, _from_tensor_subclass),
    Quantisation("GGUF", _is_gguf, _from_gguf),
)


def _kind(module: nn.Module) -> Quantisation | None:
    return next((kind for kind in QUANTISATIONS if kind.recognises(module)), None)


def is_quantised(module: nn.Module) -> bool:
    """Whether the layer's weight is quantised in a way that is known here."""
    return _kind(module) is not None


def dequantise(module: nn.Module) -> Tensor | None:
    """The dense weight (out, in) of a quantised linear layer, made anew; None when the layer is not quantised."""
    kind = _kind(module)
    return None if kind is None else kind.dequantise(module)


def stays_put(model: nn.Module) -> bool:
    """Whether a model has layers that do not move to main memory and back: bitsandbytes' 8-bit ones, and those that
    several processes keep together."""
    return any(map(_is_8bit, model.modules())) or any(map(is_spread, model.parameters()))


def refuse_unknown(path: str, module: nn.Module) -> None:
    """Raise a ValueError of one line for a weight that is quantised in a way nobody here can read."""
    weight = getattr(module, "weight", None)
    for name in ("qweight", "qzeros"):  # GPTQ, AWQ
        if isinstance(getattr(module, name, None), Tensor):
            weight = getattr(module, name)
    if not isinstance(weight, Tensor):
        return
    is_plain = (type(weight.data) is Tensor or is_spread(weight)) and weight.is_floating_point()
    if not is_plain:
        known = ", ".join(kind.name for kind in QUANTISATIONS)
        raise ValueError(
            f"{path}: a weight quantised to {weight.dtype} ({type(module).__name__}) cannot be read here; "
            f"expected {known} on its device, or load the model in bf16"
        )
