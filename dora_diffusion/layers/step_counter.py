"""Counts the steps of every torch optimiser of the process, so that what was computed before a step is known as old.

Neither a tensor's `_version` nor its address tells that: fused optimisers and updates through `.data` change neither.
"""

import weakref
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle


class Refreshed(Protocol):
    """What holds something that is good until the next step."""

    def outdated(self) -> None:
        """An optimiser has stepped."""


class StepClock:
    """Runs while somebody listens: one global hook on torch's optimisers, removed with the last listener."""

    def __init__(self) -> None:
        self._steps = 0
        self._told: weakref.WeakSet[Refreshed] = weakref.WeakSet()
        self._listeners = 0
        self._hook: RemovableHandle | None = None

    @property
    def now(self) -> int | None:
        """Optimiser steps so far, or None while nobody listens: then nothing can be known to be fresh."""
        return self._steps if self._hook is not None else None

    def listen(self) -> None:
        """Count from now on."""
        self._listeners += 1
        if self._hook is None:
            self._hook = register_optimizer_step_post_hook(self._tick)

    def leave(self) -> None:
        """Undo one `listen`."""
        self._listeners -= 1
        if self._listeners == 0 and self._hook is not None:
            self._hook.remove()
            self._hook = None

    def tell(self, holder: Refreshed) -> None:
        """Tell it of the next step, once."""
        self._told.add(holder)

    def _tick(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._steps += 1
        for holder in self._told:
            holder.outdated()
        self._told.clear()


CLOCK = StepClock()


def stamp(tensor: torch.Tensor) -> tuple[int, int, int]:
    """What changes when a tensor is replaced, moved or edited in place (but not when edited through `.data`)."""
    try:
        return id(tensor), tensor.data_ptr(), tensor._version
    except RuntimeError:  # quantised wrappers have no address, tensors of inference mode no version
        return id(tensor), 0, 0
