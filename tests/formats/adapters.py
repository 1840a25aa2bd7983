"""Adapters for tests of formats: random ones on the layers of a pipeline, of every kind that files know."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_diffusion.functional.dora import dora_weight, squared_row_norms
from dora_diffusion.state import AdapterState, FactoredState, Module, ModuleState

Make = Callable[[Tensor, torch.Generator], Module]


def place(folder: Path, format: str, stem: str = "a") -> Path:
    """Where a format may be written: PEFT's is a folder, all others a file."""
    return folder / (stem if format == "peft" else f"{stem}.safetensors")


def _random(*shape: int, generator: torch.Generator) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=generator)


def lora(weight: Tensor, generator: torch.Generator, *, rank: int = 2, alpha: float = 3.0) -> ModuleState:
    """A plain pair, alpha other than the rank."""
    out, inputs, *kernel = weight.shape
    down = _random(rank, inputs, *kernel, generator=generator)
    return ModuleState(down, _random(out, rank, *[1] * len(kernel), generator=generator), alpha)


def dora(weight: Tensor, generator: torch.Generator) -> ModuleState:
    """With magnitudes of the out axis."""
    pair = lora(weight, generator)
    stretch = 0.5 + torch.rand(weight.shape[0], generator=generator)
    return ModuleState(pair.down, pair.up, pair.alpha, squared_row_norms(weight).sqrt() * stretch)


def in_dora(weight: Tensor, generator: torch.Generator) -> ModuleState:
    """With magnitudes of the in axis."""
    pair = lora(weight, generator)
    stretch = 0.5 + torch.rand(weight.shape[1], generator=generator)
    norms = squared_row_norms(weight.transpose(0, 1)).sqrt()
    return ModuleState(pair.down, pair.up, pair.alpha, norms * stretch, axis="in")


def tucker(weight: Tensor, generator: torch.Generator) -> ModuleState:
    """A convolution's core between its pair; a plain pair on other layers."""
    out, inputs, *kernel = weight.shape
    if not kernel or max(kernel) == 1:
        return dora(weight, generator)
    down, up = _random(2, inputs, 1, 1, generator=generator), _random(out, 2, 1, 1, generator=generator)
    return ModuleState(down, up, 1.0, mid=_random(2, 2, *kernel, generator=generator))


def loha(weight: Tensor, generator: torch.Generator) -> FactoredState:
    """LoHa of rank 2, alpha 1."""
    out, columns = weight.shape[0], weight[0].numel()
    shapes = {"hada_w1_a": (out, 2), "hada_w1_b": (2, columns), "hada_w2_a": (out, 2), "hada_w2_b": (2, columns)}
    factors = {name: _random(*shape, generator=generator) for name, shape in shapes.items()}
    return FactoredState("loha", factors, 0.5, 1.0)


def full(weight: Tensor, generator: torch.Generator) -> FactoredState:
    """A whole difference."""
    return FactoredState("full", {"diff": _random(*weight.shape, generator=generator)})


KINDS: dict[str, Make] = {
    "LoRA": lora,
    "DoRA": dora,
    "in-axis DoRA": in_dora,
    "Tucker": tucker,
    "LoHa": loha,
    "full": full,
}


def adapter_of(layers: Iterable[tuple[str, Tensor]], make: Make, *, seed: int = 0) -> AdapterState:
    """An adapter on layers: (path with component, weight)."""
    generator = torch.Generator().manual_seed(seed)
    return AdapterState({path: make(weight, generator) for path, weight in layers})


def layers_of(pipe: Any, components: Iterable[str], *, kinds: tuple[type, ...] = (nn.Linear, nn.Conv2d)) -> list:
    """(path with component, without CLIP's `text_model.`; weight) of every layer of these kinds."""
    return [
        (f"{component}.{path.removeprefix('text_model.')}", module.weight.detach())
        for component in components
        for path, module in getattr(pipe, component).named_modules()
        if isinstance(module, kinds) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    ]


def dense(weight: Tensor, module: Module) -> Tensor:
    """W' at strength 1, in fp64: what two of them differ by is in the numbers, not in the order of sums."""
    pair = module.to(dtype=torch.float64).as_pair()
    down = pair.down.reshape(-1, *weight.shape[1:])
    return dora_weight(weight.double(), down, pair.up, pair.scale, pair.magnitude, axis=pair.axis)
