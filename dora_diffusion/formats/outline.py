"""An adapter as the header of its file tells it: every layer, and none of its numbers."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.formats.dialects import COMPONENTS
from dora_diffusion.formats.peft import WEIGHTS
from dora_diffusion.formats.reading import OVER_BASE_KEY, Reading, as_stored, read, told_axis
from dora_diffusion.formats.safetensors_reader import DTYPES, read_header
from dora_diffusion.state import AdapterState

Entries = Mapping[str, tuple[str, tuple[int, ...]]]
"""Key -> dtype as safetensors spells it, shape."""


def folder_entries(path: Path) -> tuple[Entries, dict[str, str]]:
    """Those of a folder of PEFT's, each key behind its component where its folder is called by it."""
    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    metadata: dict[str, str] = {}
    for file in sorted(path.rglob(WEIGHTS)):
        found, declared = file_entries(read_header(file))
        component = f"{file.parent.name}." if file.parent.name in COMPONENTS else ""
        bare = {key.removeprefix("base_model.model."): entry for key, entry in found.items()}
        entries.update({f"{component}{key}": entry for key, entry in bare.items()})
        metadata.update(declared)
    return entries, metadata


def file_entries(header: Mapping[str, Any]) -> tuple[Entries, dict[str, str]]:
    """A header's tensors and metadata."""
    tensors = {key: entry for key, entry in header.items() if key != "__metadata__"}
    found = {key: (str(entry["dtype"]), tuple(entry["shape"])) for key, entry in tensors.items()}
    return found, dict(header.get("__metadata__", {}))


def outline(entries: Entries, metadata: Mapping[str, str], reading: Reading) -> tuple[AdapterState, bool]:
    """The adapter with tensors on the meta device, and whether only a base could tell the axis of its magnitudes."""
    asked: list[str] = []

    def weight_of(path: str) -> Tensor:
        asked.append(path)
        return as_stored(path)

    axis = told_axis(metadata)
    declared = {key: text for key, text in metadata.items() if key != OVER_BASE_KEY}
    tensors = {key: _blank(dtype, shape) for key, (dtype, shape) in entries.items()}
    adapter = read(tensors, declared, reading, weight_of)
    return replace(adapter, metadata=dict(metadata)), axis is None and bool(asked)


def _blank(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor without content; a single number, which alpha may be, is there and 1."""
    if dtype not in DTYPES:
        raise ValueError(f"tensors are packed as {dtype}, expected plain numbers")
    is_number = math.prod(shape) == 1 and len(shape) < 2
    return torch.ones(shape) if is_number else torch.empty(shape, dtype=DTYPES[dtype], device="meta")
