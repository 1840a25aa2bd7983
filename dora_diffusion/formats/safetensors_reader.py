"""Reading a safetensors file that a stranger made: its header is checked before anything is allocated.

The limits bound what a refused file may cost: the longest header allowed, filled with whatever is worst for a JSON
parser, takes about as long as the largest real one. Every byte is read once, from one handle, into memory; nothing is
mapped, for a mapped file that shrinks while it is read kills the process.
"""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.formats.pickles import LOOKED_AT, is_pickle, refusal
from dora_diffusion.utils.text import UNPRINTABLE, shown, shown_path

# SDXL as a LoKr of every layer has some 10,000, in 2 MB of header
MAX_TENSORS = 16_000
MAX_HEADER_BYTES = 5 * 1024 * 1024
MAX_METADATA = 4096
MAX_DIMENSIONS = 6
MAX_KEY_LENGTH = 256
BLOCK = 1 << 18

# Of safetensors 0.8, in bits; F4 and F6 are packed, and only a base model's headers have them.
ITEM_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32,
    "U32": torch.uint32, "F32": torch.float32, "C64": torch.complex64, "F64": torch.float64, "I64": torch.int64,
    "U64": torch.uint64,
}  # fmt: skip

_LONG_NUMBER = re.compile(rb"\d{20}")


def read_header(path: str | Path) -> dict[str, Any]:
    """The header of a safetensors file, checked: key -> {"dtype", "shape", "data_offsets"}, and `__metadata__`.

    Raises:
        ValueError: one line that names the file and what is wrong with it.
    """
    with Container(path) as file:
        return file.header


