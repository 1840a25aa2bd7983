"""What looks at a run from outside, when it is due: the validation loss, how far blocks have moved, previews."""

from collections.abc import Sequence

from accelerate import Accelerator
from PIL import Image

from dora_diffusion.training.base.trainable import TrainablePipeline
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.processes import Processes
from dora_diffusion.training.run.callbacks import Callbacks
from dora_diffusion.training.run.movement import movement
from dora_diffusion.training.run.previews import draw_previews, own_previews, pass_on, preview_path, save_previews
from dora_diffusion.training.run.trackers import log_pictures
from dora_diffusion.training.run.validation import Validation, due
from dora_diffusion.training.step.average import Average


class Watchers:
    """All of a run's.

    Args:
        config: of the run.
        accelerator: of the run, whose trackers hear of what is seen.
        trainable: what is looked at.
        validation: the loss on fixed noise, and what it comes to.
        callbacks: that hear of previews.
        average: of what is trained, which is looked at in its place.
        processes: that share the work.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        trainable: TrainablePipeline,
        *,
        validation: Validation,
        callbacks: Callbacks,
        average: Average,
        processes: Processes,
    ) -> None:
        self._preview, self._logging, self._last = config.preview, config.logging, config.optim.steps
        self._samples = config.output_dir / "samples"
        self._accelerator, self._trainable, self._validation = accelerator, trainable, validation
        self._callbacks, self._average, self._processes = callbacks, average, processes

    def watch(self, step: int) -> None:
        """What is due after so many steps, and has not been seen before the run was stopped there."""
        is_measured = self._validation.is_due(step, self._last) and self._validation.measured_last != step
        leads, every = self._accelerator.is_main_process, self._logging.changes_every
        moves = (leads or self._processes.in_step) and bool(self._logging.trackers)
        moves = moves and (is_measured if every is None else due(step, every, self._last))
        draws = self._draws(step)
        if not (is_measured or moves or draws):
            return
        with self._average.shown():
            if is_measured:
                self._measure(step)
            if moves:
                self._accelerator.log(movement(self._trainable), step=step)
            if draws:
                self._draw(step)

    def _draws(self, step: int) -> bool:
        is_due = step == 0 or due(step, self._preview.every, self._last)
        if not (self._preview.prompts and is_due):
            return False
        return self._processes.told(f"draws at {step}", lambda: not preview_path(self._samples, step).exists())

    def _measure(self, step: int) -> None:
        loss = self._validation.measure(step, self._trainable)
        self._accelerator.log({self._validation.name: loss}, step=step)
        self._validation.standing.judge(self._validation.losses, last=self._last)

    def _draw(self, step: int) -> None:
        """Each process draws its share and waits for the others'; one makes a row of them."""
        own = own_previews(self._preview, self._processes)
        pictures = draw_previews(self._trainable, own) if own.prompts else []
        pictures = pass_on(pictures, self._processes, self._samples, step=step, count=len(self._preview.prompts))
        if self._processes.leads:
            self._show(pictures, step)
        self._processes.meet(f"drawn at {step}")

    def _show(self, pictures: Sequence[Image.Image], step: int) -> None:
        path = save_previews(pictures, self._samples, step=step)
        log_pictures(self._accelerator, pictures, step)
        self._callbacks.preview(step, pictures, path)
