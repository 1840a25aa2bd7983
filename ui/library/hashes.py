"""Adapters of a library by the hashes that pictures name them by.

Names are never trusted: two files called `ink` may be two adapters. A name only says where to look first. Nothing is
hashed before somebody asks, and nothing twice until the file changes.
"""

import hashlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dora_diffusion.utils.atomic import sha256_of
from ui.library.library import AdapterFile, AdapterLibrary, Stamp, stamp_of

SHORTEST = 8  # hex digits; A1111 writes 10 or 12 of 64
PATIENCE = 120.0  # seconds
EMPTY = hashlib.sha256(b"").hexdigest()
_HASH = re.compile(rf"(?:0x)?([0-9a-f]{{{SHORTEST},64}})")


@dataclass(frozen=True)
class Wanted:
    """An adapter that a picture names.

    Attributes:
        name: what it was called there.
        hash: SHA-256 of its file or of its tensors, or how that begins; None when the picture does not say.
    """

    name: str
    hash: str | None


@dataclass(frozen=True)
class Missing:
    """An adapter that is not restored, and why, in one line."""

    name: str
    hash: str | None
    reason: str


def find_all(
    wanted: Sequence[Wanted], library: AdapterLibrary, *, patience: float = PATIENCE
) -> list[AdapterFile | Missing]:
    """The file of each, or why there is none.

    Args:
        wanted: in any order; the answers are in the same.
        library: hashed as far as it takes to find them all.
        patience: seconds, after which those not found yet are told as such; what was hashed until then stays known.
    """
    answers: dict[int, AdapterFile | Missing] = {}
    open_ones: dict[int, str] = {}
    for index, one in enumerate(wanted):
        checked = checked_hash(one)
        if isinstance(checked, Missing):
            answers[index] = checked
        else:
            open_ones[index] = checked
    end = time.monotonic() + patience
    searched, files = 0, _likely_first(library, [wanted[index].name for index in open_ones])
    for file in files:
        if not open_ones or time.monotonic() > end:
            break
        for index in [index for index, hash in open_ones.items() if _is(file, hash)]:
            answers[index] = file
            del open_ones[index]
        searched += 1
    for index in open_ones:
        answers[index] = Missing(wanted[index].name, wanted[index].hash, _not_there(library, searched, len(files)))
    return [answers[index] for index in range(len(wanted))]


def hash_of(file: AdapterFile) -> str:
    """SHA-256 of a library's file.

    Raises:
        ValueError: it is gone, or changes as it is read.
    """
    try:
        stamp = stamp_of(file.path)
        found = _digest(file.path, stamp, False)
        if stamp_of(file.path) != stamp:
            raise ValueError(f"{file.name}: the file changes as it is read; try again when it is finished")
    except OSError as error:
        raise ValueError(f"{file.name}: cannot be read ({error.strerror or type(error).__name__})") from None
    return found


def checked_hash(one: Wanted) -> str | Missing:
    """The hash in lower case, if it can find anything; the hash of nothing finds nothing."""
    if one.hash is None:
        return Missing(one.name, None, "the picture does not tell its hash, and a name alone is no proof")
    match = _HASH.fullmatch(one.hash.strip().lower())
    if match is None:
        return Missing(one.name, one.hash[:80], f"its hash is none: expected {SHORTEST} to 64 hex digits")
    if EMPTY.startswith(match[1]):
        reason = "its hash is that of an empty file, which some tools write by mistake"
        return Missing(one.name, match[1], reason)
    return match[1]


def _likely_first(library: AdapterLibrary, names: Sequence[str]) -> list[AdapterFile]:
    """The files of the library that can be used: those of one of the names, then those called so in part."""
    lower = {name.lower() for name in names}
    last = {name.rstrip("/").rpartition("/")[2] for name in lower}

    def rank(file: AdapterFile) -> int:
        name = file.name.lower()
        return 0 if name in lower else 1 if name.rstrip("/").rpartition("/")[2] in last else 2

    return sorted((file for file in library.files if file.problem is None), key=rank)


def _is(file: AdapterFile, wanted: str) -> bool:
    return any(found.startswith(wanted) for found in _hashes(file, is_whole=len(wanted) == 64))


def _hashes(file: AdapterFile, *, is_whole: bool) -> Iterator[str]:
    """Of the file; and what short hashes of A1111 and kohya may be, of what stands behind its header."""
    try:
        yield hash_of(file)
        if not is_whole and not file.path.is_dir():
            yield _digest(file.path, stamp_of(file.path), True)
    except (OSError, ValueError):
        return


@lru_cache(maxsize=1 << 17)
def _digest(path: Path, stamp: Stamp, skips_header: bool) -> str:
    """Hex SHA-256 of a file in the state of `stamp`."""
    if not skips_header:
        return sha256_of(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _not_there(library: AdapterLibrary, searched: int, all_of_them: int) -> str:
    if searched < all_of_them:
        left = all_of_them - searched
        return f"not among the {searched} files looked at so far, {left} are left; restore again to go on"
    return f"no file in {library.folder} has this hash"


def by_name(hashes: Mapping[str, str], name: str) -> str | None:
    """What a list of hashes holds under a name, whatever the case."""
    lower = {key.lower(): value for key, value in hashes.items()}
    return hashes.get(name, lower.get(name.lower()))
