"""The loop of a training run: its steps, what watches them, and what it leaves; resumed bit for bit."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from dora_diffusion.formats import save_adapter
from dora_diffusion.pipelines.textual_inversion import save_words
from dora_diffusion.state import AdapterState
from dora_diffusion.training.base.trainable import TrainablePipeline
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.batches import BatchSource
from dora_diffusion.training.data.examples import Example
from dora_diffusion.training.data.missing import PicturesMissing
from dora_diffusion.training.run import checkpoint
from dora_diffusion.training.run.card import adapter_metadata, run_card
from dora_diffusion.training.run.previews import save_strip
from dora_diffusion.training.run.signals import StopRequest, stop_requests
from dora_diffusion.training.run.watchers import Validation, Watchers, due
from dora_diffusion.training.step.guard import Guard
from dora_diffusion.training.step.objective import Objectives
from dora_diffusion.training.step.optimisers import build_optimizer
from dora_diffusion.training.step.training_step import TrainingStep
from dora_diffusion.utils.atomic import write_atomically
from dora_diffusion.utils.images import UnreadablePicture


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves.

    Attributes:
        adapter: its file; None when new words were learnt alone.
        words: a file for each new word.
        steps: done.
        validation: (step, loss) pairs.
    """

    adapter: Path | None
    words: tuple[Path, ...]
    steps: int
    validation: tuple[tuple[int, float], ...]


class Run:
    """One training run: its parts, and the loop over them."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        trainable: TrainablePipeline,
        objectives: Objectives,
        instances: Sequence[Example],
        classes: Sequence[Example],
        held_out: Sequence[Example],
    ) -> None:
        self.config, self.accelerator, self.trainable = config, accelerator, trainable
        self.folder = config.output_dir
        self.source = source = BatchSource(trainable, config, instances=instances, classes=classes)
        optimizer = build_optimizer(trainable, config.optim, config.words)
        for injection in trainable.injections.values():
            injection.keep_norms()
        guard = Guard(config.guard, trainable.named_tensors(), optimizer)
        self.step = TrainingStep(
            config.optim,
            accelerator,
            trainable,
            objectives.of,
            batches_at=source.batches_at,
            optimizer=optimizer,
            guard=guard,
        )
        self.validation = Validation(config.validation, self.step, source, list(held_out or instances))
        samples, last = self.folder / "samples", config.optim.steps
        self.watchers = Watchers(accelerator, trainable, self.validation, config.preview, samples=samples, last=last)
        below = {each.name: [each.strength, each.sha256] for each in trainable.below}
        self.state = checkpoint.TrainingState(
            trainable.named_tensors(),
            optimizer,
            accelerator.scaler,
            accelerator.num_processes,
            self.validation.losses,
            guard,
            below,
        )

    def go(self, resume: bool) -> TrainResult:
        """Train to the last step, writing previews, checkpoints and logs on the way."""
        done = checkpoint.resume(self.state, self.config, folder=self.folder / "checkpoints") if resume else 0
        if self.accelerator.is_main_process:
            write_atomically(self.folder / "config.yaml", self.config.to_yaml().encode())
        self.accelerator.init_trackers("run")
        steps = range(done, self.config.optim.steps)
        self.source.prepare(index for step in steps for index in self.step.micro_batches(step))
        if done == 0:
            self.watchers.watch(0)
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
        return self.trainable.adapter(
            adapter_metadata(self.config, self.trainable.family, step=step, below=self.trainable.below)
        )

    def _finish(self) -> TrainResult:
        learnt = self._adapter(self.config.optim.steps)
        adapter = self.folder / checkpoint.ADAPTER if learnt is not None else None
        words: list[Path] = []
        losses = self.validation.losses
        if self.accelerator.is_main_process:
            if learnt is not None and adapter is not None:
                save_adapter(learnt, adapter)
            if self.trainable.words is not None:
                words = save_words(self.trainable.words.state(), self.folder / "words")
            save_strip(self.folder / "samples")
            write_atomically(self.folder / "validation.json", json.dumps(losses).encode())
            write_atomically(
                self.folder / "README.md", run_card(self.config, losses, words, self.trainable.below).encode()
            )
        self.accelerator.wait_for_everyone()
        return TrainResult(adapter, tuple(words), self.config.optim.steps, tuple(losses))
