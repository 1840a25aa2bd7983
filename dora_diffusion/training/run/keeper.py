"""What a run writes of what it learns: its checkpoints, and at its end its files."""

from dora_diffusion.state import AdapterState
from dora_diffusion.training.base.trainable import TrainablePipeline
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.concepts import Split
from dora_diffusion.training.run import checkpoint
from dora_diffusion.training.run.callbacks import Callbacks
from dora_diffusion.training.run.finish import Story, TrainResult, result_of, write_outcome
from dora_diffusion.training.run.launch import Launched
from dora_diffusion.training.run.metadata import adapter_metadata, tool_metadata
from dora_diffusion.training.run.movement import movement
from dora_diffusion.training.run.previews import forget_previews
from dora_diffusion.training.run.standing import Outcome
from dora_diffusion.training.step.average import Average
from dora_diffusion.utils.atomic import is_valid_checkpoint, write_atomically


class Keeper:
    """Writes checkpoints and files of a run, in the process that leads.

    Args:
        config: of the run.
        launched: this process, and the others.
        trainable: what is learnt.
        examples: its pictures.
        state: what checkpoints hold.
        callbacks: that hear of each.
        average: of what is learnt, which files hold in its place.
    """

    def __init__(
        self,
        config: TrainConfig,
        launched: Launched,
        trainable: TrainablePipeline,
        examples: Split,
        *,
        state: checkpoint.TrainingState,
        callbacks: Callbacks,
        average: Average,
    ) -> None:
        self._config, self._trainable, self._examples = config, trainable, examples
        self._accelerator, self._processes = launched.accelerator, launched.processes
        self._state, self._callbacks, self._average = state, callbacks, average
        self._folder = config.output_dir / "checkpoints"

    def resume(self, saved: checkpoint.Saved, *, extends: bool) -> None:
        """Put back what a checkpoint holds."""
        checkpoint.resume(self._state, saved)
        standing = self._state.standing
        best = standing.best
        if best is not None and not is_valid_checkpoint(checkpoint.checkpoint_folder(self._folder, best.step)):
            self._accelerator.print(f"the best checkpoint, of step {best.step}, is no longer whole: it is forgotten")
            standing.best = None
        if extends and (standing.ended_early or saved.step == saved.planned):
            standing.extend(saved.step)

    def begin(self, *, after: int) -> None:
        """Write what the run is, and remove what an earlier start drew after so many steps; -1 for all of it."""
        if self._accelerator.is_main_process:
            write_atomically(self._config.output_dir / "config.yaml", self._config.to_yaml().encode())
            forget_previews(self._config.output_dir / "samples", after=after)

    def checkpoint(self, step: int) -> None:
        """A checkpoint after so many steps."""
        if self._accelerator.is_main_process:
            adapter = self._adapter(step)
            folder = checkpoint.save(self._state, self._config, step=step, folder=self._folder, adapter=adapter)
            self._callbacks.checkpoint(step, folder)

    def finish(self, step: int, *, is_held_out: bool) -> TrainResult:
        """The files of a run that has come to its end; `is_held_out`: whether what was measured was not trained."""
        best, losses = self._state.standing.best, tuple(self._state.validation)
        outcome = Outcome(step, losses, best, self._state.standing.ended_early, is_held_out)
        if self._accelerator.is_main_process:
            taken = step
            if best is not None and self._config.checkpoint.final == "best":
                taken = best.step
                folder = checkpoint.checkpoint_folder(self._folder, taken)
                checkpoint.put_back(self._state, folder)
            learnt = self._adapter(taken)
            with self._average.shown():
                result = write_outcome(self._config, learnt, self._trainable, outcome, self._story())
        else:
            if self._processes.in_step:  # which the report asks of the base that all keep together
                movement(self._trainable)
            adapter = self._config.output_dir / checkpoint.ADAPTER if self._trainable.injections else None
            result = result_of(outcome, adapter)
        return result

    def _adapter(self, step: int) -> AdapterState | None:
        """What is learnt after so many steps, as a file holds it; None when new words are learnt alone."""
        if not self._trainable.injections:
            return None
        config, trainable = self._config, self._trainable
        own = adapter_metadata(config, trainable.family, step=step, below=trainable.below)
        metadata = tool_metadata(config, trainable.pipe, self._examples, step=step) | own
        with self._average.shown():
            return trainable.adapter(metadata)

    def _story(self) -> Story:
        history, guard = self._state.history, self._state.guard
        assert history is not None and guard is not None
        return Story(self._examples, history, guard.counts)
