"""The loop of a training run: its steps, what watches them, and what it leaves; resumed bit for bit."""

from contextlib import nullcontext

from accelerate import Accelerator
from tqdm import tqdm

from dora_diffusion.training.base.trainable import TrainablePipeline
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.batches import BatchSource
from dora_diffusion.training.data.concepts import Split
from dora_diffusion.training.data.missing import PicturesMissing
from dora_diffusion.training.run import checkpoint
from dora_diffusion.training.run.callbacks import CallbackFailed, Callbacks
from dora_diffusion.training.run.finish import TrainResult
from dora_diffusion.training.run.identity import Identity
from dora_diffusion.training.run.keeper import Keeper
from dora_diffusion.training.run.signals import StopRequest, stop_requests
from dora_diffusion.training.run.standing import Standing
from dora_diffusion.training.run.trackers import start_trackers
from dora_diffusion.training.run.validation import Validation, due
from dora_diffusion.training.run.watchers import Watchers
from dora_diffusion.training.step.guard import Guard
from dora_diffusion.training.step.objective import Objectives
from dora_diffusion.training.step.optimisers import build_optimizer
from dora_diffusion.training.step.training_step import TrainingStep
from dora_diffusion.utils.images import UnreadablePicture
from dora_diffusion.utils.optimizer_state import group_settings


class Run:
    """One training run: its parts, and the loop over them."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        trainable: TrainablePipeline,
        objectives: Objectives,
        *,
        examples: Split,
        identity: Identity,
        callbacks: Callbacks,
    ) -> None:
        self.config, self.accelerator, self.callbacks = config, accelerator, callbacks
        self.source = source = BatchSource(trainable, config, instances=examples.train, classes=examples.classes)
        optimizer = build_optimizer(trainable, config.optim, config.words)
        for injection in trainable.injections.values():
            injection.keep_norms()
        tensors = trainable.named_tensors()
        guard = Guard(config.guard, tensors, optimizer)
        self.step = TrainingStep(
            config.optim,
            accelerator,
            trainable,
            objectives.of,
            batches_at=source.batches_at,
            optimizer=optimizer,
            guard=guard,
        )
        self.validation = Validation(config.validation, self.step, source, examples)
        self.standing = Standing(keeps_best=config.checkpoint.keep_best, patience=config.validation.patience)
        self.watchers = Watchers(
            config, accelerator, trainable, validation=self.validation, standing=self.standing, callbacks=callbacks
        )
        state = checkpoint.TrainingState(
            tensors,
            optimizer,
            accelerator.scaler,
            accelerator.num_processes,
            self.validation.losses,
            guard,
            told=group_settings(optimizer),
            identity=identity,
            standing=self.standing,
        )
        self.keeper = Keeper(config, accelerator, trainable, state=state, callbacks=callbacks)

    def go(self, saved: checkpoint.Saved | None, *, extends: bool = False) -> TrainResult:
        """Train to the last step, from a checkpoint if one is given, writing previews, checkpoints and logs."""
        done = 0 if saved is None else saved.step
        if saved is not None:
            self.keeper.resume(saved, extends=extends)
        self.keeper.begin(after=-1 if saved is None else done)
        start_trackers(self.accelerator, self.config)
        self.source.prepare(index for step in self._steps_after(done) for index in self.step.micro_batches(step))
        self._look(done)
        alone = self.accelerator.num_processes == 1  # several would have to agree on the step after which to stop
        with stop_requests() if alone else nullcontext(StopRequest()) as stop:
            done = self._steps(done, stop)
        result = self.keeper.finish(done, is_held_out=self.validation.is_held_out)
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
            raise

    def _heed(self, stop: StopRequest, done: int, loss: float, rate: float) -> None:
        """All that looks on after a step; a checkpoint, where one is due or this is where the run ends."""
        last = self.config.optim.steps
        try:
            self.callbacks.step(done, loss, rate)
            if not stop.asked or done == last:  # previews may take longer than whoever asked is ready to wait
                self.watchers.watch(done)
        except (UnreadablePicture, CallbackFailed):
            self.keeper.checkpoint(done)
            raise
        ends = self.standing.ended_early
        stops = stop.asked and done < last and not ends  # after the last step, only files are left to write
        if stops or ends or self.standing.is_best(done) or due(done, self.config.checkpoint.every, last):
            self.keeper.checkpoint(done)
        if stops:
            raise KeyboardInterrupt
