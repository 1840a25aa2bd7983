"""Training: sample -> noise -> predict -> loss, on accelerate, in a run folder that can be resumed bit for bit."""

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from tqdm import tqdm

from dora_diffusion.families import family_of_pipeline, pixel_multiple
from dora_diffusion.formats import save_adapter
from dora_diffusion.functional.objectives import Objective, weighted_squared_error
from dora_diffusion.pipelines.textual_inversion import save_words
from dora_diffusion.state import AdapterState
from dora_diffusion.training.base.trainable import (
    PRECISIONS,
    RateSchedule,
    TrainablePipeline,
    adapter_metadata,
    build_optimizer,
    load_base,
    picture_size,
    prepare_trainable,
)
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.batches import Batch, BatchSource, step_seed
from dora_diffusion.training.data.examples import Example, check_words, checked_examples
from dora_diffusion.training.run import checkpoint
from dora_diffusion.training.run.card import run_card
from dora_diffusion.training.run.previews import draw_previews, save_previews, save_strip
from dora_diffusion.training.run.signals import StopRequest, stop_requests
from dora_diffusion.training.step.objective import objective_of
from dora_diffusion.training.step.priors import ensure_class_examples
from dora_diffusion.utils.atomic import recover, write_atomically


class TrainingDiverged(ValueError):
    """The loss is no longer a finite number."""


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


def train(config: TrainConfig, *, resume: str | None = None) -> TrainResult:
    """Train an adapter as `config` says and write its run folder.

    Args:
        config: checked settings.
        resume: "latest" goes on from the newest valid checkpoint of the run folder; None starts anew.

    Raises:
        ValueError: data, settings or checkpoint are not usable; one line that says which and how to mend it.
        KeyboardInterrupt: Ctrl+C, SIGTERM or SIGHUP came; after the step that was under way, and a checkpoint of it.

    Examples:
        ```python
        import dora_diffusion as dd

        config = dd.TrainConfig.from_yaml("subject.yaml")
        result = dd.train(config)
        print(f"{result.steps} steps, wrote {result.adapter}")
        ```
    """
    if resume not in (None, "latest"):
        raise ValueError(f"resume={resume!r}: expected 'latest'")
    folder = config.output_dir
    recover(folder / "checkpoints")
    if resume is None and any(folder.glob("checkpoints/step-*")):
        raise ValueError(
            f"{folder}: holds checkpoints of an earlier run; resume it with --resume latest or choose another"
        )
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    accelerator = Accelerator(
        mixed_precision=config.optim.mixed_precision, log_with="tensorboard", project_dir=str(folder / "logs")
    )
    instances, held_out, own_classes = checked_examples(config.data, seed=config.optim.seed)
    check_words(config.words.starts, instances)
    pipe = load_base(config.model, PRECISIONS[config.optim.mixed_precision], accelerator.device, config.base)
    objective = _objective(pipe, config)  # raises for a scheduler that cannot be trained, before anything is drawn
    with accelerator.main_process_first():  # one process draws the class images, the others find them
        classes = [*own_classes, *ensure_class_examples(pipe, config)]
    trainable = prepare_trainable(pipe, config)
    try:
        return _Run(config, accelerator, trainable, objective, instances, classes, held_out).go(resume is not None)
    finally:
        trainable.eject()


