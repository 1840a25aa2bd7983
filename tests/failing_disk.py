"""A disk that refuses one of the calls that change it, as a full one does, or all calls from one on."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

RENAMES = ("rename", "replace")
ALL = (*RENAMES, "mkdir", "fsync")


@contextmanager
def failing_at(call: int, *, of: tuple[str, ...] = ALL, onwards: bool = False) -> Iterator[list[str]]:
    """Refuse the `call`-th call (from 0) of these functions of `os`; yields the names of the calls that were tried."""
    tried: list[str] = []

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            tried.append(name)
            if len(tried) == call + 1 or (onwards and len(tried) > call):
                where = () if name == "fsync" else (str(arguments[0]),)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *where)
            return real(*arguments, **options)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in of:
            patch.setattr(os, name, watched(name, getattr(os, name)))
        yield tried


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """All that lies in a folder, hidden or not: a file's bytes, where a link points, None for a folder."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else (path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


def fail_at_every_call(
    work: Callable[[], object], folder: Path, *, of: tuple[str, ...] = ALL, may_be_new: bool = False
) -> list[str]:
    """Do `work` with each of its calls refused in turn, until it comes through; returns the messages of the failures.

    Whatever fails, `folder` holds what it held, bit for bit, with nothing beside it. With `may_be_new` a file whose
    folder cannot be synced may be the new one.
    """
    before, messages = contents(folder), []
    kept = folder.with_name(f"{folder.name} as it was")
    shutil.copytree(folder, kept, symlinks=True)
    for call in range(1000):
        with failing_at(call, of=of) as tried:
            try:
                work()
            except (OSError, ValueError) as error:
                messages.append(str(error))
                is_late = may_be_new and tried[-1] == "fsync"
                assert contents(folder).keys() == before.keys() if is_late else contents(folder) == before, tried
            else:
                assert contents(folder) != before
        if len(tried) <= call:
            shutil.rmtree(kept)
            return messages
        shutil.rmtree(folder)
        shutil.copytree(kept, folder, symlinks=True)
    raise AssertionError("it never came through")
