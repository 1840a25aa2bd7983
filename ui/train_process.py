"""The trainer as a process of its own: one at a time, ended with the app, its last words kept.

A process, not a thread: drawing stays quick beside it, a crash leaves the app alone, and stopping it always works.
"""

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.storage import write_atomically
from dora_diffusion.training.checkpoint import ADAPTER
from dora_diffusion.training.config import TrainConfig
from ui.train_runs import CONFIG, LOG, run_config

GRACE_SECONDS = 8.0
PLAN_SECONDS = 300.0
_TAIL_BYTES = 8192
_NICENESS = 5


@dataclass(frozen=True)
class TrainState:
    """What the trainer is at.

    Attributes:
        run: name of the run folder; None before the first start.
        phase: 'idle', 'running', 'done', 'stopped' or 'failed'.
        message: the last line it wrote; why it failed.
    """

    run: str | None = None
    phase: str = "idle"
    message: str = ""


class Trainer:
    """Runs `dora-diffusion train` for one run folder after another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._run: Path | None = None
        self._stopped = False
        self._closed = False
        atexit.register(self.close)

    @property
    def running(self) -> bool:
        """Whether a training run is under way."""
        return self._process is not None and self._process.poll() is None

    def start(self, config: TrainConfig) -> Path:
        """Train anew; returns the run folder.

        Raises:
            ValueError: a run is under way, or the folder holds what an earlier one learnt.
        """
        with self._lock:
            self._refuse_second()
            run = config.output_dir
            if any(run.glob("checkpoints/step-*")) or (run / ADAPTER).exists():
                raise ValueError(f"{run.name}: there is such a run already; resume it, or choose another name")
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
            self._spawn(run, "--resume", "latest")

    def stop(self) -> None:
        """Interrupt the trainer; kill it and all that it started when it does not end in time."""
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                return
            self._stopped = True
            _signal_group(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
            _signal_group(process, signal.SIGKILL)
            process.wait()

    def close(self) -> None:
        """End it with the app; nothing can be started afterwards."""
        self._closed = True
        self.stop()
        atexit.unregister(self.close)

    def state(self) -> TrainState:
        """What it is at now."""
        process, run = self._process, self._run
        if process is None or run is None:
            return TrainState()
        code, message = process.poll(), last_line(run / LOG)
        if code is None:
            return TrainState(run.name, "running", message)
        if code == 0:
            return TrainState(run.name, "done", message)
        if self._stopped:
            return TrainState(run.name, "stopped", message)
        if code < 0:
            message = f"killed by signal {-code}, perhaps for want of memory; its last line: {message}"
        return TrainState(run.name, "failed", message)

    def _refuse_second(self) -> None:
        if self._closed:
            raise ValueError("training: the app is closing; start it again")
        if self.running and self._run is not None:
            raise ValueError(f"training: {self._run.name} is under way; stop it first, or wait until it is done")

    def _spawn(self, run: Path, *flags: str) -> None:
        self._stopped = False
        self._run = run
        with open(run / LOG, "wb") as log:
            self._process = subprocess.Popen(
                _command(run / CONFIG, *flags),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
            )
        with contextlib.suppress(OSError):  # ended already
            os.setpriority(os.PRIO_PROCESS, self._process.pid, _NICENESS)


def plan(config: TrainConfig) -> str:
    """What a run would do and need, by `train --dry-run`: memory, sizes, steps; nothing is trained.

    Raises:
        ValueError: the run itself would be refused; its one line.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / CONFIG
        write_atomically(file, config.to_yaml().encode())
        command = _command(file, "--dry-run")
        try:
            done = subprocess.run(command, capture_output=True, timeout=PLAN_SECONDS, env=_environment(), check=False)
        except subprocess.TimeoutExpired:
            raise ValueError(f"plan: not known after {PLAN_SECONDS:.0f} s; try a smaller base") from None
    if done.returncode:
        raise ValueError(_newest_line(done.stderr))
    return done.stdout.decode(errors="replace").strip()


def last_line(log: Path) -> str:
    """The last line of a log that is not blank; of a progress bar, its newest state."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            return _newest_line(file.read())
    except OSError:
        return ""


def _newest_line(output: bytes) -> str:
    lines = output.decode(errors="replace").replace("\r", "\n").splitlines()
    newest = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
    return newest.removeprefix("dora-diffusion: ")[:500]


def _command(config: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "dora_diffusion.cli", "train", str(config.resolve()), *flags]


def _environment() -> dict[str, str]:
    """Half of the cores, so that drawing has the others; what the user has set stays."""
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    limits = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    return limits | dict(os.environ) | {"PYTHONUNBUFFERED": "1"}


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To the trainer and all that it started; its group has its own number, for it began a session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
