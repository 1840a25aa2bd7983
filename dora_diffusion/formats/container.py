"""Reading a safetensors file that a stranger made: the header is checked before anything is allocated.

The file is read into memory, not mapped: a mapped file that shrinks while it is read kills the process.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

MAX_HEADER_BYTES = 32 * 1024 * 1024
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def read_header(path: str | Path) -> dict[str, Any]:
    """The header of a safetensors file, checked: key -> {"dtype", "shape", "data_offsets"}, and `__metadata__`.

    Raises:
        ValueError: one line that names the file and what is wrong with it.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8:
                raise ValueError(f"{path}: not a safetensors file, or cut short ({size} bytes)")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"{path}: header of {length} bytes, expected at most {MAX_HEADER_BYTES}")
            raw = file.read(length)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    header = _parse(path, raw)
    _check_layout(path, header, size - 8 - length)
    return header


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key occurs twice")
        return found

    try:
        header = json.loads(raw, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the header is not the JSON of a safetensors file ({error})") from None
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise ValueError(f"{path}: expected a header with at most {MAX_TENSORS} tensors")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: expected metadata of strings")
    return header


def _check_layout(path: Path, header: dict[str, Any], data_bytes: int) -> None:
    spans = []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        try:
            begin, end = entry["data_offsets"]
            numbers = (*entry["shape"], begin, end)
            whole = len(numbers) <= MAX_DIMENSIONS + 2 and all(type(side) is int and side >= 0 for side in numbers)
            expected = ITEM_BYTES[entry["dtype"]] * math.prod(entry["shape"]) if whole else 0
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise ValueError(f"{path}: {key}: dtype, shape or offsets are missing or unknown")
        if end - begin != expected:
            raise ValueError(f"{path}: {key}: shape {entry['shape']} does not fill its {end - begin} bytes")
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ValueError(f"{path}: tensors overlap or leave a hole at byte {begin}")
        position = end
    if position != data_bytes:
        raise ValueError(f"{path}: tensors end at byte {position} of {data_bytes}; the file is cut short or too long")


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file.

    Raises:
        ValueError: one line that names the file, and the key when a value is not finite.
    """
    header = read_header(path)
    try:
        tensors = load_tensors(Path(path).read_bytes())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: {key} holds NaN or infinite values")
    return tensors, dict(header.get("__metadata__", {}))
