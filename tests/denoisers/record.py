"""What a tiny denoiser is, for tests: how it is made, and what its forward is called with."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TinyDenoiser:
    """Makers of a model with random weights, the same at every call, and of keywords for its forward."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]

    def make(self) -> nn.Module:
        """fp32, eval mode; nothing in it is zero, so that every layer has a say in the prediction."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build().eval().requires_grad_(False)
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.2)
        return model


def of_json(name: str, stored: Mapping[str, Any]) -> TinyDenoiser:
    """A class of diffusers by its config, and its inputs by their shapes."""
    return TinyDenoiser(
        lambda: getattr(diffusers, name)(**stored["config"]),
        lambda: {key: _input(value, seed) for seed, (key, value) in enumerate(stored["inputs"].items())},
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _input(stored: Mapping[str, Any], seed: int) -> Any:
    """One argument: random numbers of a shape, a tensor of one value, numbers as they are, or several of these."""
    if "normal" in stored:
        return normal(*stored["normal"], seed=seed)
    if "full" in stored:
        return torch.full(stored["full"], stored["of"], dtype=getattr(torch, stored["dtype"]))
    if "tensor" in stored:
        return torch.tensor(stored["tensor"], dtype=getattr(torch, stored["dtype"]))
    if "list" in stored:
        return [_input(each, seed) for each in stored["list"]]
    if "map" in stored:
        return {key: _input(each, seed) for key, each in stored["map"].items()}
    return stored["value"]


def prediction(output: Any) -> Tensor:
    """Every floating-point tensor of what a forward returns, in one row."""
    return torch.cat([tensor.flatten() for tensor in _tensors(output)])


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif is_dataclass(output) and not isinstance(output, type):
        for field in fields(output):
            yield from _tensors(getattr(output, field.name))
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for each in output:
            yield from _tensors(each)
