"""Adapters for any pipeline of the tests, and what was trained, as the truth that drawing is compared with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.injection import Injection, inject
from dora_diffusion.pipelines.components import adaptable_models, as_pipeline
from dora_diffusion.state import AdapterState, join


def trained(pipe: Any, seed: int = 0, size: float = 0.3, **changes: Any) -> AdapterState:
    """An adapter of rank 2 for the attention of every model of a pipeline, strong enough to be seen."""
    with in_training(pipe, seed, size, **changes) as adapter:
        return adapter


@contextmanager
def in_training(pipe: Any, seed: int = 0, size: float = 0.3, **changes: Any) -> Iterator[AdapterState]:
    """The same while it is there, as it is trained: `pipe` draws with it."""
    generator = torch.Generator().manual_seed(seed)
    injections: dict[str, Injection] = {}
    for name, model in adaptable_models(as_pipeline(pipe)).items():
        injections[name] = inject(model, DoRAConfig(rank=2, alpha=2, **changes), generator=generator)
        for parameter in injections[name].ups():
            parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))
    try:
        yield join([injection.state().under(name) for name, injection in injections.items()], {})
    finally:
        for injection in injections.values():
            injection.eject()
