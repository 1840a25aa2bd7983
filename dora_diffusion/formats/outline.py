"""An adapter as the header of its file tells it: every layer, and none of its numbers."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dora_diffusion.formats.reading import AXIS_KEY, Reading, read, told_axis
from dora_diffusion.formats.safetensors_reader import DTYPES
from dora_diffusion.state import AdapterState

Entries = Mapping[str, tuple[str, tuple[int, ...]]]
"""Key -> dtype as safetensors spells it, shape."""


def outline(entries: Entries, metadata: Mapping[str, str], reading: Reading) -> tuple[AdapterState, bool]:
    """The adapter with tensors on the meta device, and whether only a base could tell the axis of its magnitudes."""
    asked: list[str] = []

    def weight_of(path: str) -> Tensor:
        asked.append(path)
        return torch.empty(0, device="meta")

    axis = told_axis(metadata)
    declared = {**metadata, AXIS_KEY: axis or "out"}
    tensors = {key: _blank(dtype, shape) for key, (dtype, shape) in entries.items()}
    adapter = read(tensors, declared, reading, weight_of)
    return replace(adapter, metadata=dict(metadata)), axis is None and bool(asked)


def _blank(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor without content; a single number, which alpha may be, is there and 1."""
    if dtype not in DTYPES:
        raise ValueError(f"tensors are packed as {dtype}, expected plain numbers")
    is_number = math.prod(shape) == 1 and len(shape) < 2
    return torch.ones(shape) if is_number else torch.empty(shape, dtype=DTYPES[dtype], device="meta")
