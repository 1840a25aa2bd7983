"""A run's folder: that it can be written, found out before anything is loaded, and that one run alone writes it."""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".lock"
_INNER = ("checkpoints", "samples", "logs", "words", "class")


def check_writable(folder: Path) -> None:
    """Try whether a run could write its folder, which need not be there yet and is not made.

    Raises:
        ValueError: it could not; one line that says which folder, and why.
    """
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(_unwritable(folder, there, error.strerror)) from None
    for inner in (folder / name for name in _INNER):
        if os.path.lexists(inner) and not (inner.is_dir() and os.access(inner, os.W_OK | os.X_OK)):
            raise ValueError(_unwritable(folder, inner, "not a folder that may be written to"))


def _unwritable(folder: Path, where: Path, reason: str | None) -> str:
    return f"output_dir: {folder} cannot be written ({where}: {reason}); choose another folder, or mend its rights"


def holds_checkpoints(folder: Path) -> bool:
    """Whether a run has saved some in its folder, whole or not."""
    return any(folder.glob("checkpoints/step-*"))


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep every other run out of a run's folder, which is made, while the block lasts.

    The system lets go of the lock of a process that ends, however it ends. File systems without locks keep nobody out.

    Raises:
        ValueError: another run trains there, or the folder cannot be written; one line.
    """
    check_writable(folder)
    is_new = not folder.exists()
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _taken(folder / LOCK)
        except OSError as error:
            raise ValueError(_unwritable(folder, folder / LOCK, error.strerror)) from None
        try:
            yield
        finally:
            _let_go(descriptor, folder / LOCK)
    finally:
        if is_new:
            with suppress(OSError):  # a run that came to nothing leaves nothing
                folder.rmdir()


def _let_go(descriptor: int, path: Path) -> None:
    path.unlink(missing_ok=True)  # while it is held: whoever opened this very file meanwhile sees that it is gone
    os.close(descriptor)


def _taken(path: Path) -> int:
    """The lock file's descriptor, locked, and who holds it written there."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor, path)
        except BaseException:
            os.close(descriptor)
            raise
        if os.path.lexists(path) and os.path.samestat(os.stat(path), os.fstat(descriptor)):
            break
        os.close(descriptor)  # whoever held it has removed it meanwhile
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except BaseException:
        _let_go(descriptor, path)
        raise
    return descriptor


def _lock(descriptor: int, path: Path) -> None:
    import fcntl  # not every system has it, and plans do not need it

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.pread(descriptor, 200, 0).decode(errors="replace") or "one that begins at this moment"
        raise ValueError(
            f"{path.parent}: another run trains there ({who}); wait until it ends, stop it, or choose another folder"
        ) from None
    except OSError:  # a file system without locks
        pass
