"""Runs that are killed until they come through, and on full disks; each is compared with one that nothing befell."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.chaos.features import config_of
from benchmarks.chaos.lives import SAVED, SAVING, End, FullDisk, Life
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.utils.atomic import is_valid_checkpoint, recover
from tests.failing_disk import contents

# A run is killed so often at most, then left to come through.
KILLS_A_RUN = 4
_AIMED_AT_SAVES = 0.6  # of all kills: some of these come too late
_SAVE = "while a checkpoint was saved"


@dataclass(frozen=True)
class Reference:
    """A run that nothing befell.

    Attributes:
        files: all that it left, but its logs.
        seconds: that it took.
        save_seconds: that its shortest save took.
        saves: how many there were.
    """

    files: dict[str, Any]
    seconds: float
    save_seconds: float
    saves: int


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        where: 'while a checkpoint was saved', 'before the first checkpoint', 'between checkpoints' or 'after the last'.
        run: which run it was.
    """

    where: str
    run: str


@dataclass(frozen=True)
class Fault:
    """What should not have been.

    Attributes:
        run: which run it was.
        what: in one line.
    """

    run: str
    what: str


class Chaos:
    """Runs in one place, one after another.

    Args:
        folder: with the inputs; the run's folder lies in it, at the same path each time, so that every byte compares.
        pipe: the base, loaded.
        kind: of the runs.
        config: of a run.
    """

    def __init__(self, folder: Path, pipe: Any, kind: str, config: TrainConfig) -> None:
        self._places = (folder / "run", folder / "cache")
        self._run, self._pipe, self._kind, self._config = self._places[0], pipe, kind, config
        self.faults: list[Fault] = []
        self.reference = self._refer()

    def _refer(self) -> Reference:
        begun = time.monotonic()
        life = Life(self._config, self._pipe, resume=False)
        saves: list[float] = []
        for number in range(1, 1000):
            if not life.listen(600, until=lambda said, number=number: said.count(SAVING) >= number):
                break
            saving = time.monotonic()
            life.listen(600, until=lambda said, number=number: said.count(SAVED) >= number)
            saves.append(time.monotonic() - saving)
        end = life.wait()
        if end.fault:
            raise ValueError(f"the run that nothing befell failed: {end.fault}")
        seconds = time.monotonic() - begun
        files = self._left()
        self._forget()
        return Reference(files, seconds, min(saves), len(saves))

    def _left(self) -> dict[str, Any]:
        """All that is in the folders of run and cache, hidden or not, but logs."""
        held = {f"{place.name}/{name}": data for place in self._places for name, data in contents(place).items()}
        return {name: data for name, data in held.items() if not name.startswith("run/logs")}

    def _forget(self) -> None:
        for place in self._places:
            shutil.rmtree(place, ignore_errors=True)

    def kill(self, kills: int, seed: int) -> list[Kill]:
        """Kill runs until there were so many kills, at least half of them during a save."""
        found: list[Kill] = []
        run = 0
        while len(found) < kills or 2 * sum(kill.where == _SAVE for kill in found) < kills:
            found += self._killed_run(f"run {run} ({self._kind})", Random(f"{seed}/{run}"))
            run += 1
            print(f"\r{len(found)} kills of {run} runs, {len(self.faults)} faults", end="", flush=True)
        print()
        return found

    def _killed_run(self, run: str, rng: Random) -> list[Kill]:
        """Kill one run a few times, let it come through, and compare what it left."""
        kills: list[Kill] = []
        for _ in range(KILLS_A_RUN):
            life = Life(self._config, self._pipe, resume=self._has_checkpoint())
            self._await(life, rng)
            end = life.kill()
            if end.fault:
                self.faults.append(Fault(run, end.fault))
            if not end.killed:
                break
            kills.append(Kill(self._where(end), run))
        self._check_end(run, Life(self._config, self._pipe, resume=self._has_checkpoint()).wait())
        return kills

    def _await(self, life: Life, rng: Random) -> None:
        """Wait for the moment to kill at: somewhere in a save that is still to come, or just anywhere."""
        done = max(self._steps(), default=0) // self._config.checkpoint.every
        to_come = max(1, self.reference.saves - done)
        if rng.random() >= _AIMED_AT_SAVES:
            life.listen(rng.uniform(0, self.reference.seconds * to_come / self.reference.saves))
            return
        nth = rng.randint(1, to_come)
        life.listen(600, until=lambda said: said.count(SAVING) >= nth)
        life.listen(rng.uniform(0, self.reference.save_seconds), until=lambda said: said.count(SAVED) >= nth)

    def _where(self, end: End) -> str:
        if end.in_save:
            return _SAVE
        steps = self._steps()
        if not steps:
            return "before the first checkpoint"
        return "after the last checkpoint" if max(steps) == self._config.optim.steps else "between checkpoints"

    def _checkpoints(self) -> Iterator[Path]:
        return (self._run / "checkpoints").glob("step-*")

    def _steps(self) -> list[int]:
        return [int(path.name[5:]) for path in self._checkpoints()]

    def _has_checkpoint(self) -> bool:
        """Whether there is one to go on from; half of one, which a kill must never leave, is a fault."""
        recover(self._run / "checkpoints")
        there = list(self._checkpoints())
        for path in there:
            if not is_valid_checkpoint(path):
                self.faults.append(Fault("a kill", f"{path.name} is not whole"))
        return bool(there)

    def _check_end(self, run: str, end: End) -> None:
        """A run that came through has left, byte for byte, what one that nothing befell leaves, and nothing else."""
        if end.fault:
            self.faults.append(Fault(run, end.fault))
        left, expected = self._left(), self.reference.files
        for name in sorted(left.keys() | expected.keys()):
            if name not in expected:
                self.faults.append(Fault(run, f"{name} was left over"))
            elif left.get(name, b"") != expected[name]:
                self.faults.append(Fault(run, f"{name} is {'missing' if name not in left else 'another'}"))
        self._forget()

    def fill_disk(self) -> list[str]:
        """Let the disk be full from each call that writes on, in turn; the message of each failure.

        Whatever fails, nothing half done stays, and the run goes on from there, once there is room, to the same end.
        """
        messages: list[str] = []
        while True:
            call = len(messages)
            end = Life(self._config, self._pipe, resume=False, prepare=FullDisk(call)).wait()
            if end.fault is None:
                self._check_end(f"disk with room for {call} calls", end)
                print()
                return messages
            messages.append(end.fault)
            self._check_full(call, end.fault)
            again = Life(self._config, self._pipe, resume=self._has_checkpoint()).wait()
            self._check_end(f"disk full at call {call}", again)
            print(f"\r{call + 1} full disks, {len(self.faults)} faults", end="", flush=True)

    def _check_full(self, call: int, message: str) -> None:
        run = f"disk full at call {call}"
        if "No space left on device" not in message or "\n" in message:
            self.faults.append(Fault(run, message))
        hidden = [name for name in self._left() if any(part.startswith(".") for part in Path(name).parts)]
        self.faults += [Fault(run, f"{name} was left over") for name in hidden]


def chaos_of(folder: Path, pipe: Any, kind: str, *, steps: int) -> Chaos:
    """Chaos over runs of a kind and of so many steps."""
    return Chaos(folder, pipe, kind, config_of(folder, kind, steps=steps))