@dataclass(frozen=True)
class Contents:
    """All that a safetensors file holds.

    Attributes:
        tensors: key -> tensor, views of one piece of memory.
        metadata: the file's own strings.
        sha256: hex, of the very bytes that were read.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sha256: str


def read_tensors(path: str | Path) -> Contents:
    """All tensors and the metadata of a safetensors file, read once and hashed as they are read.

    Raises:
        ValueError: one line that names the file, and the key when a value is not finite.
    """
    with Container(path) as file:
        return file.contents()


class Container:
    """An open safetensors file whose header is checked: what it holds can be looked at before any tensor is read.

    Attributes:
        header: key -> {"dtype", "shape", "data_offsets"}, and `__metadata__`, in the file's order.

    Raises:
        ValueError: one line that names the file and what is wrong with it.
    """

    def __init__(self, path: str | Path) -> None:
        self._name = shown_path(path)
        self._file, self._status = _opened(path, self._name)
        try:
            self._head, self._data_at, self._data_bytes = bytearray(), 0, 0
            self.header = self._read_header()
        except ValueError:
            is_pickled = is_pickle(str(path), self._first_bytes())
            self._file.close()
            if is_pickled:
                raise ValueError(refusal(self._name)) from None
            raise
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Container":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def keys(self) -> list[str]:
        """The tensors' keys."""
        return [key for key in self.header if key != "__metadata__"]

    @property
    def metadata(self) -> dict[str, str]:
        """The file's own strings; empty where it has none."""
        return dict(self.header.get("__metadata__", {}))

    def contents(self) -> Contents:
        """Every tensor, as views of one piece of memory (each keeps all of it alive), and the hash of the whole file.

        Raises:
            ValueError: one line: a value is NaN or infinite, a packed type, the file changed since it was opened.
        """
        entries = {key: self.header[key] for key in self.keys}
        for key, entry in entries.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{self._name}: {shown(key)} is packed as {entry['dtype']}: expected plain numbers")
        data = self._read(self._data_at, self._data_bytes)
        tensors = {key: _tensor(data, entry) for key, entry in entries.items()}
        if not all(_is_finite(run) for run in _runs(data, entries.values())):
            key = next(key for key, tensor in tensors.items() if not _is_finite(tensor))
            raise ValueError(f"{self._name}: {shown(key)} holds NaN or infinite values")
        digest = hashlib.sha256(self._head)
        digest.update(data)
        return Contents(tensors, self.metadata, digest.hexdigest())

    def _first_bytes(self) -> bytes:
        try:
            self._file.seek(0)
            return self._file.read(LOOKED_AT)
        except OSError:
            return b""

    def _read_header(self) -> dict[str, Any]:
        size = self._status.st_size
        if size < 8:
            raise ValueError(f"{self._name}: not a safetensors file, or cut short ({size} bytes)")
        self._head = self._read(0, 8)
        length = int.from_bytes(self._head, "little")
        if length > size - 8:
            raise ValueError(f"{self._name}: not a safetensors file, or cut short ({size} bytes)")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{self._name}: header of {length} bytes, expected at most {MAX_HEADER_BYTES}")
        self._data_at, self._data_bytes = 8 + length, size - 8 - length
        raw = bytes(self._read(8, length))
        self._head += raw
        try:
            return checked_header(raw, self._data_bytes)
        except ValueError as error:
            raise ValueError(f"{self._name}: {error}") from None

    def _read(self, begin: int, count: int) -> bytearray:
        try:
            data = bytearray(count)
            self._file.seek(begin)
            filled = self._file.readinto(data)
            now = os.fstat(self._file.fileno())
        except (OSError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or "it does not fit into memory"
            raise ValueError(f"{self._name}: cannot be read ({reason})") from None
        before = self._status
        if filled < count or (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise ValueError(f"{self._name}: changed while it was read; try again once it is whole")
        return data


def _opened(path: str | Path, name: str) -> tuple[BufferedReader, os.stat_result]:
    """A handle on a regular file; anything else might block for ever, or act when it is opened."""
    # not to block, should a pipe take the file's place after the first look
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("a folder or a device, expected a file")
        file = os.fdopen(os.open(path, flags), "rb")
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:  # also a zero byte in the name
        raise ValueError(f"{name}: cannot be read ({error})") from None
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        file.close()
        raise ValueError(f"{name}: changed while it was read; try again once it is whole")
    return file, status


def checked_header(raw: bytes, data_bytes: int) -> dict[str, Any]:
    """A header's JSON as `read_header` gives it, for a file with so many bytes of tensors; a ValueError of one line."""
    header = _parsed(raw)
    _check_metadata(header)
    _check_entries({key: entry for key, entry in header.items() if key != "__metadata__"}, data_bytes)
    return header


def _parsed(raw: bytes) -> dict[str, Any]:
    """The header's JSON, counted before it is parsed, and without a key that occurs twice."""
    colons = _checked_counts(raw)
    try:
        text = raw.decode()  # json.loads would guess at UTF-16 if it were given bytes
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header is not the JSON of a safetensors file ({error})") from None
    if not isinstance(header, dict):
        raise ValueError("the header is not the JSON of a safetensors file (expected an object)")
    for key, value in header.items():
        if not isinstance(value, dict):
            raise ValueError(f"{shown(key)}: expected an object, got {shown(type(value).__name__)}")
    # a parser keeps one of two keys that are alike; a hook that sees both would take twice the time
    if colons != len(header) + sum(map(len, header.values())):
        json.loads(text, object_pairs_hook=_without_duplicates)
        raise ValueError("the header holds objects within objects")
    return header


def _checked_counts(raw: bytes) -> int:
    """How many keys JSON has; a ValueError for more parts than a header can have, and for numbers beyond any size.

    A parser may need 60 bytes of memory for one of the file's. What stands in strings does not count: trainers'
    metadata is JSON itself. Up to a parser's first error this splits strings as the parser does.
    """
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    # ten for a tensor: its key, "dtype" and its value, "shape", "data_offsets"
    too_many = plain.count(b'"') > 10 * MAX_TENSORS + 4 * MAX_METADATA + 2
    outside = b"" if too_many else b"".join(plain.split(b'"')[::2])
    lists, commas = outside.count(b"["), outside.count(b",")
    most_commas = (MAX_DIMENSIONS + 3) * MAX_TENSORS + MAX_METADATA
    if too_many or outside.count(b"{") > MAX_TENSORS + 2 or lists > 2 * MAX_TENSORS or commas > most_commas:
        raise ValueError(f"expected a header with at most {MAX_TENSORS} tensors and {MAX_METADATA} metadata strings")
    if _LONG_NUMBER.search(outside):
        raise ValueError("the header has a number of twenty digits or more, expected sizes")
    return outside.count(b":")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{shown(key)} occurs twice")
        found[key] = value
    return found


def _check_metadata(header: Mapping[str, Any]) -> None:
    metadata = header.get("__metadata__", {})
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("expected metadata of strings")
    if len(metadata) > MAX_METADATA:
        raise ValueError(f"{len(metadata)} metadata strings, expected at most {MAX_METADATA}")
    _check_keys(metadata)
    for key, value in metadata.items():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"metadata {shown(key)} has half a character, expected Unicode") from None


def _check_keys(keys: Collection[str]) -> None:
    if not UNPRINTABLE.search("".join(keys)) and max(map(len, keys), default=0) <= MAX_KEY_LENGTH:
        return
    for key in keys:
        if len(key) > MAX_KEY_LENGTH or UNPRINTABLE.search(key):
            raise ValueError(
                f"key {shown(key)} of {len(key)} characters: expected at most {MAX_KEY_LENGTH}, all printable"
            )


def _check_entries(entries: Mapping[str, Any], data_bytes: int) -> None:
    """Every tensor fills its span, and the spans fill the file, without overlap or hole."""
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"{len(entries)} tensors, expected at most {MAX_TENSORS}")
    _check_keys(entries)
    spans = sorted(_span(key, entry) for key, entry in entries.items())
    position = 0
    for begin, end in spans:
        if begin != position:
            raise ValueError(f"tensors overlap or leave a hole at byte {shown(begin)}")
        position = end
    if position != data_bytes:
        raise ValueError(f"tensors end at byte {shown(position)} of {data_bytes}; the file is cut short or too long")


