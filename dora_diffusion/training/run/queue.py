"""Runs one after another, each in a process of its own: its memory is free before the next begins, and however it ends
the others go on.

A run's process is no member of the terminal's group, so that Ctrl+C reaches the queue alone, which hands it on once:
the run saves a checkpoint, and the queue ends. A queue that is killed closes the standard input that its run watches,
which ends that one likewise.
"""

import codecs
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run.dry_run import check_plan
from dora_diffusion.training.run.folder import holds_checkpoints
from dora_diffusion.training.run.train import check_start
from dora_diffusion.utils.text import shown

_KEPT = 8192  # bytes of what a run says last
_ASKING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_STOPPED = (130, *(-number for number in _ASKING))  # of a run that was asked to end, after or before it could save
_PROGRAM = "dora-diffusion: "


@dataclass(frozen=True)
class Queued:
    """A run that waits for its turn.

    Attributes:
        file: its YAML.
        config: as it was when the queue began.
        resume: "latest" or None, as `train` takes it; extend and accept_changes likewise.
        extend: see there.
        accept_changes: see there.
        settings: flags that replace settings of the file.
    """

    file: Path
    config: TrainConfig
    resume: str | None = None
    extend: int | None = None
    accept_changes: bool = False
    settings: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """The program that trains it, and ends with its standard input."""
        flags = ["--end-with-stdin"]
        flags += [] if self.resume is None else ["--resume", self.resume]
        flags += [] if self.extend is None else ["--extend", str(self.extend)]
        flags += ["--accept-changes"] if self.accept_changes else []
        return [sys.executable, "-m", "dora_diffusion.cli", "train", str(self.file), *flags, *self.settings]


def queue_of(
    configs: Mapping[Path, TrainConfig],
    *,
    resume: str | None = None,
    extend: int | None = None,
    accept_changes: bool = False,
    settings: Sequence[str] = (),
) -> list[Queued]:
    """The runs of some YAML files, as `train` would be asked for each.

    `resume` and `accept_changes` are for those that have a checkpoint; the others begin.
    """
    runs = []
    for file, config in configs.items():
        begins = extend is None and not (resume and holds_checkpoints(config.output_dir))
        runs.append(
            Queued(file, config, None if begins else resume, extend, accept_changes and not begins, tuple(settings))
        )
    return runs


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        status: its exit status; the negative number of a signal that killed it; None where it was not begun.
        said: the last line of what it wrote to standard error.
    """

    status: int | None
    said: str = ""

    @property
    def word(self) -> str:
        """In one word."""
        if self.status is None:
            return "waits"
        return "done" if self.status == 0 else "stopped" if self.status in _STOPPED else "failed"

    @property
    def reason(self) -> str:
        """Why it is not done, on one line."""
        if self.status is not None and self.status < 0 and self.status not in _STOPPED:
            name = signal.Signals(-self.status).name
            memory = "; the system does so where memory runs out" if -self.status == signal.SIGKILL else ""
            return f"killed by {name}{memory}"
        return "--resume latest goes on with it" if self.status in _STOPPED else self.said


def check_queue(runs: Sequence[Queued], environment: Mapping[str, str] = os.environ) -> None:
    """Refuse at once what could not be trained when its turn comes.

    Raises:
        ValueError: one line: two runs have one folder, several processes train together, or what `train` itself would
            say of a run's folder, checkpoint, pictures, base or targets; it begins with the run's file.
    """
    if int(environment.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a queue starts each run itself, in one process; under accelerate launch name one config")
    folders: dict[str, Path] = {}
    for run in runs:
        folder = os.path.realpath(run.config.output_dir)
        if folder in folders:
            raise ValueError(
                f"{run.file}: output_dir: {run.config.output_dir} is that of {folders[folder]} too; expected a folder "
                "of its own for each run"
            )
        folders[folder] = run.file
    for number, run in enumerate(runs):
        try:
            check_start(run.config, resume=run.resume, extend=run.extend, accept_changes=run.accept_changes)
            check_plan(_without_what_is_to_come(run.config, runs[:number]))
        except ValueError as error:
            raise ValueError(f"{run.file}: {error}") from None


def _without_what_is_to_come(config: TrainConfig, before: Sequence[Queued]) -> TrainConfig:
    """Without a start that a run before it will have written by its turn."""
    start = config.adapter.start
    folders = [run.config.output_dir for run in before]
    if start is None or start.exists() or not any(start.is_relative_to(folder) for folder in folders):
        return config
    return config.model_copy(update={"adapter": config.adapter.model_copy(update={"start": None})})


def run_queue(runs: Sequence[Queued]) -> list[Ended]:
    """Train all, in their order; those after a stop are not begun."""
    ended: list[Ended] = []
    with _stops() as stop:
        for number, run in enumerate(runs, start=1):
            if stop.asked:
                ended.append(Ended(None))
                continue
            print(f"queue      {number} of {len(runs)}: {run.file}", flush=True)
            ended.append(_train(run, stop))
    return ended


def summary(runs: Sequence[Queued], ended: Sequence[Ended]) -> str:
    """A line for each run: what became of it, and its adapter or why there is none."""
    done = sum(end.status == 0 for end in ended)
    width = max(len(str(run.file)) for run in runs)
    lines = [f"queue      {done} of {len(runs)} done"]
    for run, end in zip(runs, ended, strict=True):
        told = _left_by(run.config) if end.status == 0 else end.reason
        lines.append(f"  {run.file!s:<{width}}  {end.word:<7}  {told}".rstrip())
    return "\n".join(lines)


def _left_by(config: TrainConfig) -> str:
    adapter = config.output_dir / "adapter.safetensors"
    return str(adapter if adapter.is_file() else config.output_dir / "words")


class _Stop:
    """Whether somebody asked for an end, and the run that is told so."""

    def __init__(self) -> None:
        self.asked = False
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, number: int, frame: FrameType | None) -> None:
        """The handler of signals: each is handed on to the run, which knows the first from the second."""
        self.asked = True
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)


@contextmanager
def _stops() -> Iterator[_Stop]:
    """A signal that is ignored (`nohup`) stays so."""
    stop = _Stop()
    ours = [number for number in _ASKING if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop.ask) for number in ours}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(run: Queued, stop: _Stop) -> Ended:
    """One run, from its start to its end; what it says is passed on."""
    with subprocess.Popen(
        run.command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        stop.process = process
        try:
            if stop.asked:  # between the last look and now
                process.send_signal(signal.SIGINT)
            last = _passed_on(process.stderr)
            status = process.wait()
        finally:
            stop.process = None
    return Ended(status, _last_line(last))


def _passed_on(stream: IO[bytes] | None) -> bytes:
    """Write on to standard error what comes, as it comes; the end of it is returned."""
    if stream is None:
        return b""
    last, decoder = b"", codecs.getincrementaldecoder("utf-8")("replace")
    while piece := os.read(stream.fileno(), 4096):
        sys.stderr.write(decoder.decode(piece))
        sys.stderr.flush()
        last = (last + piece)[-_KEPT:]
    return last


def _last_line(said: bytes) -> str:
    """The program's own last word, else the last line that is no progress bar: that of a traceback, say."""
    lines = [line.strip() for line in said.decode("utf-8", "replace").replace("\r", "\n").split("\n")]
    told = [line for line in lines if line and "it/s" not in line and "s/it" not in line]
    own = [line.removeprefix(_PROGRAM) for line in told if line.startswith(_PROGRAM)]
    return shown((own or told)[-1], 400) if told else ""
