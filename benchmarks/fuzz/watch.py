"""Reading files in another process, with a clock and an eye on its memory: what came of each.

One process reads many files; it is forked anew after it hung or died. The peak of its memory is the kernel's own count
(`VmHWM`), set back before every file, so it is there on Linux only. Time is the processor's: others who use the machine
do not count, and a file that has to be waited for is a hang.
"""

import ctypes
import gc
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from dora_diffusion.formats import detect_format, load_adapter
from dora_diffusion.formats.safetensors_reader import shown
from dora_diffusion.inspection.report import describe, inspect_adapter

SECONDS = 0.2
# what is read may take longer than what is refused, by no promise but so that nobody waits
SECONDS_READ = 2.0
MEMORY = 64 * 2**20
MESSAGE = 500
PATIENCE = 20.0

Reader = Callable[[Path], object]


def inspected(path: Path) -> str:
    """What the command line would print, as words and as JSON."""
    facts = inspect_adapter(path)
    return describe(facts) + json.dumps(facts)


READERS: dict[str, Reader] = {"load": load_adapter, "detect": detect_format, "inspect": inspected}


@dataclass(frozen=True)
class Outcome:
    """What came of one file and one reader.

    Attributes:
        reader: a key of READERS.
        kind: "read", "refused" (a ValueError), "crash" (any other), "hang", "died" (the process with it).
        message: of the error.
        seconds: of the processor; the best of three where the first took longer than SECONDS.
        memory: bytes that the process grew by at its peak; None where the system does not tell.
        trace: where the error came from.
    """

    reader: str
    kind: str
    message: str = ""
    seconds: float = 0.0
    memory: int | None = None
    trace: str = ""


def faults(outcome: Outcome, path: Path, size: int, *, slack: float = 1.0) -> list[str]:
    """What is wrong with an outcome; empty where the promise is kept. A slow machine may be given more time."""
    found = [outcome.kind] if outcome.kind not in ("read", "refused") else []
    if outcome.kind == "refused":
        if len(outcome.message) > MESSAGE or len(outcome.message.splitlines()) != 1:
            found.append(f"message of {len(outcome.message)} characters, {len(outcome.message.splitlines())} lines")
        if path.name not in outcome.message and shown(path, 300) not in outcome.message:
            found.append("message does not name the file")
    if outcome.seconds > slack * (SECONDS_READ if outcome.kind == "read" else SECONDS):
        found.append(f"{1000 * outcome.seconds:.0f} ms")
    if outcome.memory is not None and outcome.memory > size + MEMORY:
        found.append(f"{outcome.memory / 2**20:.0f} MB of memory for {size / 2**20:.1f}")
    return found


class Watch:
    """A process that reads files for us; `with Watch() as watch: watch.read(path)`."""

    def __init__(self, readers: dict[str, Reader] | None = None, patience: float = PATIENCE) -> None:
        self._readers = READERS if readers is None else readers
        self._patience = patience
        self._start()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def renew(self) -> None:
        """Begin with a fresh process: what the last one kept of its memory would hide what a file needs."""
        self._stop()
        self._start()

    def read(self, path: Path) -> list[Outcome]:
        """The outcome of each reader."""
        return [self._one(name, path) for name in self._readers]

    def _one(self, reader: str, path: Path) -> Outcome:
        self._ours.send((reader, path))
        try:
            if self._ours.poll(self._patience):
                outcome: Outcome = self._ours.recv()
                return outcome
            kind = "hang"
        except EOFError:
            kind = "died"
        self.renew()
        return Outcome(reader, kind)

    def _start(self) -> None:
        context: Any = multiprocessing.get_context("fork")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._ours, self._readers), daemon=True)
        self._process.start()
        theirs.close()

    def _stop(self) -> None:
        self._ours.close()
        self._process.kill()
        self._process.join()


def _serve(theirs: Connection, ours: Connection, readers: dict[str, Reader]) -> None:
    ours.close()  # else the end of the parent's would never be seen
    torch.set_num_threads(1)  # a fork has none of its parent's threads, and would wait for them for ever
    gc.freeze()
    warnings.simplefilter("error")  # what makes a library warn should have been refused
    while True:
        try:
            name, path = theirs.recv()
        except EOFError:
            os._exit(0)
        outcome = _watched(name, readers[name], path)
        again = 2 if SECONDS < outcome.seconds < 10 * SECONDS else 0
        others = [_watched(name, readers[name], path).seconds for _ in range(again)]
        theirs.send(Outcome(**{**vars(outcome), "seconds": min([outcome.seconds, *others])}))


def _watched(name: str, read: Reader, path: Path) -> Outcome:
    gc.collect()
    _give_back_freed_memory()
    before = _memory_from_now()
    kind, message, trace = "read", "", ""
    start = time.process_time()
    try:
        read(path)
    except ValueError as error:
        # a ValueError of someone else's, from further down, is no message for people
        kind, message = ("refused", str(error)) if type(error) is ValueError else ("crash", repr(error))
        trace = traceback.format_exc()
    except BaseException as error:
        kind, message, trace = "crash", repr(error)[:MESSAGE], traceback.format_exc()
    seconds = time.process_time() - start
    peak = _status("VmHWM")
    return Outcome(name, kind, message, seconds, None if before is None or peak is None else peak - before, trace)


def _give_back_freed_memory() -> None:
    """Else what is taken next would come from there, and not be seen."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _memory_from_now() -> int | None:
    """Bytes in memory, and the peak forgotten."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
