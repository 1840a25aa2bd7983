"""The trainer as a process of its own: one at a time, ended with the app, its last words kept.

A process, not a thread: drawing stays quick beside it, a crash leaves the app alone, and stopping it always works.
"""

import atexit
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run.checkpoint import ADAPTER
from dora_diffusion.utils.atomic import recover, write_atomically
from ui.train.child import end, spawn
from ui.train.log import last_line, last_reason
from ui.train.runs import CONFIG, LOG, forget_attempt, run_config

GRACE_SECONDS = 60.0  # a step of a large model, its previews and its checkpoint
CLOSING_SECONDS = 8.0  # the app waits no longer when it ends itself
_STOPPED = 130  # the exit status of a run that was interrupted
_FULL_BYTES = 1 << 20


@dataclass(frozen=True)
class TrainState:
    """What the trainer is at.

    Attributes:
        run: name of the run folder; None before the first start.
        phase: 'idle', 'running', 'stopping', 'done', 'stopped' or 'failed'.
        message: the last line it wrote; why it failed.
        number: how many starts there were, which tells two runs apart that ended alike.
        since: `time.time()` of the last start.
    """

    run: str | None = None
    phase: str = "idle"
    message: str = ""
    number: int = 0
    since: float = 0.0

    @property
    def under_way(self) -> bool:
        """Whether a process is there."""
        return self.phase in ("running", "stopping")


@dataclass(frozen=True)
class _Start:
    """A process, what it trains, and which start it was."""

    process: subprocess.Popen[bytes]
    run: Path
    number: int
    since: float


class Trainer:
    """Runs `dora-diffusion train` for one run folder after another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: _Start | None = None
        self._stopped: _Start | None = None
        self._closed = False
        atexit.register(self.close)

    @property
    def running(self) -> bool:
        """Whether a training run is under way."""
        return self._last is not None and self._last.process.poll() is None

    def start(self, config: TrainConfig) -> Path:
        """Train anew; returns the run folder.

        Raises:
            ValueError: a run is under way, or the folder holds what an earlier one learnt.
        """
        with self._lock:
            self._refuse_second()
            run = config.output_dir
            if _has_learnt(run):
                raise ValueError(f"{run.name}: there is such a run already; resume it, or choose another name")
            forget_attempt(run)
            write_atomically(run / CONFIG, config.to_yaml().encode())
            self._spawn(run)
        return run

    def resume(self, run: Path) -> None:
        """Go on from a run's newest whole checkpoint, or from its start when it has none.

        Raises:
            ValueError: a run is under way, or this one's configuration cannot be used.
        """
        with self._lock:
            self._refuse_second()
            run_config(run)
            if not _has_learnt(run):  # it begins anew
                forget_attempt(run)
            self._spawn(run, *(("--resume", "latest") if _has_checkpoints(run) else ()))

    def stop(self) -> None:
        """Interrupt the trainer, so that it saves its step and ends; kill it when it does not in time."""
        self._end(GRACE_SECONDS)

    def _end(self, grace: float) -> None:
        with self._lock:
            if self._last is None:
                return
            if self.running:
                self._stopped = self._last
            end(self._last.process, grace=grace)

    def close(self) -> None:
        """End it with the app; nothing can be started afterwards."""
        self._closed = True
        self._end(CLOSING_SECONDS)
        atexit.unregister(self.close)

    def state(self) -> TrainState:
        """What it is at now."""
        last = self._last
        if last is None:
            return TrainState()
        code = last.process.poll()
        phase = _phase(code, stopped=self._stopped is last)
        message = _why(last.run, code) if phase == "failed" and code else last_line(last.run / LOG)
        return TrainState(last.run.name, phase, message, last.number, last.since)

    def _refuse_second(self) -> None:
        if self._closed:
            raise ValueError("training: the app is closing; start it again")
        if self.running and self._last is not None:
            raise ValueError(f"training: {self._last.run.name} is under way; stop it first, or wait until it is done")

    def _spawn(self, run: Path, *flags: str) -> None:
        before = self._last
        since = time.time()
        with open(run / LOG, "wb") as log:
            process = spawn(run / CONFIG, *flags, stdout=log, stderr=subprocess.STDOUT)
        self._last = _Start(process, run, 1 if before is None else before.number + 1, since)
        if before is not None:
            end(before.process, grace=0)  # ended already; its pipe is closed


def _has_learnt(run: Path) -> bool:
    return _has_checkpoints(run) or (run / ADAPTER).exists()


def _has_checkpoints(run: Path) -> bool:
    recover(run / "checkpoints")
    return any(run.glob("checkpoints/step-*"))


def _phase(code: int | None, *, stopped: bool) -> str:
    if code is None:
        return "stopping" if stopped else "running"
    if code == 0:
        return "done"
    return "stopped" if stopped or code == _STOPPED else "failed"


def _why(run: Path, code: int) -> str:
    """Why a run failed: what its log says, and what it could not say."""
    reason = last_reason(run / LOG) or "it wrote nothing"
    if code < 0:
        guess = ", perhaps for want of memory" if code == -9 else ""
        reason = f"killed by signal {-code}{guess}; its last line: {last_line(run / LOG) or 'none'}"
    try:
        full = shutil.disk_usage(run).free < _FULL_BYTES
    except OSError:
        return f"its folder was removed; {reason}"
    return f"the disk of {run} is full; {reason}" if full else reason