def _span(key: str, entry: Any) -> tuple[int, int]:
    """Where a tensor begins and ends; a ValueError when its dtype and shape do not say the same."""
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except KeyError as error:
        raise ValueError(f"{shown(key)}: {error} is missing") from None
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise ValueError(f"{shown(key)}: dtype {shown(dtype, 40)} is unknown")
    if not _are_sizes(shape, offsets) or len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
        raise ValueError(f"{shown(key)}: shape {shown(shape)} or offsets {shown(offsets)}: expected whole numbers")
    begin, end = offsets
    # beside a side of 0 the others may be anything, and their product still has to be one that torch can count
    count = math.prod(shape)
    if count * ITEM_BITS[dtype] != 8 * (end - begin) or (not count and math.prod(filter(None, shape)) >= 1 << 63):
        raise ValueError(f"{shown(key)}: shape {shown(shape)} of {dtype} does not fill its {shown(end - begin)} bytes")
    return begin, end


def _are_sizes(shape: Any, offsets: Any) -> bool:
    if not (isinstance(shape, list) and isinstance(offsets, list) and offsets):
        return False
    numbers = shape + offsets
    # True is an int to Python
    return set(map(type, numbers)) == {int} and min(numbers) >= 0 and max(numbers) < 1 << 63


def _tensor(data: bytearray, entry: Mapping[str, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    dtype = DTYPES[entry["dtype"]]
    if begin == end:
        return torch.empty(entry["shape"], dtype=dtype)
    return _view(data, begin, end, dtype).reshape(entry["shape"])


def _view(data: bytearray, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers: the same memory, or a copy where they do not lie on a multiple of their size."""
    if begin % dtype.itemsize:
        data, begin, end = data[begin:end], 0, end - begin
    return torch.frombuffer(data, dtype=dtype, offset=begin, count=(end - begin) // dtype.itemsize)


def _runs(data: bytearray, entries: Iterable[Mapping[str, Any]]) -> Iterator[Tensor]:
    """The file's numbers in as few pieces as there are changes of dtype: thousands of small tensors take one look."""
    spans = sorted((*entry["data_offsets"], entry["dtype"]) for entry in entries)
    for dtype, run in groupby((span for span in spans if span[0] < span[1]), key=itemgetter(2)):
        pieces = list(run)
        yield _view(data, pieces[0][0], pieces[-1][1], DTYPES[dtype])


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point():
        return True
    for block in torch.split(tensor.reshape(-1), BLOCK):
        # the extremes are NaN if any value is; types of one byte have none of torch's reductions
        extremes = torch.aminmax(block.float() if block.itemsize == 1 else block)
        if not (math.isfinite(extremes.min) and math.isfinite(extremes.max)):
            return False
    return True
