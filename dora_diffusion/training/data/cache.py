"""Tensors that are made once: kept in memory up to a limit, and on disk where a folder is given.

An entry is known by what it was made of, written out in full; another picture, view, caption, model or precision has
another. One on disk says what it was made of and how it hashes: a damaged or a foreign one is made again, never used.
"""

import hashlib
import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from dora_diffusion.utils.atomic import atomic_file, serialised

Tensors = Mapping[str, Tensor]

_MADE_OF, _HASH = "dora_diffusion.made_of", "dora_diffusion.sha256"


def made_of(**facts: object) -> str:
    """What an entry is made of, as one text."""
    return json.dumps(facts, sort_keys=True)


class TensorCache:
    """Entries by what they are made of.

    Args:
        folder: on disk; None = in memory alone.
        limit: bytes in memory; those not used for longest go first.
    """

    def __init__(self, folder: Path | None, limit: float) -> None:
        self._folder, self._limit = folder, limit
        self._kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._bytes = 0

    def __contains__(self, key: str) -> bool:
        return self.find(key) is not None

    def find(self, key: str) -> Tensors | None:
        """An entry, from memory or disk; None when it has to be made."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        found = None if self._folder is None else read_entry(_place(self._folder, key), key)
        if found is not None:
            self._keep(key, found)
        return found

    def add(self, key: str, tensors: Tensors) -> Tensors:
        """Keep what was made, on the CPU, and give it back."""
        kept = {name: tensor.detach().to("cpu") for name, tensor in tensors.items()}
        self._keep(key, kept)
        if self._folder is not None:
            try:
                write_entry(_place(self._folder, key), key, kept)
            except OSError as error:  # what cannot be kept is made again
                print(f"{self._folder}: cannot be written to ({error.strerror}); going on without", file=sys.stderr)
                self._folder = None
        return kept

    def get(self, key: str, make: Callable[[], Tensors]) -> Tensors:
        """An entry, made where there is none."""
        found = self.find(key)
        return self.add(key, make()) if found is None else found

    def _keep(self, key: str, tensors: dict[str, Tensor]) -> None:
        self._bytes += _bytes_of(tensors) - _bytes_of(self._kept.pop(key, {}))
        self._kept[key] = tensors
        while self._bytes > self._limit and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _bytes_of(oldest)


def _place(folder: Path, key: str) -> Path:
    digest = hashlib.sha256(key.encode()).hexdigest()
    return folder / digest[:2] / f"{digest}.safetensors"


def _bytes_of(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def write_entry(path: Path, key: str, tensors: Tensors) -> None:
    """Write an entry that says what it is made of."""
    _, values = serialised(tensors)
    facts = {_MADE_OF: key, _HASH: hashlib.sha256(values).hexdigest()}
    header, values = serialised(tensors, facts)
    with atomic_file(path) as file:
        file.write(header)
        file.write(values)


def read_entry(path: Path, key: str) -> dict[str, Tensor] | None:
    """An entry; None when there is none, or it is damaged, or was made of something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        facts = json.loads(raw[8:start])["__metadata__"]
        is_whole = hashlib.sha256(raw[start:]).hexdigest() == facts[_HASH]
        return load(raw) if is_whole and facts[_MADE_OF] == key else None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
