"""A process of `dora-diffusion train` that does not outlive the app: how it is started, and how it is ended."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

_NICENESS = 5


def spawn(config: Path, *flags: str, stdout: IO[bytes], stderr: IO[bytes] | int) -> subprocess.Popen[bytes]:
    """Start it in a session of its own, so that Ctrl+C in the app's terminal is the app's alone.

    Its standard input is a pipe that only this process can write to. However the app ends, killed even, the system
    closes the pipe, and the process ends by itself. `end` it, so that the pipe is closed here, too.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "dora_diffusion.cli", "train", str(config.resolve()), "--end-with-stdin", *flags],
        stdin=subprocess.PIPE,
        bufsize=0,
        stdout=stdout,
        stderr=stderr,
        env=_environment(),
        start_new_session=True,
    )
    with contextlib.suppress(OSError):  # ended already
        os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)
    return process


def end(process: subprocess.Popen[bytes], *, grace: float) -> None:
    """Interrupt it; kill it and all that it started when it has not ended `grace` seconds later."""
    if process.poll() is None:
        if grace:
            _signal_group(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        _signal_group(process, signal.SIGKILL)
        process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To the process and all that it started; its group has its own number, for it began a session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _environment() -> dict[str, str]:
    """Half of the cores, so that drawing has the others; what the user has set stays."""
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    limits = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    return limits | dict(os.environ) | {"PYTHONUNBUFFERED": "1"}
