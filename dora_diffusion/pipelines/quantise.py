"""Quantise a loaded model's linear layers: nf4 by bitsandbytes, int8 and fp8 by torchao.

What no preset adapts (embedders, the last projection) and what is no linear layer stays as it is: it is little, and
holds much of the quality. Adapters beside quantised layers: `layers.quantisation`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from dora_diffusion.families import component_of_model, ends_with, family_of_pipeline


@dataclass(frozen=True)
class Scheme:
    """A way to quantise.

    Attributes:
        library: that does it, as it is installed.
        bits: of memory for each number of a weight, scales included.
        convert: (model, paths of its linear layers) -> None; what it makes may be quantised when it is moved.
    """

    library: str
    bits: float
    convert: Callable[[nn.Module, Sequence[str]], None]


def _to_nf4(model: nn.Module, paths: Sequence[str]) -> None:
    kinds: Any = import_module("bitsandbytes.nn")
    for path in paths:
        linear: Any = model.get_submodule(path)
        width = linear.in_features, linear.out_features
        layer = kinds.Linear4bit(*width, bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4", device="meta")
        layer.weight = kinds.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
        layer.bias = linear.bias
        layer.train(linear.training)
        model.set_submodule(path, layer)


def _by_torchao(config: str) -> Callable[[nn.Module, Sequence[str]], None]:
    def convert(model: nn.Module, paths: Sequence[str]) -> None:
        library: Any = import_module("torchao.quantization")
        chosen = frozenset(paths)
        library.quantize_(model, getattr(library, config)(), filter_fn=lambda _, path: path in chosen)

    return convert


SCHEMES: dict[str, Scheme] = {
    # a scale of 8 bits for 64 numbers, and of 32 for 256 of those; the others have one for each row
    "nf4": Scheme("bitsandbytes", 4 + 8 / 64 + 32 / (64 * 256), _to_nf4),
    "int8": Scheme("torchao", 8.0, _by_torchao("Int8WeightOnlyConfig")),
    "fp8": Scheme("torchao", 8.0, _by_torchao("Float8WeightOnlyConfig")),
}


def check_library(quantise: str | Mapping[str, str] | None, *, key: str = "quantise") -> None:
    """Refuse a scheme that is unknown, or whose library is missing, before anything is loaded.

    Raises:
        ValueError: one line that names the key, and what to install.
    """
    for name in [quantise] if isinstance(quantise, str) else (quantise or {}).values():
        if name not in SCHEMES:
            raise ValueError(f"{key}: got {name!r}, expected {', '.join(SCHEMES)} or null")
        library = SCHEMES[name].library
        if find_spec(library) is None:
            raise ValueError(f"{key}: {name} needs {library}, which is not installed; pip install {library}")


def quantised_parts(pipe: Any, quantise: str | Mapping[str, str], *, key: str = "quantise") -> dict[str, str]:
    """Component -> scheme; a scheme alone is the denoiser's.

    Raises:
        ValueError: the pipeline has no such component.
    """
    if isinstance(quantise, str):
        return {family_of_pipeline(pipe).denoiser.name: quantise}
    known = [name for name, part in pipe.components.items() if isinstance(part, nn.Module)]
    if unknown := [name for name in quantise if name not in known]:
        raise ValueError(f"{key}: got {unknown[0]!r}, expected one of {', '.join(known)}")
    return dict(quantise)


def quantise_pipeline(pipe: Any, quantise: str | Mapping[str, str], *, key: str = "quantise") -> None:
    """Quantise components in place; weights on the CPU are quantised there or as they are moved to a device.

    Args:
        pipe: loaded.
        quantise: a scheme for the denoiser, or component -> scheme.
        key: what errors call it.

    Raises:
        ValueError: a component is not there, or has no linear layer that is not quantised yet.
    """
    check_library(quantise, key=key)
    for name, scheme in quantised_parts(pipe, quantise, key=key).items():
        model = getattr(pipe, name)
        paths = linear_paths(model)
        if not paths:
            raise ValueError(f"{key}: {name} has no linear layers in full precision; it may be quantised already")
        SCHEMES[scheme].convert(model, paths)


def linear_paths(model: nn.Module) -> list[str]:
    """The linear layers of a model that are worth quantising."""
    component = component_of_model(model)
    left = () if component is None else component.outside
    return [
        path
        for path, module in model.named_modules()
        if type(module) is nn.Linear and not any(ends_with(path, end) for end in left)
    ]


def quantised_bytes(model: nn.Module, scheme: str) -> tuple[int, int]:
    """What quantising saves of a model's weights, and the largest layer's dense weight, in bytes."""
    weights = [model.get_parameter(f"{path}.weight") for path in linear_paths(model)]
    dense = [weight.numel() * weight.element_size() for weight in weights]
    kept = sum(weight.numel() for weight in weights) * SCHEMES[scheme].bits / 8
    return round(sum(dense) - kept), max(dense, default=0)
