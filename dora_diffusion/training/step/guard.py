"""The guard: what happens when a step goes wrong.

A step whose loss or gradient is no finite number, or whose gradient is many times as long as usual, is skipped: nothing
moves. After several in a row the last good state comes back, and the run goes on with the next pictures; after several
such restores it stops.

Losses tell little of a single step (they differ tenfold between timesteps), so it is the gradient's length that is
compared, with the median of the last good steps'. All that the guard knows is a function of the run's history and lies
in its checkpoints, so that a resumed run is guarded as the uninterrupted one.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from dora_diffusion.training.config import GuardConfig
from dora_diffusion.utils.optimizer_state import OptimizerState, group_settings, load_optimizer_state, optimizer_state

Verdict = Literal["skipped", "restored", "stopped"]


class TrainingDiverged(ValueError):
    """Steps go wrong however often the last good state is put back."""


@dataclass(frozen=True)
class Wrong:
    """What is wrong with a step.

    Attributes:
        what: the loss or the gradient, and its value, in words.
        verdict: what is done about it.
    """

    what: str
    verdict: Verdict


class Guard:
    """Judges steps, and keeps the last good state in main memory.

    Args:
        settings: how much is borne.
        tensors: what is trained, by name; filled in place when the last good state comes back.
        optimizer: over them.
    """

    def __init__(self, settings: GuardConfig, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        self._settings, self._trained, self._optimizer = settings, tensors, optimizer
        self._norms: deque[float] = deque(maxlen=settings.window)
        self._in_a_row = self._restores = self._skips = 0
        self._good: dict[str, Tensor] = {}
        self._told = group_settings(optimizer)
        self._values: dict[str, Any] = {}

    @property
    def counts(self) -> dict[str, int]:
        """How many steps were skipped, and how often the last good state came back."""
        return {"guard/skipped": self._skips, "guard/restored": self._restores}

    def judge(self, loss: float, norm: float) -> Wrong | None:
        """What is wrong with a step of this loss and this length of its gradient; None when it may be taken."""
        if not math.isfinite(loss):
            return self._wrong(f"the loss is {loss}")
        if not math.isfinite(norm):
            return self._wrong(f"the gradient is {norm}")
        usual, factor = self._usual(), self._settings.spike
        if factor is not None and usual is not None and norm > factor * usual:
            return self._wrong(f"the gradient is {norm:.3g}, {norm / usual:.0f} times the usual {usual:.3g}")
        return None

    def passed(self, step: int, norm: float) -> None:
        """A step was found good and is about to move what is trained: its state before that is known to be good."""
        if self._settings.restores and (not self._good or step % self._settings.every == 0):
            self._keep()
        self._norms.append(norm)
        self._in_a_row = 0

    def _usual(self) -> float | None:
        """The median of the last good gradients; None while they are too few to tell."""
        if len(self._norms) < self._settings.window // 2:
            return None
        return median(self._norms)

    def _wrong(self, what: str) -> Wrong:
        self._skips += 1
        self._in_a_row += 1
        if self._in_a_row < self._settings.skips:
            return Wrong(what, "skipped")
        if self._restores >= self._settings.restores or not self._good:
            return Wrong(what, "stopped")
        self._in_a_row = 0
        self._restores += 1
        self._put_back()
        return Wrong(what, "restored")

    @torch.no_grad()
    def _keep(self) -> None:
        """Copy what is trained and the optimiser's state."""
        state = optimizer_state(self._optimizer, told=self._told)
        parts = {"trained": self._trained, "optimizer": state.tensors}
        self._values = dict(state.values)
        self._good = {
            f"{part}/{name}": tensor.detach().to("cpu", copy=True)
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }

    @torch.no_grad()
    def _put_back(self) -> None:
        """The last good state, in place of the present one; the gradients usual to it are still those."""
        moments = {}
        for key, value in self._good.items():
            part, _, name = key.partition("/")
            if part == "trained":
                self._trained[name].copy_(value)
            else:
                moments[name] = value.clone()
        load_optimizer_state(self._optimizer, OptimizerState(moments, self._values), told=self._told)

    def history(self) -> str:
        """What was borne until now, in words."""
        return (
            f"{self._in_a_row} steps in a row went wrong, after {self._restores} restores of {self._settings.restores}"
        )

    def progress(self) -> dict[str, Any]:
        """What a checkpoint holds of it in JSON; `tensors` are the rest."""
        counts = {"in_a_row": self._in_a_row, "restores": self._restores, "skips": self._skips}
        return {"norms": list(self._norms), "values": self._values, **counts}

    def tensors(self) -> dict[str, Tensor]:
        """The last good state, flat; empty before there is one."""
        return self._good

    def resume(self, progress: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what a checkpoint holds; from nothing where it is older than the guard."""
        found = progress or {}
        self._norms = deque(found.get("norms", ()), maxlen=self._settings.window)
        self._in_a_row, self._restores = found.get("in_a_row", 0), found.get("restores", 0)
        self._skips, self._values = found.get("skips", 0), found.get("values", {})
        self._good = dict(tensors) if self._settings.restores else {}
