"""The loop of a training run: its steps, what watches them, and what it leaves; resumed bit for bit."""

from contextlib import nullcontext

from accelerate import Accelerator
from tqdm import tqdm

from dora_diffusion.state import AdapterState
from dora_diffusion.training.base.trainable import TrainablePipeline
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.batches import BatchSource
from dora_diffusion.training.data.concepts import Split
from dora_diffusion.training.data.missing import PicturesMissing
from dora_diffusion.training.run import checkpoint
from dora_diffusion.training.run.finish import Story, TrainResult, write_outcome
from dora_diffusion.training.run.history import History
from dora_diffusion.training.run.identity import Identity
from dora_diffusion.training.run.metadata import adapter_metadata, tool_metadata
from dora_diffusion.training.run.previews import forget_previews
from dora_diffusion.training.run.signals import StopRequest, stop_requests
from dora_diffusion.training.run.watchers import Validation, Watchers, due
from dora_diffusion.training.step.average import average_of
from dora_diffusion.training.step.guard import Guard
from dora_diffusion.training.step.objective import Objectives
from dora_diffusion.training.step.optimisers import build_optimizer, limit_weight_norms
from dora_diffusion.training.step.training_step import TrainingStep
from dora_diffusion.utils.atomic import write_atomically
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
        examples: Split,
        identity: Identity,
    ) -> None:
        self.config, self.accelerator, self.trainable, self.examples = config, accelerator, trainable, examples
        self.folder = config.output_dir
        self.source = source = BatchSource(trainable, config, instances=examples.train, classes=examples.classes)
        optimizer = build_optimizer(trainable, config.optim, config.words)
        limit_weight_norms(optimizer, trainable, config.optim.max_weight_norm)
        self.average = average_of(trainable, optimizer, config.optim)
        moving = {**trainable.named_tensors(), **self.average.tensors}
        self.guard = guard = Guard(config.guard, moving, optimizer)
        self.history = History()
        self.step = TrainingStep(
            config.optim,
            accelerator,
            trainable,
            objectives.of,
            batches_at=source.batches_at,
            optimizer=optimizer,
            guard=guard,
        )
        measured = examples.validation or examples.train
        self.validation = Validation(config.validation, self.step, source, measured, objective_of=objectives.measuring)
        samples, last = self.folder / "samples", config.optim.steps
        self.watchers = Watchers(accelerator, trainable, self.validation, config.preview, samples=samples, last=last)
        self.state = checkpoint.TrainingState(
            moving,
            optimizer,
            accelerator.scaler,
            accelerator.num_processes,
            self.validation.losses,
            guard,
            told=group_settings(optimizer),
            identity=identity,
            history=self.history,
        )

    def go(self, saved: checkpoint.Saved | None) -> TrainResult:
        """Train to the last step, from a checkpoint if one is given, writing previews, checkpoints and logs."""
        done = 0 if saved is None else saved.step
        if saved is not None:
            checkpoint.resume(self.state, saved)
        if self.accelerator.is_main_process:
            write_atomically(self.folder / "config.yaml", self.config.to_yaml().encode())
            forget_previews(self.folder / "samples", after=-1 if saved is None else done)
        self.accelerator.init_trackers("run")
        steps = range(done, self.config.optim.steps)
        self.source.prepare(index for step in steps for index in self.step.micro_batches(step))
        if saved is None:
            self.watchers.watch(0)  # of which any average is the first
        alone = self.accelerator.num_processes == 1  # several would have to agree on the step after which to stop
        with stop_requests() if alone else nullcontext(StopRequest()) as stop:
            self._steps(done, stop)
        result = self._finish()
        self.accelerator.end_training()  # ends the process group too, so nothing may wait for another after it
        return result

    def _steps(self, done: int, stop: StopRequest) -> None:
        """The steps after the first `done`; once a stop is asked for, a checkpoint and KeyboardInterrupt."""
        steps, leads = self.config.optim.steps, self.accelerator.is_main_process
        with tqdm(range(done, steps), initial=done, total=steps, desc="training", disable=not leads) as bar:
            for step in bar:
                rate = self.step.rates.set(step)
                loss = self._take(step)
                self.history.add(step + 1, loss, rate)
                bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.1e}", refresh=False)
                self.accelerator.log({"loss/train": loss, "learning_rate": rate}, step=step + 1)
                stops = stop.asked and step + 1 < steps  # after the last step, only files are left to write
                if not stops:  # previews may take longer than whoever asked is ready to wait
                    self._watch(step + 1)
                    stops = stop.asked and step + 1 < steps
                if stops or due(step + 1, self.config.checkpoint.every, steps):
                    self._save(step + 1)
                if stops:
                    raise KeyboardInterrupt

    def _take(self, step: int) -> float:
        """A step; where too many pictures are gone, a checkpoint of those before it."""
        try:
            return self.step.take(step)
        except PicturesMissing:
            if step:
                self._save(step)
            raise

    def _watch(self, step: int) -> None:
        """What is due after so many steps; where a picture that is measured is gone, a checkpoint."""
        try:
            if self.watchers.is_due(step):
                with self.average.shown():
                    self.watchers.watch(step)
        except UnreadablePicture:
            self._save(step)
            raise

    def _save(self, step: int) -> None:
        """A checkpoint after so many steps, by the process that leads."""
        if self.accelerator.is_main_process:
            folder, adapter = self.folder / "checkpoints", self._adapter(step)
            checkpoint.save(self.state, self.config, step=step, folder=folder, adapter=adapter)

    def _adapter(self, step: int) -> AdapterState | None:
        """What is learnt after so many steps, as a file holds it; None when new words are learnt alone."""
        if not self.trainable.injections:
            return None
        own = adapter_metadata(self.config, self.trainable.family, step=step, below=self.trainable.below)
        metadata = tool_metadata(self.config, self.trainable.pipe, self.examples, step=step) | own
        with self.average.shown():
            return self.trainable.adapter(metadata)

    def _finish(self) -> TrainResult:
        learnt = self._adapter(self.config.optim.steps)
        losses = self.validation.losses
        result = TrainResult(
            None if learnt is None else self.folder / checkpoint.ADAPTER, (), self.config.optim.steps, tuple(losses)
        )
        if self.accelerator.is_main_process:
            story = Story(self.examples, tuple(losses), self.history, self.guard.counts)
            with self.average.shown():
                result = write_outcome(self.config, learnt, self.trainable, story)
        self.accelerator.wait_for_everyone()
        return result