class _Run:
    """One training run: its parts, and the loop over them."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        trainable: TrainablePipeline,
        objective: Objective,
        instances: Sequence[Example],
        classes: Sequence[Example],
        held_out: Sequence[Example],
    ) -> None:
        self.config, self.accelerator, self.trainable = config, accelerator, trainable
        self.folder = config.output_dir
        size = picture_size(trainable.pipe, trainable.family, config.data.resolution)
        self.source = BatchSource(trainable, config, size, instances=instances, classes=classes)
        self.watched = list(held_out or instances)
        self.source.keep_captions(example.caption for example in self.watched)
        self.objective = objective
        self.optimizer = build_optimizer(trainable, config.optim, config.words)
        self.rates = RateSchedule(self.optimizer, config.optim)
        for injection in trainable.injections.values():
            injection.keep_norms()
        self.prepared = accelerator.prepare_optimizer(self.optimizer)
        self.validation: list[tuple[int, float]] = []
        self.state = checkpoint.TrainingState(
            trainable.named_tensors(), self.optimizer, accelerator.scaler, accelerator.num_processes, self.validation
        )

    def go(self, resume: bool) -> TrainResult:
        """Train to the last step, writing previews, checkpoints and logs on the way."""
        done = checkpoint.resume(self.state, self.config, folder=self.folder / "checkpoints") if resume else 0
        if self.accelerator.is_main_process:
            write_atomically(self.folder / "config.yaml", self.config.to_yaml().encode())
        self.accelerator.init_trackers("run")
        if done == 0:
            self._watch(0)
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
                rate = self.rates.set(step)
                loss = self._optimise(step)
                bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.1e}", refresh=False)
                self.accelerator.log({"loss/train": loss, "learning_rate": rate}, step=step + 1)
                stops = stop.asked and step + 1 < steps  # after the last step, only files are left to write
                if not stops:  # previews may take longer than whoever asked is ready to wait
                    self._watch(step + 1)
                    stops = stop.asked and step + 1 < steps
                if leads and (stops or _due(step + 1, self.config.checkpoint.every, steps)):
                    folder, adapter = self.folder / "checkpoints", self._adapter(step + 1)
                    checkpoint.save(self.state, self.config, step=step + 1, folder=folder, adapter=adapter)
                if stops:
                    raise KeyboardInterrupt

    def _optimise(self, step: int) -> float:
        """One optimiser step over its micro-batches; returns the mean loss."""
        optim, ranks = self.config.optim, self.accelerator.num_processes
        total = 0.0
        for micro in range(optim.gradient_accumulation):
            index = (step * optim.gradient_accumulation + micro) * ranks + self.accelerator.process_index
            torch.manual_seed(step_seed(optim.seed, index, 0))  # the layers' dropout draws from the global generator
            batch = self.source.batch_at(index)
            loss = self._loss(batch, seed=step_seed(optim.seed, index, 2))
            self._refuse_divergence(step, "loss", loss.detach(), batch)
            self.accelerator.backward(loss / optim.gradient_accumulation)
            total += loss.item() / optim.gradient_accumulation
        if ranks > 1:
            for parameter in self.trainable.parameters():
                if parameter.grad is not None:  # a text encoder's last layer, where the pipeline reads an earlier one
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        self.rates.drop_ended_gradients(step)
        norm = self.accelerator.clip_grad_norm_(self.trainable.parameters(), optim.max_grad_norm or math.inf)
        if self.accelerator.scaler is None:  # fp16's scaler skips such a step by itself
            self._refuse_divergence(step, "gradient", norm, batch)
        self.prepared.step()
        self.prepared.zero_grad()
        return total

    def _refuse_divergence(self, step: int, what: str, value: Tensor, batch: Batch) -> None:
        """Stop every process before a step that would spoil the adapter."""
        if bool(torch.isfinite(self.accelerator.gather(value.reshape(1))).all()):
            return
        raise TrainingDiverged(
            f"step {step + 1}: the {what} is {value.item()} on {', '.join(batch.names)}; lower the learning rate. "
            f"Checkpoints in {self.folder / 'checkpoints'} are from before"
        )

    def _loss(self, batch: Batch, *, seed: int) -> Tensor:
        """Sample a noise and a timestep for each latent, noise it, predict, compare."""
        generator = torch.Generator().manual_seed(seed)
        latents = batch.latents.float()
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        timesteps = self.objective.timesteps(len(latents), generator).to(latents.device)
        noisy = self.objective.add_noise(latents, noise, timesteps)
        dtype = PRECISIONS[self.config.optim.mixed_precision]
        with self.accelerator.autocast():
            predicted = self.trainable.family.predict(
                self.trainable.denoiser, noisy.to(dtype), timesteps, batch.conditioning, batch.frames
            )
        goal = self.objective.target(latents, noise, timesteps)
        return weighted_squared_error(predicted, goal, batch.weights * self.objective.weights(timesteps))

    def _watch(self, step: int) -> None:
        """Validation loss and previews when they are due."""
        steps = self.config.optim.steps
        if step == 0 or _due(step, self.config.validation.every, steps):
            loss = self._validation_loss()
            self.validation.append((step, loss))
            self.accelerator.log({"loss/validation": loss}, step=step)
        preview = self.config.preview
        first_or_due = step == 0 or _due(step, preview.every, steps)
        if preview.prompts and first_or_due and self.accelerator.is_main_process:
            save_previews(draw_previews(self.trainable, preview), self.folder / "samples", step=step)

    def _validation_loss(self) -> float:
        """Mean loss on the watched examples at noises and timesteps that never change, so that runs compare."""
        losses = []
        with self.trainable.drawing():
            for index, example in enumerate(self.watched):
                for repeat in range(self.config.validation.repeats):
                    seed = step_seed(0, index * 1000 + repeat, 3)
                    batch = self.source.batch_of([example], [example.caption], Random(seed), weights=[1.0])
                    losses.append(self._loss(batch, seed=seed).item())
        return sum(losses) / len(losses)

    def _adapter(self, step: int) -> AdapterState | None:
        """What is learnt after so many steps, as a file holds it; None when new words are learnt alone."""
        if not self.trainable.injections:
            return None
        return self.trainable.adapter(adapter_metadata(self.config, self.trainable.family, step=step))

    def _finish(self) -> TrainResult:
        learnt = self._adapter(self.config.optim.steps)
        adapter = self.folder / checkpoint.ADAPTER if learnt is not None else None
        words: list[Path] = []
        if self.accelerator.is_main_process:
            if learnt is not None and adapter is not None:
                save_adapter(learnt, adapter)
            if self.trainable.words is not None:
                words = save_words(self.trainable.words.state(), self.folder / "words")
            save_strip(self.folder / "samples")
            write_atomically(self.folder / "validation.json", json.dumps(self.validation).encode())
            write_atomically(self.folder / "README.md", run_card(self.config, self.validation, words).encode())
        self.accelerator.wait_for_everyone()
        return TrainResult(adapter, tuple(words), self.config.optim.steps, tuple(self.validation))


def _due(step: int, every: int, last: int) -> bool:
    """Every so many steps, and at the end; `every` 0 means only at the end."""
    return step == last or (every > 0 and step % every == 0)


def _objective(pipe: Any, config: TrainConfig) -> Objective:
    """The base's objective for pictures of the size that they are trained at."""
    family = family_of_pipeline(pipe)
    width, height = picture_size(pipe, family, config.data.resolution)
    multiple = pixel_multiple(pipe, family)
    return objective_of(pipe, config, tokens=(width // multiple) * (height // multiple))
