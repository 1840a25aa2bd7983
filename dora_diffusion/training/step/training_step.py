"""One step: sample -> noise -> predict -> loss over its micro-batches, then the update."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from dora_diffusion.functional.objectives import Objective, timestep_ladder, weighted_mean
from dora_diffusion.training.base.trainable import PRECISIONS, TrainablePipeline
from dora_diffusion.training.config import OptimConfig
from dora_diffusion.training.data.batches import Batch, step_seed
from dora_diffusion.training.data.missing import PicturesMissing
from dora_diffusion.training.processes import StopRequest
from dora_diffusion.training.step.guard import Guard, TrainingDiverged, Wrong
from dora_diffusion.training.step.rates import RateSchedule

_NAMED = 8
_WHOLE = 1 - 1e-6  # shares of batches add up to 1 but for their rounding
_DONE = {
    "skipped": "the step is skipped",
    "restored": "the last good state is put back, and the run goes on with the next pictures",
}


@dataclass
class _Taken:
    """What a step's batches came to in this process.

    Attributes:
        losses: of each batch, times its share of its micro-batch, detached.
        names: of each batch's pictures.
        weight: the shares added up: how many micro-batches' samples could be read.
        missing: why the step cannot be taken, when too many pictures are gone.
    """

    losses: list[Tensor] = field(default_factory=list)
    names: list[tuple[str, ...]] = field(default_factory=list)
    weight: float = 0.0
    missing: PicturesMissing | None = None


class TrainingStep:
    """What is done with a step's batches. Everything random is a function of (seed, step).

    Args:
        optim: how it is trained.
        accelerator: of the run.
        trainable: what is trained.
        objective_of: a picture's size -> how its latents are noised, and what the denoiser should say of them.
        batches_at: micro-batch number -> its batches, each of one shape; their shares add up to 1, or to less where
            samples are missing: the mean of a step is over those that there are.
        optimizer: over the trained parameters.
        guard: judges each step before anything moves.

    Attributes:
        rates: the learning rate of each step.
        stop: whether this process was asked to stop; each step tells the others, and it of them.
        moves: whether the optimiser is at work, or was when it failed.
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
        guard: Guard,
    ) -> None:
        self._optim, self._accelerator, self._trainable = optim, accelerator, trainable
        self._objective_of, self._batches_at, self._guard = objective_of, batches_at, guard
        self.rates = RateSchedule(optimizer, optim)
        self._optimizer = accelerator.prepare_optimizer(optimizer)
        self.stop, self.moves = StopRequest(), False

    def take(self, step: int) -> float:
        """One optimiser step over its micro-batches, or none where the guard skips it; returns the mean loss.

        Raises:
            TrainingDiverged: it went wrong once too often; one line that names the pictures.
            PicturesMissing: too many pictures are gone; nothing has moved then.
        """
        taken = _Taken()
        self._trainable.bring_denoiser()
        self._trainable.refresh_norms()
        for index in self.micro_batches(step):
            torch.manual_seed(
                step_seed(self._optim.seed, index, 0)
            )  # the layers' dropout draws from the global generator
            self._backward(index, taken)
        return self._update(step, taken)

    def _backward(self, index: int, taken: _Taken) -> None:
        """Gradients of one micro-batch."""
        try:
            batches = self._batches_at(index)
        except PicturesMissing as missing:  # told to the other processes with the gradients: none may wait for another
            taken.missing = missing
            return
        for part, batch in enumerate(batches):
            loss = batch.share * self.loss(batch, seed=step_seed(self._optim.seed, index, 2 + 2 * part))
            self._accelerator.backward(loss / self._optim.gradient_accumulation)
            taken.losses.append(loss.detach())
            taken.names.append(batch.names)
            taken.weight += batch.share

    def micro_batches(self, step: int) -> list[int]:
        """The numbers of this process's micro-batches of a step; several processes take turns."""
        count, ranks = self._optim.gradient_accumulation, self._accelerator.num_processes
        return [(step * count + micro) * ranks + self._accelerator.process_index for micro in range(count)]

    def loss(
        self, batch: Batch, *, seed: int, objective: Objective | None = None, rung: tuple[int, int] | None = None
    ) -> Tensor:
        """Sample a noise and a timestep for each latent, noise it, predict, compare.

        Args:
            batch: whose share does not count yet.
            seed: of all that is drawn.
            objective: another than that of the run.
            rung: (number, count): the timestep is that of the objective's `timestep_ladder`, and is not drawn.
        """
        generator = torch.Generator().manual_seed(seed)
        objective, latents = objective or self._objective_of(batch.size), batch.latents.float()
        plain = torch.randn(latents.shape, generator=generator).to(latents.device)
        if rung is None:
            timesteps = objective.timesteps(len(latents), generator).to(latents.device)
        else:
            timesteps = timestep_ladder(objective, rung[1])[rung[0]].expand(len(latents)).to(latents.device)
        noise = objective.noise.apply(plain, generator)
        noisy = objective.add_noise(latents, noise.added, timesteps)
        goal = objective.target(latents, noise.aimed_at, timesteps)
        if batch.untrained is not None:
            with self._trainable.base_alone():
                goal = self._predicted(noisy, timesteps, batch.untrained, batch.frames)
        predicted = self._predicted(noisy, timesteps, batch.conditioning, batch.frames)
        errors = objective.errors(predicted, goal, timesteps)
        return weighted_mean(errors, batch.weights * objective.weights(timesteps), batch.masks)

    def _predicted(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], frames: Tensor
    ) -> Tensor:
        """What the denoiser says, as it stands."""
        self._trainable.bring_denoiser()  # captions that a step made up may have taken its place
        with self._accelerator.autocast():
            return self._trainable.family.predict(
                self._trainable.denoiser,
                noisy.to(PRECISIONS[self._accelerator.mixed_precision]),
                timesteps,
                conditioning,
                frames,
            )

    def _update(self, step: int, taken: _Taken) -> float:
        """Average over the processes, cut the gradients, and move, unless the guard finds something wrong."""
        parameters = self._trainable.parameters()
        told = parameters[0].new_tensor([0.0, float(taken.missing is not None)])
        if taken.losses:
            told[0] = torch.stack(taken.losses).sum() / self._optim.gradient_accumulation
        told = self._averaged(parameters, told, taken.weight / self._optim.gradient_accumulation)
        has_samples = any(parameter.grad is not None for parameter in parameters)
        self.rates.drop_ended_gradients(step)
        moves, norm = any(parameter.grad is not None for parameter in parameters), told.new_zeros(1)
        if moves:  # where nothing does, a scaler would have nothing to look at
            norm = self._accelerator.clip_grad_norm_(parameters, self._optim.max_grad_norm or math.inf)
        loss, missing, length = torch.cat([told, norm.to(told).reshape(1)]).tolist()  # the one wait for the device
        if moves and not missing:
            self._move(step, loss, length, taken)
        self._optimizer.zero_grad()
        if missing:
            raise taken.missing or PicturesMissing(f"step {step + 1}: another process misses too many pictures")
        return loss if has_samples else math.nan

    def _averaged(self, parameters: Sequence[nn.Parameter], told: Tensor, weight: float) -> Tensor:
        """The mean of gradients, in place, and of the loss over the samples that all processes could read.

        Args:
            parameters: with their gradients.
            told: the loss, and whether too many pictures are missing.
            weight: which part of this process's samples could be read.
        """
        if self._accelerator.num_processes > 1:
            told, weight = self._reduced(parameters, told, weight)
        if 0 < weight < _WHOLE:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(weight)
            told[0] /= weight
        return told

    def _reduced(self, parameters: Sequence[nn.Parameter], told: Tensor, weight: float) -> tuple[Tensor, float]:
        """The mean over the processes of their gradients, in place, and of what they tell, in one collective.

        One fp32 vector: what is told, the weight of the samples, whether one is asked to stop, which parameters have a
        gradient, and the gradients.
        """
        # a text encoder's last layer has none, where the pipeline reads an earlier one; nor has a step without pictures
        has = [float(parameter.grad is not None) for parameter in parameters]
        known = told.new_tensor([weight, float(self.stop.asked), *has])
        own = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        flat = self._accelerator.reduce(torch.cat([told, known, *(each.flatten() for each in own)]), "mean")
        sizes = [parameter.numel() for parameter in parameters]
        told, known, *pieces = flat.split([len(told), len(known), *sizes])
        weight, asked, *has = known.tolist()
        self.stop.agreed = asked > 0
        for parameter, somewhere, piece in zip(parameters, has, pieces, strict=True):
            parameter.grad = piece.reshape(parameter.shape).to(parameter.dtype) if somewhere else None
        return told, weight

    def _move(self, step: int, loss: float, norm: float, taken: _Taken) -> None:
        """One step of the optimiser, if the guard finds nothing wrong."""
        scaler = self._accelerator.scaler
        # fp16's scaler skips such a step and lowers its scale by itself, until there is nothing left to lower
        is_scalers = scaler is not None and math.isfinite(loss) and not math.isfinite(norm) and scaler.get_scale() > 1
        wrong = None if is_scalers else self._guard.judge(loss, norm)
        if wrong is None and not is_scalers:
            self._guard.passed(step, norm)
            self.moves = True
            self._optimizer.optimizer.step()  # the scaler's own would wait once more to learn what the norm has said
            self.moves = False
        if scaler is not None:  # which has looked at these gradients, and waits to hear that they are done with
            scaler.update()
        if wrong is not None:
            self._tell(step, wrong, taken)

    def _tell(self, step: int, wrong: Wrong, taken: _Taken) -> None:
        """Say what was wrong on which pictures, and what is done; every process gets here, or none."""
        sizes = torch.stack(taken.losses).isfinite().tolist() if taken.losses else []
        to_blame = [names for names, is_finite in zip(taken.names, sizes, strict=True) if not is_finite] or taken.names
        names = list(dict.fromkeys(gather_object([name for batch in to_blame for name in batch])))
        shown = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        line = f"step {step + 1}: {wrong.what} on {shown}"
        self._accelerator.log(self._guard.counts, step=step + 1)
        if wrong.verdict == "stopped":
            checkpoints = Path(self._accelerator.project_dir).parent / "checkpoints"
            raise TrainingDiverged(
                f"{line}; {self._guard.history()}; lower the learning rate. "
                f"Checkpoints in {checkpoints} are from before"
            )
        if self._accelerator.is_main_process:
            tqdm.write(f"{line}: {_DONE[wrong.verdict]}")
