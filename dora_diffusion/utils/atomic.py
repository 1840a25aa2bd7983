"""Files and folders that are there whole or not at all: atomic writes, and checkpoint folders with a manifest.

What takes the place of something is built in a hidden folder beside it, `.NAME.TOKEN.staging`: the new one under `new`,
and, while the two change places, the old one under `old`. A folder cannot take another's place in one step, so a
writer that is killed may leave the old one there; whoever writes that name next, or looks for the newest checkpoint,
puts it back (`recover`).

A checkpoint holds safetensors and JSON only, never a pickle. A save builds the folder aside, syncs it to disk,
renames it into place and only then removes older ones; "latest" is the newest checkpoint whose manifest agrees
with its files, so a kill at any moment leaves a valid one.
"""

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:  # hashing pictures needs no torch, which takes longer to import than they do to read
    from torch import Tensor

MANIFEST = "manifest.json"
_SETTLED_NANOSECONDS = 10**9
_TEMPORARY = re.compile(r"\.(.+)\.[0-9]+-[0-9]+\.tmp", re.DOTALL)
_STAGING = re.compile(r"\.(.+)\.[0-9a-f]{8}\.staging", re.DOTALL)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary file beside it; `path` is the old file or the new, never half."""
    with atomic_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path`, synced to disk, when the block ends without an error.

    A writer that is killed leaves a hidden `.NAME.PROCESS-THREAD.tmp`, which the next one in that folder removes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")  # of this writer alone
    try:
        with _errors_of(path, temporary, within=temporary), _opened(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # while it is still held
    finally:
        temporary.unlink(missing_ok=True)
    with _errors_of(path, temporary, within=temporary):
        sync_folder(path.parent)


def _opened(temporary: Path) -> BinaryIO:
    """A new file, held until it is closed, so that nobody takes it for abandoned; those that are go first."""
    import fcntl

    with _held(temporary.parent):
        with os.scandir(temporary.parent) as entries:
            left = [temporary.parent / entry.name for entry in entries if _TEMPORARY.fullmatch(entry.name)]
        for other in left:
            with contextlib.suppress(OSError):
                if _is_abandoned(other):
                    other.unlink()
        file = open(temporary, "wb")  # noqa: SIM115  # whoever asked for it closes it
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A place, of the same name, to build a file or folder that becomes `path` when the block ends without an error.

    What was at `path` stays until its successor is finished, and comes back when that cannot take its place. A file
    takes a file's place in one step; a folder's old one is removed last, and one that cannot be removed is no error. A
    link is replaced itself, not what it points to. Of several that write one `path`, threads or processes, the last to
    finish stays.

    Raises:
        OSError: a full disk, a folder that may not be written to ...: one line that names `path`, and where the old
            one lies if it could not even be put back.
        ValueError: `path` ends in no name; or of the block, naming `path` where it named the place.
    """
    if path.name in ("", ".."):
        raise ValueError(f"{path}: expected a path that ends in the name of a file or folder")
    staging = path.with_name(f".{path.name}.{secrets.token_hex(4)}.staging")
    new, old = staging / "new" / path.name, staging / "old" / path.name
    with _errors_of(path, new, within=staging), contextlib.ExitStack() as building:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _held(path.parent):
            _recover(path.parent, path.name)
            staging.mkdir()
            building.enter_context(_held(staging))  # whoever recovers sees that it is not abandoned
        try:
            new.parent.mkdir()
            yield new
            if new.is_dir():
                sync_folder(new)
            with _held(path.parent):
                _exchange(new, path, old)
        except BaseException:
            # what could not be put back is the only copy
            shutil.rmtree(new.parent if os.path.lexists(old) else staging, ignore_errors=True)
            raise
        _discard(staging)


def _exchange(new: Path, path: Path, old: Path) -> None:
    """Put `new` in the place of `path`; what was there is set aside as `old`, and put back when this fails."""
    was_there = os.path.lexists(path)
    in_one_step = was_there and not new.is_dir() and (path.is_symlink() or not path.is_dir())
    try:
        if was_there and not in_one_step:
            old.parent.mkdir()
            os.rename(path, old)
        os.replace(new, path)
        sync_folder(path.parent)
    except BaseException as error:
        try:
            if not in_one_step:
                _put_back(new, path, old)
        except OSError as another:
            if os.path.lexists(old):
                reason = f"{another.strerror}; what was there could not be put back and lies in {old}"
                raise OSError(another.errno, reason, str(path)) from error
        raise


