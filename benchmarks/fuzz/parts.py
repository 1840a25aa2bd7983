"""A safetensors file taken apart, so that any piece of it can be made wrong."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parts:
    """What a file is made of; `packed` writes it however wrong it is.

    Attributes:
        entries: key -> {"dtype", "shape", "data_offsets"}.
        data: the tensors' bytes.
        metadata: strings, in a sound file.
    """

    entries: dict[str, Any]
    data: bytes
    metadata: dict[str, Any] = field(default_factory=dict)

    def packed(self) -> bytes:
        """The file's bytes."""
        header = {"__metadata__": self.metadata, **self.entries} if self.metadata else self.entries
        return with_length(json.dumps(header, separators=(",", ":")).encode())[0] + self.data

    def piece(self, key: str) -> bytes:
        """The bytes of one tensor."""
        begin, end = self.entries[key]["data_offsets"]
        return self.data[begin:end]


def with_length(header: bytes, length: int | None = None) -> tuple[bytes, int]:
    """(length and header, the length): the true one unless another is given."""
    length = len(header) if length is None else length
    return length.to_bytes(8, "little") + header, length


def taken_apart(raw: bytes) -> Parts:
    """The inverse of `packed`, for sound files."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    return Parts(header, raw[8 + length :], metadata)


def put_together(pieces: Mapping[str, tuple[str, list[int], bytes]], metadata: dict[str, Any]) -> Parts:
    """Parts whose offsets are right, from key -> (dtype, shape, bytes)."""
    entries, position = {}, 0
    for key, (dtype, shape, raw) in pieces.items():
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(raw)]}
        position += len(raw)
    return Parts(entries, b"".join(raw for _, _, raw in pieces.values()), metadata)


_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}


def of_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Parts:
    """Parts of plain tensors."""
    pieces = {}
    for key, tensor in tensors.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        pieces[key] = (_NAMES[tensor.dtype], list(tensor.shape), raw)
    return put_together(pieces, dict(metadata or {}))
