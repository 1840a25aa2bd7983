"""What a run would do and need, told by a process of its own before anything is trained."""

import subprocess
import tempfile
import threading
from pathlib import Path

from dora_diffusion.training.config import TrainConfig
from dora_diffusion.utils.atomic import write_atomically
from ui.train.child import end, spawn
from ui.train.log import last_reason
from ui.train.runs import CONFIG

PLAN_SECONDS = 300.0
_SECONDS_TO_CLEAR = 5.0


class Planner:
    """Runs `train --dry-run`, one at a time; closed, it leaves neither a process nor a file."""

    def __init__(self) -> None:
        self._turn = threading.Lock()  # held as long as there is a folder
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def plan(self, config: TrainConfig) -> str:
        """Memory, sizes and steps of a run; nothing is trained.

        Raises:
            ValueError: the run itself would be refused, in its one line; it takes too long, or the app is closing.
        """
        with self._turn, tempfile.TemporaryDirectory(prefix="dora-plan-") as folder:
            file, printed, errors = (Path(folder) / name for name in (CONFIG, "printed.txt", "errors.txt"))
            write_atomically(file, config.to_yaml().encode())
            with open(printed, "wb") as stdout, open(errors, "wb") as stderr:
                self._process = process = spawn(file, "--dry-run", stdout=stdout, stderr=stderr)
            if self._closed:  # while it was being started
                end(process, grace=0)
            code = _outcome(process)
            if self._closed:
                raise ValueError("plan: the app is closing; start it again")
            if code:
                raise ValueError(last_reason(errors) or f"plan: ended with status {code}; try again")
            return printed.read_text(errors="replace").strip()

    def close(self) -> None:
        """End what is being planned, and wait until its folder is gone; nothing can be planned afterwards."""
        self._closed = True
        if self._process is not None:
            end(self._process, grace=0)
        if self._turn.acquire(timeout=_SECONDS_TO_CLEAR):
            self._turn.release()


def _outcome(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(PLAN_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"plan: not known after {PLAN_SECONDS:.0f} s; try a smaller base") from None
    finally:
        end(process, grace=0)
