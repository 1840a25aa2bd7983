"""A safetensors file read and written one tensor at a time: a file of any size passes in its largest tensor's memory.

Bytes are read, not mapped: a mapped file that shrinks while it is read kills the process. A file that changes between
two reads is an error.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dora_diffusion.formats.safetensors_reader import DTYPES, ITEM_BITS, read_header
from dora_diffusion.utils.atomic import atomic_file, header_bytes
from dora_diffusion.utils.text import shown

BLOCK_BYTES = 1 << 24
_STORED_DTYPES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Slot:
    """What a file says of one tensor, or is to say of it.

    Attributes:
        dtype: as safetensors spells it, a key of ITEM_BITS.
        shape: its sides.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """How many bytes it fills."""
        return ITEM_BITS[self.dtype] * math.prod(self.shape) // 8


@dataclass(frozen=True)
class _Version:
    """Which file this is, and how it was when its header was read."""

    device: int
    inode: int
    size: int
    changed_ns: int


def _version(stat: os.stat_result) -> _Version:
    return _Version(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


class TensorFile:
    """A safetensors file whose header has been read and checked. It holds no open handle."""

    def __init__(self, path: str | Path) -> None:
        """A ValueError of one line when the file is no sound safetensors file."""
        self.path = Path(path)
        self._version = _version(_stat(self.path))
        header = read_header(self.path)
        self.metadata: dict[str, str] = dict(header.pop("__metadata__", {}))
        by_place = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        self.slots = {key: Slot(entry["dtype"], tuple(entry["shape"])) for key, entry in by_place}
        """Key -> dtype and shape, in the order of their bytes."""
        self._offsets = {key: int(entry["data_offsets"][0]) for key, entry in by_place}
        self._start = self._version.size - sum(slot.bytes for slot in self.slots.values())

    def __contains__(self, key: str) -> bool:
        return key in self.slots

    def read(self, key: str) -> Tensor:
        """One tensor in its stored dtype and shape, on the CPU, in memory of its own.

        Raises:
            ValueError: there is none of that key, it is of a packed type, or the file cannot be read or has changed.
        """
        slot = self._known(key)
        if slot.dtype not in DTYPES:
            raise ValueError(f"{self.path}: {shown(key)} is packed as {slot.dtype}: expected plain numbers")
        raw = torch.empty(slot.bytes, dtype=torch.uint8)
        view, position = raw.numpy().data, 0
        for block in self.blocks(key):
            view[position : position + len(block)] = block
            position += len(block)
        return raw.view(DTYPES[slot.dtype]).reshape(slot.shape)

    def blocks(self, key: str) -> Iterator[bytes]:
        """The bytes of one tensor, in order, at most BLOCK_BYTES at a time; errors as of `read`."""
        left = self._known(key).bytes
        try:
            with open(self.path, "rb") as file:
                self._check_unchanged(file)
                file.seek(self._start + self._offsets[key])
                while left:
                    block = file.read(min(left, BLOCK_BYTES))
                    if not block:
                        raise ValueError(
                            f"{self.path}: {shown(key)} is cut short: the file changed while it was being read"
                        )
                    left -= len(block)
                    yield block
                self._check_unchanged(file)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read ({error.strerror or error})") from None

    def _known(self, key: str) -> Slot:
        if key not in self.slots:
            raise ValueError(f"{self.path}: no tensor {key!r} among its {len(self.slots)}")
        return self.slots[key]

    def _check_unchanged(self, file: BinaryIO) -> None:
        if _version(os.fstat(file.fileno())) != self._version:
            raise ValueError(
                f"{self.path}: the file changed while it was being read; let its writer finish, then retry"
            )


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None


def write_tensor_file(
    path: Path,
    slots: Mapping[str, Slot],
    tensors: Iterable[tuple[str, Tensor | Iterable[bytes]]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file tensor by tensor, atomically: `path` is the old file or the new, never half.

    Args:
        path: where it goes.
        slots: key -> dtype and shape of all tensors, in the order in which their bytes will lie.
        tensors: (key, tensor or its bytes in blocks), in that same order.
        metadata: strings for the header.

    Raises:
        ValueError: what comes is not what `slots` announced; no file is left then.
    """
    expected = iter(slots.items())
    with atomic_file(path) as file:
        file.write(_header(slots, metadata or {}))
        for key, data in tensors:
            planned, slot = next(expected, (None, None))
            if key != planned or slot is None:
                raise ValueError(f"{path}: tensor {key!r} came where {planned!r} was expected")
            _write(file, f"{path}: {key}", slot, data)
        if (missing := next(expected, None)) is not None:
            raise ValueError(f"{path}: tensor {missing[0]!r} never came")


def _header(slots: Mapping[str, Slot], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for key, slot in slots.items():
        end = position + slot.bytes
        header[key] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [position, end]}
        position = end
    return header_bytes(header)


def _write(file: BinaryIO, label: str, slot: Slot, data: Tensor | Iterable[bytes]) -> None:
    if isinstance(data, Tensor):
        if (_STORED_DTYPES.get(data.dtype), tuple(data.shape)) != (slot.dtype, slot.shape):
            raise ValueError(f"{label} is {data.dtype} {tuple(data.shape)}, expected {slot.dtype} {slot.shape}")
        file.write(data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return
    written = sum(file.write(block) for block in data)
    if written != slot.bytes:
        raise ValueError(f"{label} came with {written} bytes, expected {slot.bytes}")
