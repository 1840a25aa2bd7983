"""The fuzzing itself: make a file, have it read, keep what broke."""

import contextlib
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.fuzz.corpus import Maker, special_files
from benchmarks.fuzz.mutations import mutated
from benchmarks.fuzz.samples import sound_files
from benchmarks.fuzz.watch import READERS, Outcome, Watch, faults


@dataclass(frozen=True)
class Case:
    """One file and all that came of it.

    Attributes:
        name: what it is.
        group: the mutation's name, or "special".
        size: bytes of the file, as many as are on the disk.
        outcomes: of each reader.
        faults: reader -> what broke the promise.
    """

    name: str
    group: str
    size: int
    outcomes: list[Outcome]
    faults: dict[str, list[str]] = field(default_factory=dict)


def warm_up(folder: Path) -> None:
    """Read the sound files here, before any fork: what is imported and set up at a first call is no file's doing."""
    for parts in sound_files().values():
        path = folder / "warm-up.safetensors"
        path.write_bytes(parts.packed())
        for read in READERS.values():
            with contextlib.suppress(ValueError):
                read(path)
        path.unlink()


def special_cases(folder: Path, watch: Watch, say: Callable[[str], None] = print) -> Iterator[Case]:
    """Every special file, each read by a fresh process."""
    for number, (name, make) in enumerate(special_files().items()):
        path = folder / f"special-{number:03d}.safetensors"
        _elsewhere(make, path)
        watch.renew()
        yield _case(name, "special", path, watch, say)


def mutated_cases(
    folder: Path, watch: Watch, count: int, seed: int, say: Callable[[str], None] = print, *, slack: float = 1.0
) -> Iterator[Case]:
    """So many mutations of sound files; the same for the same seed. A slow machine may be given more time."""
    sound = sound_files(seed)
    for number in range(count):
        name, raw = mutated(sound, seed, number)
        path = folder / f"{seed}-{number:05d}.safetensors"
        path.write_bytes(raw)
        yield _case(name, name.split(" of ")[0], path, watch, say, slack)


def _elsewhere(make: Maker, path: Path) -> None:
    """Make a file in a process of its own: memory that it frees would serve the reader unseen."""
    process = multiprocessing.get_context("fork").Process(target=make, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 0, path


def _case(name: str, group: str, path: Path, watch: Watch, say: Callable[[str], None], slack: float = 1.0) -> Case:
    """Read a file and remove it; one that broke a promise is kept, with the trace beside it."""
    size = bytes_of(path)
    outcomes = watch.read(path)
    found = {outcome.reader: wrong for outcome in outcomes if (wrong := faults(outcome, path, size, slack=slack))}
    for outcome in outcomes:
        if outcome.reader in found:
            line = f"{path.name} ({name}), {outcome.reader}: {'; '.join(found[outcome.reader])}"
            say(f"{line}: {outcome.message[:300]!r}")
            path.with_suffix(f".{outcome.reader}.txt").write_text(f"{line}\n{outcome.message}\n{outcome.trace}")
    if not found:
        _remove(path)
    return Case(name, group, size, outcomes, found)


def bytes_of(path: Path) -> int:
    """Bytes that a file takes on the disk, or all files of a folder; 0 for what is no file."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir())
    return path.stat().st_blocks * 512 if path.is_file() else 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