def _put_back(new: Path, path: Path, old: Path) -> None:
    if os.path.lexists(path) and not os.path.lexists(new):  # in its place already, where it cannot be made to last
        os.rename(path, new)
    if os.path.lexists(old):
        if os.path.lexists(path):
            raise OSError(errno.EEXIST, "something else was put there meanwhile", str(path))
        os.rename(old, path)


def recover(folder: Path) -> None:
    """Put back what killed writers had set aside in a folder, and remove what they left half done."""
    if folder.is_dir():
        with _held(folder):
            _recover(folder)


def _recover(folder: Path, name: str | None = None) -> None:
    """Recover one name, or all; the folder is held, so nobody is between setting aside and replacing."""
    with os.scandir(folder) as entries:
        found = [(entry.name, match[1]) for entry in entries if (match := _STAGING.fullmatch(entry.name))]
    for staging, path in ((folder / hidden, folder / told) for hidden, told in found if name in (None, told)):
        with contextlib.suppress(OSError):  # a folder that may be read only: the old one stays aside
            old, new = staging / "old" / path.name, staging / "new"
            is_only_copy = os.path.lexists(old) and not (new.is_dir() and not os.path.lexists(new / path.name))
            if is_only_copy and not os.path.lexists(path):
                os.rename(old, path)
                sync_folder(folder)
                is_only_copy = False
            if not is_only_copy and _is_abandoned(staging):
                _discard(staging)


def _discard(staging: Path) -> None:
    """Remove as much as can be; `new` last, for without it `old` is taken for the only copy."""
    shutil.rmtree(staging / "old", ignore_errors=True)
    if not os.path.lexists(staging / "old"):
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keep other threads and processes that would hold a folder waiting; not on a file system without locks."""
    import fcntl  # not every system has it, and reading does not need it

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_abandoned(staging: Path) -> bool:
    """Whether nobody builds there, or writes it, any more; False where that cannot be told."""
    import fcntl

    descriptor = os.open(staging, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


@contextlib.contextmanager
def _errors_of(path: Path, new: Path, *, within: Path) -> Iterator[None]:
    """Errors that name the place of building, or none at all as a write to a full disk does, name `path`."""
    try:
        yield
    except ValueError as error:
        if str(new) not in str(error):
            raise
        raise ValueError(str(error).replace(str(new), str(path))) from None
    except OSError as error:
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        is_ours = not names or any(str(within) in name for name in names)
        if error.errno is None or not is_ours:
            raise
        where = names[0].replace(str(new), str(path)) if names and str(new) in names[0] else str(path)
        raise OSError(error.errno, error.strerror, where) from error


def sync_folder(folder: Path) -> None:
    """Make a rename in a folder last: what it holds is on disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path, *, known: Mapping[Path, str] | None = None) -> str:
    """Hex SHA-256 of a file's bytes; of a folder, of its files' names and hashes.

    Args:
        path: the file or folder.
        known: files of the folder that have been hashed already, as they were read.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        known = known or {}
        for inside in sorted(inside for inside in path.rglob("*") if inside.is_file()):
            digest.update(f"{inside.relative_to(path).as_posix()} {known.get(inside) or sha256_of(inside)}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_tensors(tensors: Mapping[str, "Tensor"], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically; what is in it, in any order, says every byte of it."""
    with atomic_file(path) as file:
        for piece in serialised(tensors, metadata):
            file.write(piece)


