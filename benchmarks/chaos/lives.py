"""One life of a run: a process, forked after all imports, which says when it saves and how it ends."""

import io
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run import checkpoint
from dora_diffusion.training.run import train as start
from dora_diffusion.utils import atomic

SAVING, SAVED, DONE, FAILED = b"(", b")", b".", b"!"
_PATIENCE = 600.0

Prepare = Callable[[], object]


@dataclass(frozen=True)
class End:
    """How a life ended.

    Attributes:
        said: what the process wrote: brackets around its saves, then how it ended.
        killed: whether it was killed.
    """

    said: bytes
    killed: bool

    @property
    def in_save(self) -> bool:
        """Whether it was killed while it saved a checkpoint."""
        return self.killed and self.said.count(SAVING) > self.said.count(SAVED)

    @property
    def fault(self) -> str | None:
        """What it failed with by itself; None of one that came through or was killed."""
        _, failed, message = self.said.partition(FAILED)
        if failed:
            return message.decode()
        return None if self.killed or DONE in self.said else "it ended without a word"


class Life:
    """A run under way, to be killed or waited for.

    Args:
        config: of the run.
        pipe: its base, loaded; the process has a copy of its own.
        resume: whether it goes on from a checkpoint.
        prepare: called in the process before anything else.
    """

    def __init__(self, config: TrainConfig, pipe: Any, *, resume: bool, prepare: Prepare = lambda: None) -> None:
        self._reading, writing = os.pipe()
        self.said = b""
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._reading)
            _live(config, pipe, resume=resume, prepare=prepare, pipe_end=writing)
        os.close(writing)

    def listen(self, seconds: float, *, until: Callable[[bytes], bool] = lambda said: False) -> bool:
        """Hear what it says for so long, or until it has said something; False once it has ended."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not until(self.said):
            if select.select([self._reading], [], [], left)[0]:
                heard = os.read(self._reading, 4096)
                if not heard:
                    return False
                self.said += heard
        return True

    def kill(self) -> End:
        """End it as a loss of power would."""
        os.kill(self._pid, signal.SIGKILL)
        return self._end()

    def wait(self) -> End:
        """Let it come to its end."""
        if self.listen(_PATIENCE):
            return self.kill()
        return self._end()

    def _end(self) -> End:
        while heard := os.read(self._reading, 4096):
            self.said += heard
        _, status = os.waitpid(self._pid, 0)
        os.close(self._reading)
        return End(self.said, os.WIFSIGNALED(status))


def _live(config: TrainConfig, pipe: Any, *, resume: bool, prepare: Prepare, pipe_end: int) -> NoReturn:
    """Train, in the process of its own; says what it does and never returns."""
    say, save = os.write, checkpoint.save

    def told(*arguments: Any, **options: Any) -> Path:
        say(pipe_end, SAVING)
        path = save(*arguments, **options)
        say(pipe_end, SAVED)
        return path

    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        checkpoint.save = told
        start.load_base = lambda *_: pipe
        prepare()
        start.train(config, resume="latest" if resume else None)
        say(pipe_end, DONE)
    except BaseException as error:
        say(pipe_end, FAILED + f"{type(error).__name__}: {error}"[:2000].encode())
    finally:
        os._exit(0)


class FullDisk:
    """A disk without room from the `call`-th call on (from 0) that would write to it, make or move something there.

    Args:
        call: the first that is refused.
    """

    def __init__(self, call: int) -> None:
        self._call, self._tried = call, 0

    def __call__(self) -> None:
        """Be that disk, in this process, for all that is written atomically."""
        for name in ("mkdir", "rename", "replace", "fsync", "write"):
            setattr(os, name, self._refusing(getattr(os, name)))
        disk = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                disk.refuse(self.name)
                return super().write(data)

        def opened(path: Path, mode: str) -> Any:
            if mode == "rb":
                return open(path, mode)  # noqa: SIM115  # whoever asked for it closes it
            self.refuse(path)
            return io.BufferedWriter(Raw(str(path), mode))

        atomic.open = opened  # type: ignore[attr-defined]

    def _refusing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            self.refuse(arguments[0] if isinstance(arguments[0], (str, Path)) else None)
            return real(*arguments, **options)

        return wrapper

    def refuse(self, path: Any) -> None:
        """Count a call, and refuse it if there is no room."""
        self._tried += 1
        if self._tried > self._call:
            raise OSError(28, os.strerror(28), *(() if path is None else (str(path),)))
