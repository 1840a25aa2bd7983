"""How a run stands by the loss of its held-out pictures: which checkpoint is the best, and whether it ends early.

All of it is a function of the run's history and lies in its checkpoints, so that a resumed run decides as the
uninterrupted one would have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Losses = Sequence[tuple[int, float]]


class Best(NamedTuple):
    """The checkpoint with the lowest loss."""

    step: int
    loss: float


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        steps: done.
        losses: (step, loss) pairs.
        best: of the checkpoints that are kept; None where none is told apart.
        ended_early: whether it ended before its last step.
        is_held_out: whether the losses are of pictures that were not trained.
    """

    steps: int
    losses: tuple[tuple[int, float], ...]
    best: Best | None = None
    ended_early: bool = False
    is_held_out: bool = True

    def notes(self) -> dict[str, object]:
        """What a manifest says beside steps and hashes; nothing of a run that has only those."""
        best = {} if self.best is None else {"best": {"step": self.best.step, "loss": self.best.loss}}
        return {**best, **({"ended_early": True} if self.ended_early else {})}


class Standing:
    """What the measured losses come to.

    Args:
        keeps_best: whether the best checkpoint is kept.
        patience: after how many measurements without a better one the run ends; None for never.

    Attributes:
        best: of the checkpoints that are kept; None before the first.
        ended_early: whether the run has come to its end before its last step.
    """

    def __init__(self, *, keeps_best: bool = False, patience: int | None = None) -> None:
        self._keeps_best, self._patience = keeps_best, patience
        self._since = 0
        self.best: Best | None = None
        self.ended_early = False

    def judge(self, losses: Losses, *, last: int) -> None:
        """Take the newest measurement in; before the first step there is nothing to keep, or to be patient with."""
        step, loss = losses[-1]
        if self._keeps_best and step > 0 and (self.best is None or loss < self.best.loss):
            self.best = Best(step, loss)
        if self._patience is not None and step < last:
            self.ended_early = without_better(losses, since=self._since) >= self._patience

    def is_best(self, step: int) -> bool:
        """Whether the checkpoint after so many steps is the best so far."""
        return self.best is not None and self.best.step == step

    def progress(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"best": self.best, "since": self._since, "ended_early": self.ended_early}

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint holds."""
        best = progress.get("best") if self._keeps_best else None
        self.best = None if best is None else Best(*best)
        self._since, self.ended_early = progress.get("since", 0), progress.get("ended_early", False)

    def extend(self, step: int) -> None:
        """The run goes on beyond its end, which was after so many steps: patience begins anew."""
        self._since, self.ended_early = step, False


def without_better(losses: Losses, *, since: int) -> int:
    """How many measurements after step `since` came after the best of them."""
    later = [loss for step, loss in losses if step > since]
    return len(later) - 1 - later.index(min(later)) if later else 0