def serialised(tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> tuple[bytes, memoryview]:
    """A safetensors file: its length and header, and the bytes of its tensors.

    safetensors sorts tensors itself, by dtype and name, and leaves metadata in an order that changes from process to
    process: here they are sorted.
    """
    from safetensors.torch import save

    # of no tensors with an empty mapping, safetensors 0.8 makes a header that it cannot read again
    whole = memoryview(save(unshared(tensors), metadata=dict(metadata) if metadata else None))
    start = 8 + int.from_bytes(whole[:8], "little")
    return header_bytes(json.loads(bytes(whole[8:start]))), whole[start:]


def header_bytes(header: Mapping[str, Any]) -> bytes:
    """Length and JSON, padded with blanks so that tensors begin at a multiple of eight; metadata first and sorted."""
    metadata = {"__metadata__": dict(sorted(header["__metadata__"].items()))} if "__metadata__" in header else {}
    raw = json.dumps({**metadata, **header, **metadata}, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def unshared(tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """The same tensors as a file can hold them: on the CPU, contiguous, each with memory of its own."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        moved = tensor.detach().cpu().contiguous()
        apart[name] = moved.clone() if moved.data_ptr() in seen else moved
        seen.add(apart[name].data_ptr())
    return apart


def load_tensors(path: Path) -> dict[str, "Tensor"]:
    """Read a safetensors file of our own into memory (bytes are read, not mapped: a mapped file may change)."""
    from safetensors.torch import load

    return load(path.read_bytes())


def save_checkpoint(
    folder: Path,
    files: Mapping[str, Callable[[Path], None]],
    keep: int = 2,
    *,
    spared: Collection[str] = (),
) -> None:
    """Save a checkpoint atomically as `folder`, then remove all its elders but the newest valid `keep` - 1.

    Args:
        folder: the checkpoint's place, `.../step-00000100`; siblings named `step-*` of a lower number are its elders.
        files: file name -> function that writes that file at the path it is given.
        keep: how many checkpoints stay, this one included; at least 1.
        spared: names of elders that stay, too.
    """
    with atomic_path(folder) as new:
        new.mkdir()
        for name, write in files.items():
            write(new / name)
        sizes = {name: {"bytes": (new / name).stat().st_size, "sha256": sha256_of(new / name)} for name in files}
        write_atomically(new / MANIFEST, json.dumps(sizes, indent=1).encode())
    remove_elders(folder, keep=keep, spared=spared)


def remove_elders(folder: Path, *, keep: int, spared: Collection[str] = ()) -> None:
    """Remove a checkpoint's elders, whole or not, but the newest valid `keep` - 1 and those whose names are spared.

    One that cannot be removed is no error: the next save tries again. Those that go are not read, and one that stays is
    hashed no second time while nobody touches it.
    """
    recover(folder.parent)
    elders = [path for path in _checkpoints(folder.parent) if _number(path) < _number(folder)]
    stay = itertools.islice((path for path in reversed(elders) if _is_valid(path, _settled_sha256)), max(1, keep) - 1)
    kept = set(stay)
    for elder in elders:
        if elder not in kept and elder.name not in spared:
            with contextlib.suppress(OSError):
                remove_folder(elder)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that it is there whole or not at all, however this ends; what is left of it is hidden.

    Raises:
        OSError: it cannot be set aside, or nothing in it can be removed; it is still there, whole.
    """
    staging = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.staging")
    aside = staging / "old" / folder.name
    held = _names_in(folder)
    try:
        # `new`, and no successor in it: whoever recovers takes what is set aside for what was replaced
        (staging / "new").mkdir(parents=True)
        aside.parent.mkdir()
        os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)
        if aside.is_dir() and _names_in(aside) == held:
            os.rename(aside, folder)
            raise OSError(errno.EACCES, "cannot be removed", str(folder))
    finally:
        _discard(staging)


def _names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def _checkpoints(folder: Path) -> list[Path]:
    """Whatever is named `step-*`, by number."""
    return sorted((path for path in folder.glob("step-*") if path.name[5:].isdigit()), key=_number)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def is_valid_checkpoint(folder: Path) -> bool:
    """Whether the folder's manifest is there and every file has the size and hash it names."""
    return _is_valid(folder, sha256_of)


def _is_valid(folder: Path, hash_of: Callable[[Path], str]) -> bool:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        return bool(manifest) and all(
            (folder / name).stat().st_size == entry["bytes"] and hash_of(folder / name) == entry["sha256"]
            for name, entry in manifest.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _settled_sha256(file: Path) -> str:
    """A file's hash, taken once while nobody touches it.

    A clock may stand still between two writes: one that was written a moment ago is hashed at every call.
    """
    found = file.stat()
    if time.time_ns() - found.st_mtime_ns < _SETTLED_NANOSECONDS:
        return sha256_of(file)
    return _sha256_as_of(file, (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))


@functools.lru_cache(maxsize=256)
def _sha256_as_of(file: Path, state: tuple[int, ...]) -> str:
    return sha256_of(file)


def valid_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder` that are whole, oldest first (`step-*`, by number), after `recover`."""
    recover(folder)
    return [path for path in _checkpoints(folder) if is_valid_checkpoint(path)]


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint in `folder` that is whole, and those after it that are not; its elders are not read."""
    recover(folder)
    broken: list[Path] = []
    for path in reversed(_checkpoints(folder)):
        if is_valid_checkpoint(path):
            return path, broken
        broken.append(path)
    return None, broken
