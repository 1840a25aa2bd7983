"""The loop of a training run: its steps, what watches them, and what it leaves; resumed bit for bit."""

from accelerate import Accelerator
from tqdm import tqdm

from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.missing import PicturesMissing
from dora_diffusion.training.processes import StopRequest
from dora_diffusion.training.run.callbacks import CallbackFailed
from dora_diffusion.training.run.checkpoint import Saved
from dora_diffusion.training.run.exhausted import exhausted, is_exhausted
from dora_diffusion.training.run.finish import TrainResult
from dora_diffusion.training.run.parts import Parts
from dora_diffusion.training.run.signals import stop_requests
from dora_diffusion.training.run.trackers import start_trackers
from dora_diffusion.training.run.validation import due
from dora_diffusion.utils.images import UnreadablePicture


class Run:
    """The loop over a run's parts."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, parts: Parts) -> None:
        self.config, self.accelerator, self.processes = config, accelerator, parts.processes
        self.source, self.step, self.history = parts.source, parts.step, parts.history
        self.validation, self.standing = parts.validation, parts.standing
        self.watchers, self.keeper, self.callbacks = parts.watchers, parts.keeper, parts.callbacks

    def go(self, saved: Saved | None, *, extends: bool = False) -> TrainResult:
        """Train to the last step, from a checkpoint if one is given, writing previews, checkpoints and logs."""
        done = 0 if saved is None else saved.step
        if saved is not None:
            self.keeper.resume(saved, extends=extends)
        self.keeper.begin(after=-1 if saved is None else done)
        start_trackers(self.accelerator, self.config)
        self.source.prepare(index for step in self._steps_after(done) for index in self.step.micro_batches(step))
        self.processes.meet("prepared")
        self._look(done)
        with stop_requests(by_all=self.processes.count > 1) as stop:
            self.step.stop = stop
            done = self._steps(done, stop)
        result = self.keeper.finish(done, is_held_out=self.validation.is_held_out)
        self._part("finished")
        self.accelerator.end_training()  # ends the process group too, so nothing may wait for another after it
        self.callbacks.end(result)
        return result

    def _steps_after(self, done: int) -> range:
        """Those that are still to be taken."""
        return range(done, done if self.standing.ended_early else self.config.optim.steps)

    def _look(self, done: int) -> None:
        """See what is due before the first step, and what a stop had left unseen after the last one."""
        known = len(self.validation.losses)
        self.watchers.watch(done)
        if done and len(self.validation.losses) > known:
            self.keeper.checkpoint(done)
        self.processes.meet(f"looked at {done}")

    def _part(self, place: str) -> None:
        """Wait for one another for the last time: the store may be of a process that ends."""
        self.processes.meet(place)
        self.accelerator.wait_for_everyone()
        self.accelerator.state.destroy_process_group()  # or it would be torn at the end, by whoever ends first

    def _steps(self, done: int, stop: StopRequest) -> int:
        """The steps after the first `done`; returns how many are done at the end.

        Raises:
            KeyboardInterrupt: a stop was asked for; there is a checkpoint then.
        """
        steps, leads = self.config.optim.steps, self.accelerator.is_main_process
        with tqdm(self._steps_after(done), initial=done, total=steps, desc="training", disable=not leads) as bar:
            for step in bar:
                rate = self.step.rates.set(step)
                loss, done = self._take(step), step + 1
                self.history.add(done, loss, rate)
                bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.1e}", refresh=False)
                self.accelerator.log({"loss/train": loss, "learning_rate": rate}, step=done)
                self._heed(stop, done, loss, rate)
                if self.standing.ended_early:
                    break
        return done

    def _take(self, step: int) -> float:
        """A step; where too many pictures are gone, a checkpoint of those before it."""
        try:
            return self.step.take(step)
        except PicturesMissing:
            if step:
                self.keeper.checkpoint(step)
            self._part(f"stopped before {step}")
            raise
        except RuntimeError as error:
            if not is_exhausted(error):
                raise
            saved = step > 0 and not self.step.moves  # while it moves, parameters are of two steps
            if saved:
                self.keeper.checkpoint(step)
            raise exhausted(error, self.config, doing=f"step {step + 1}", saved=saved) from None

    def _heed(self, stop: StopRequest, done: int, loss: float, rate: float) -> None:
        """All that looks on after a step; a checkpoint, where one is due or this is where the run ends."""
        last = self.config.optim.steps
        try:
            self.callbacks.step(done, loss, rate)
            if not stop.stands or done == last:  # previews may take longer than whoever asked is ready to wait
                self.watchers.watch(done)
        except UnreadablePicture:
            self.keeper.checkpoint(done)
            self._part(f"stopped at {done}")
            raise
        except RuntimeError as error:
            if not is_exhausted(error):
                raise
            self.keeper.checkpoint(done)
            raise exhausted(error, self.config, doing=f"previews or measuring after step {done}", saved=True) from None
        except CallbackFailed:  # which the leading process alone has: whoever started the others ends them
            self.keeper.checkpoint(done)
            raise
        ends = self.standing.ended_early
        stops = stop.stands and done < last and not ends  # after the last step, only files are left to write
        if stops or ends or self.standing.is_best(done) or due(done, self.config.checkpoint.every, last):
            self.keeper.checkpoint(done)
            self.processes.meet(f"checkpoint {done}")
        if stops:
            self._part(f"stopped after {done}")
            raise KeyboardInterrupt
