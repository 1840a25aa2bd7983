"""One step: sample -> noise -> predict -> loss over its micro-batches, then the update."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from dora_diffusion.functional.objectives import Objective, weighted_squared_error
from dora_diffusion.training.base.trainable import PRECISIONS, TrainablePipeline
from dora_diffusion.training.config import OptimConfig
from dora_diffusion.training.data.batches import Batch, step_seed
from dora_diffusion.training.step.rates import RateSchedule


class TrainingDiverged(ValueError):
    """The loss is no longer a finite number."""


class TrainingStep:
    """What is done with a step's batches. Everything random is a function of (seed, step).

    Args:
        optim: how it is trained.
        accelerator: of the run.
        trainable: what is trained.
        objective_of: a picture's size -> how its latents are noised, and what the denoiser should say of them.
        batches_at: micro-batch number -> its batches, each of one shape; their shares add up to 1.
        optimizer: over the trained parameters.
    """

    def __init__(
        self,
        optim: OptimConfig,
        accelerator: Accelerator,
        trainable: TrainablePipeline,
        objective_of: Callable[[tuple[int, int]], Objective],
        *,
        batches_at: Callable[[int], Sequence[Batch]],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._optim, self._accelerator, self._trainable = optim, accelerator, trainable
        self._objective_of, self._batches_at = objective_of, batches_at
        self.rates = RateSchedule(optimizer, optim)
        self._optimizer = accelerator.prepare_optimizer(optimizer)

    def take(self, step: int) -> float:
        """One optimiser step over its micro-batches; returns the mean loss."""
        optim, total = self._optim, 0.0
        for index in self.micro_batches(step):
            torch.manual_seed(step_seed(optim.seed, index, 0))  # the layers' dropout draws from the global generator
            for part, batch in enumerate(self._batches_at(index)):
                loss = batch.share * self.loss(batch, seed=step_seed(optim.seed, index, 2 + 2 * part))
                self._refuse_divergence(step, "loss", loss.detach(), batch)
                self._accelerator.backward(loss / optim.gradient_accumulation)
                total += loss.item() / optim.gradient_accumulation
        self._update(step, batch)
        return total

    def micro_batches(self, step: int) -> list[int]:
        """The numbers of this process's micro-batches of a step; several processes take turns."""
        count, ranks = self._optim.gradient_accumulation, self._accelerator.num_processes
        return [(step * count + micro) * ranks + self._accelerator.process_index for micro in range(count)]

    def loss(self, batch: Batch, *, seed: int) -> Tensor:
        """Sample a noise and a timestep for each latent, noise it, predict, compare."""
        generator = torch.Generator().manual_seed(seed)
        objective, latents = self._objective_of(batch.size), batch.latents.float()
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        timesteps = objective.timesteps(len(latents), generator).to(latents.device)
        noisy = objective.add_noise(latents, noise, timesteps)
        with self._accelerator.autocast():
            predicted = self._trainable.family.predict(
                self._trainable.denoiser,
                noisy.to(PRECISIONS[self._optim.mixed_precision]),
                timesteps,
                batch.conditioning,
                batch.frames,
            )
        goal = objective.target(latents, noise, timesteps)
        return weighted_squared_error(predicted, goal, batch.weights * objective.weights(timesteps), batch.masks)

    def _update(self, step: int, batch: Batch) -> None:
        """Average the processes' gradients, cut them, and move; `batch` is named should they not be finite."""
        if self._accelerator.num_processes > 1:
            for parameter in self._trainable.parameters():
                if parameter.grad is not None:  # a text encoder's last layer, where the pipeline reads an earlier one
                    parameter.grad = self._accelerator.reduce(parameter.grad, "mean")
        self.rates.drop_ended_gradients(step)
        longest = self._optim.max_grad_norm or math.inf
        norm = self._accelerator.clip_grad_norm_(self._trainable.parameters(), longest)
        if self._accelerator.scaler is None:  # fp16's scaler skips such a step by itself
            self._refuse_divergence(step, "gradient", norm, batch)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _refuse_divergence(self, step: int, what: str, value: Tensor, batch: Batch) -> None:
        """Stop every process before a step that would spoil the adapter."""
        if bool(torch.isfinite(self._accelerator.gather(value.reshape(1))).all()):
            return
        checkpoints = Path(self._accelerator.project_dir).parent / "checkpoints"
        raise TrainingDiverged(
            f"step {step + 1}: the {what} is {value.item()} on {', '.join(batch.names)}; lower the learning rate. "
            f"Checkpoints in {checkpoints} are from before"
        )
