"""What looks at a run from outside: the validation loss and previews, when they are due."""

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from accelerate import Accelerator

from dora_diffusion.functional.objectives import Objective
from dora_diffusion.training.base.trainable import TrainablePipeline
from dora_diffusion.training.config import PreviewConfig, ValidationConfig
from dora_diffusion.training.data.batches import BatchSource, step_seed
from dora_diffusion.training.data.examples import Example
from dora_diffusion.training.run.previews import draw_previews, save_previews
from dora_diffusion.training.step.training_step import TrainingStep


def due(step: int, every: int, last: int) -> bool:
    """Every so many steps, and at the end; `every` 0 means only at the end."""
    return step == last or (every > 0 and step % every == 0)


class Validation:
    """The mean loss on some examples at noises and timesteps that never change, so that runs compare.

    It is measured by `Objectives.measuring`, without the section `loss` that is trained by: a Huber loss, an offset or
    half of the timesteps would make it a number of another kind, and hide what a run loses where it does not train.

    Attributes:
        losses: (step, loss) pairs so far.
    """

    def __init__(
        self,
        settings: ValidationConfig,
        step: TrainingStep,
        source: BatchSource,
        examples: Sequence[Example],
        *,
        objective_of: Callable[[tuple[int, int]], Objective],
    ) -> None:
        self._settings, self._step, self._source, self._examples = settings, step, source, examples
        self._objective_of = objective_of
        self.losses: list[tuple[int, float]] = []
        source.keep_captions(example.caption for example in examples)

    def is_due(self, step: int, last: int) -> bool:
        """Before the first step, every so many, and after the last."""
        return step == 0 or due(step, self._settings.every, last)

    def measure(self, step: int, trainable: TrainablePipeline) -> float:
        """Measure, and note it as the loss after so many steps."""
        with trainable.drawing():
            losses = [self._loss(index, repeat) for index in self._indices() for repeat in self._repeats()]
        mean = sum(losses) / len(losses)
        self.losses.append((step, mean))
        return mean

    def _indices(self) -> range:
        return range(len(self._examples))

    def _repeats(self) -> range:
        return range(self._settings.repeats)

    def _loss(self, index: int, repeat: int) -> float:
        seed = step_seed(0, index * 1000 + repeat, 3)
        shown = self._source.measured(self._examples[index], Random(seed), place=f"measured {index}/{repeat}")
        batch = self._source.batch_of([shown])
        return self._step.loss(batch, seed=seed, objective=self._objective_of(batch.size)).item()


class Watchers:
    """The validation loss and the previews of a run."""

    def __init__(
        self,
        accelerator: Accelerator,
        trainable: TrainablePipeline,
        validation: Validation,
        preview: PreviewConfig,
        *,
        samples: Path,
        last: int,
    ) -> None:
        self._accelerator, self._trainable, self._validation = accelerator, trainable, validation
        self._preview, self._samples, self._last = preview, samples, last

    def is_due(self, step: int) -> bool:
        """Whether anything is due after so many steps, in this process."""
        return self._validation.is_due(step, self._last) or self._draws(step)

    def _draws(self, step: int) -> bool:
        first_or_due = step == 0 or due(step, self._preview.every, self._last)
        return bool(self._preview.prompts) and first_or_due and self._accelerator.is_main_process

    def watch(self, step: int) -> None:
        """What is due after so many steps."""
        if self._validation.is_due(step, self._last):
            self._accelerator.log({"loss/validation": self._validation.measure(step, self._trainable)}, step=step)
        if self._draws(step):
            save_previews(draw_previews(self._trainable, self._preview), self._samples, step=step)
