"""Files that are there whole or not at all: atomic writes, and checkpoint folders with a manifest.

A checkpoint holds safetensors and JSON only, never a pickle. A save writes a temporary folder, syncs it to disk,
renames it into place and only then removes older ones; "latest" is the newest checkpoint whose manifest agrees
with its files, so a kill at any moment leaves a valid one.
"""

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:  # hashing pictures needs no torch, which takes longer to import than they do to read
    from torch import Tensor
    from torch.optim import Optimizer

MANIFEST = "manifest.json"


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary file beside it; `path` is the old file or the new, never half."""
    with atomic_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path`, synced to disk, when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")  # of this writer alone
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write to a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def replace_path(new: Path, path: Path) -> None:
    """Put a finished file or folder in the place of another; a folder that was there is removed last."""
    before = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.before")
    shutil.rmtree(before, ignore_errors=True)  # of one that was killed
    if path.is_dir():  # a folder cannot be replaced by another in one step
        os.rename(path, before)
    os.replace(new, path)
    shutil.rmtree(before, ignore_errors=True)
    sync_folder(path.parent)


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
    """Write a safetensors file atomically."""
    from safetensors.torch import save

    write_atomically(path, save(unshared(tensors), metadata=dict(metadata or {})))


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


def save_checkpoint(folder: Path, files: Mapping[str, Callable[[Path], None]], keep: int = 2) -> None:
    """Save a checkpoint atomically as `folder`, then remove all but the newest `keep` valid ones beside it.

    Args:
        folder: the checkpoint's place, `.../step-00000100`; siblings named `step-*` are its elders.
        files: file name -> function that writes that file at the path it is given.
        keep: how many checkpoints stay, this one included; at least 1.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, write in files.items():
        write(temporary / name)
    sizes = {
        name: {"bytes": (temporary / name).stat().st_size, "sha256": sha256_of(temporary / name)} for name in files
    }
    write_atomically(temporary / MANIFEST, json.dumps(sizes, indent=1).encode())
    sync_folder(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(temporary, folder)
    sync_folder(folder.parent)
    for old in valid_checkpoints(folder.parent)[: -max(1, keep)]:
        shutil.rmtree(old)


def is_valid_checkpoint(folder: Path) -> bool:
    """Whether the folder's manifest is there and every file has the size and hash it names."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        return bool(manifest) and all(
            (folder / name).stat().st_size == entry["bytes"] and sha256_of(folder / name) == entry["sha256"]
            for name, entry in manifest.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def valid_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder` that are whole, oldest first (`step-*`, by number)."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit() and is_valid_checkpoint(path)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def optimizer_tensors(optimizer: "Optimizer") -> dict[str, "Tensor"]:
    """An optimiser's state as flat named tensors: `INDEX.NAME`, in the order of its parameters."""
    import torch

    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, values in state.items() for name, value in values.items()
    }


def load_optimizer_tensors(optimizer: "Optimizer", tensors: Mapping[str, "Tensor"]) -> None:
    """Put tensors of `optimizer_tensors` back; the parameter groups keep the settings they have now."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
