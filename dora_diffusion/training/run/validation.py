"""The loss on fixed noise and timesteps: of held-out pictures, or how well some that are trained are fitted."""

import json
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import NamedTuple

from dora_diffusion.functional.objectives import Objective
from dora_diffusion.training.base.trainable import TrainablePipeline
from dora_diffusion.training.config import ValidationConfig
from dora_diffusion.training.data.batches import BatchSource, step_seed
from dora_diffusion.training.data.concepts import Split
from dora_diffusion.training.data.examples import Example
from dora_diffusion.training.processes import ALONE, Processes
from dora_diffusion.training.run.standing import Standing
from dora_diffusion.training.step.training_step import TrainingStep
from dora_diffusion.utils.images import UnreadablePicture


class _Measured(NamedTuple):
    """One forward pass.

    Attributes:
        number: of the picture.
        turn: which of the picture's.
        rung: of the ladder of timesteps, and how many it has; None for a timestep that is drawn.
    """

    number: int
    turn: int
    rung: tuple[int, int] | None


class Validation:
    """The mean loss on some examples at noises and timesteps that never change, so that runs compare.

    It is measured by `Objectives.measuring`, without the section `loss` that is trained by: a Huber loss, an offset or
    half of the timesteps would make it a number of another kind, and hide what a run loses where it does not train.

    What it costs is bounded: by default 24 forward passes at a time, whatever the set. A step of one picture takes
    about three of them, so that the 11 measurements of a default run come to less than a tenth of its steps.

    Attributes:
        losses: (step, loss) pairs so far.
        is_held_out: whether the pictures are not trained; otherwise the loss says how well they are fitted, and nothing
            of others.
        standing: what they come to.
    """

    def __init__(
        self,
        settings: ValidationConfig,
        step: TrainingStep,
        source: BatchSource,
        examples: Split,
        *,
        objective_of: Callable[[tuple[int, int]], Objective],
        standing: Standing | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self._settings, self._step, self._source, self._objective_of = settings, step, source, objective_of
        self.is_held_out = bool(examples.validation)
        self._examples = measured_examples(examples, settings)
        self.losses: list[tuple[int, float]] = []
        self.standing, self._processes = standing or Standing(), processes

    @property
    def name(self) -> str:
        """What the loss is logged as."""
        return "loss/validation" if self.is_held_out else "loss/fit"

    @property
    def measured_last(self) -> int | None:
        """After how many steps; None before the first time."""
        return self.losses[-1][0] if self.losses else None

    def is_due(self, step: int, last: int) -> bool:
        """Before the first step, every so many, and after the last."""
        return step == 0 or due(step, self._settings.every, last)

    def measure(self, step: int, trainable: TrainablePipeline) -> float:
        """Measure, and note it as the loss after so many steps."""
        with trainable.drawing():
            losses = self._shared(step)
        mean = sum(losses) / len(losses)
        self.losses.append((step, mean))
        return mean

    def _shared(self, step: int) -> list[float]:
        """The loss of each pass, each process having taken its share: the same numbers in the same order in all."""
        mine, said = self._processes.share_of_forwards(list(self._passes())), ""
        try:
            said = json.dumps([self._loss(one) for one in mine])
        except UnreadablePicture as error:  # told to the others, for none may wait for another
            said = json.dumps(str(error))
        found = [json.loads(one) for one in self._processes.exchange(f"measured at {step}", said)]
        for one in found:
            if isinstance(one, str):
                raise UnreadablePicture(one)
        if self._processes.in_step:
            return list(found[0])
        return [losses[turn] for turn in range(len(found[0])) for losses in found if turn < len(losses)]

    def _passes(self) -> Iterator[_Measured]:
        repeats, rungs = self._settings.repeats, self._settings.timesteps
        for number in range(len(self._examples)):
            for turn in range(repeats or rungs):
                yield _Measured(number, turn, None if repeats else (turn, rungs))

    def _loss(self, one: _Measured) -> float:
        seed = step_seed(0, one.number * 1000 + one.turn, 3)
        place = f"measured {one.number}/{one.turn}"
        shown = self._source.measured(self._examples[one.number], Random(seed), place=place)
        batch = self._source.batch_of([shown])
        return self._step.loss(batch, seed=seed, objective=self._objective_of(batch.size), rung=one.rung).item()


def due(step: int, every: int, last: int) -> bool:
    """Every so many steps, and at the end; `every` 0 means only at the end."""
    return step == last or (every > 0 and step % every == 0)


def measured_examples(examples: Split, settings: ValidationConfig) -> list[Example]:
    """Those that are measured."""
    return spread(examples.validation or examples.train, settings.at_most)


def spread(examples: Sequence[Example], most: int | None) -> list[Example]:
    """At most so many of them, at equal distances, so that each folder has its share."""
    count = len(examples) if most is None else min(most, len(examples))
    return [examples[number * len(examples) // count] for number in range(count)]
