"""A step of our trainer, put together as a run puts it together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from benchmarks.training.bases import Base
from benchmarks.training.clock import Stopwatch
from dora_diffusion.layers.dora import DoRALayer
from dora_diffusion.training.base.sizes import sizes_of
from dora_diffusion.training.base.trainable import TrainablePipeline, prepare_trainable
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.batches import BatchSource
from dora_diffusion.training.data.buckets import in_buckets
from dora_diffusion.training.data.concepts import Split, checked_examples
from dora_diffusion.training.run.validation import Validation
from dora_diffusion.training.step.guard import Guard
from dora_diffusion.training.step.objective import Objectives
from dora_diffusion.training.step.optimisers import build_optimizer
from dora_diffusion.training.step.training_step import TrainingStep

FRESH_VIEWS: Mapping[str, Any] = {"crop": "random", "flip": True}
"""`data` of a run that sees every picture in another way each time, so that no latents are kept."""


def config_of(pictures: Path, prompt: str, side: int, batch_size: int, data: Mapping[str, Any]) -> TrainConfig:
    """A default run of one prompt; `data` says how pictures are seen."""
    return TrainConfig.model_validate(
        {
            "output_dir": pictures.parent / "run",
            "data": {"instance_dir": pictures, "instance_prompt": prompt, "resolution": side, **data},
            "optim": {"batch_size": batch_size},
        }
    )


@dataclass(frozen=True)
class Adapted:
    """Our layers for a base, by path, which stand in its denoiser while a step of theirs is taken."""

    trainable: TrainablePipeline
    layers: Mapping[str, nn.Module]


def adapted(base: Base, config: TrainConfig) -> Adapted:
    """Layers as `config` asks for them; they stand in the denoiser afterwards."""
    trainable = prepare_trainable(base.pipe, config)
    found = {path: layer for path, layer in trainable.denoiser.named_modules() if isinstance(layer, DoRALayer)}
    return Adapted(trainable, found)


@dataclass
class OurTrainer:
    """Steps of our trainer, numbered as they come.

    Attributes:
        own: what is trained.
        step: one step.
        validation: of a run.
        watch: told of the parts of a step.
        done: steps so far.
    """

    own: Adapted
    step: TrainingStep
    validation: Validation
    watch: Stopwatch
    done: int = field(default=0, init=False)

    def take(self) -> float:
        """One step; returns its loss. The norms, which it would begin with, are taken before it, so as to be timed."""
        self.watch.around("norms", self.own.trainable.refresh_norms)()
        self.done += 1
        return self.step.take(self.done - 1)

    def measure(self) -> float:
        """The validation loss."""
        return self.validation.measure(self.done, self.own.trainable)


def our_trainer(own: Adapted, config: TrainConfig, watch: Stopwatch, *, steps: int) -> OurTrainer:
    """A trainer that can take so many steps; what is kept of pictures and captions is encoded before the first."""
    trainable, pipe = own.trainable, own.trainable.pipe
    split = checked_examples(config.data, seed=config.optim.seed)
    examples = Split(*([*in_buckets(list(part), config.data, sizes_of(pipe))] for part in split))
    source = BatchSource(trainable, config, instances=examples.train, classes=examples.classes)
    optimizer = build_optimizer(trainable, config.optim, config.words)
    watch.notes("optimiser", optimizer)
    accelerator = Accelerator(cpu=True)
    accelerator.backward = watch.around("backward", accelerator.backward)
    objectives = Objectives(pipe, config.optim, config.flow, config.loss)
    step = TrainingStep(
        config.optim,
        accelerator,
        trainable,
        objectives.of,
        batches_at=watch.around("batch", source.batches_at),
        optimizer=optimizer,
        guard=Guard(config.guard, trainable.named_tensors(), optimizer),
    )
    validation = Validation(config.validation, step, source, examples, objective_of=objectives.measuring)
    source.prepare(index for number in range(steps) for index in step.micro_batches(number))
    return OurTrainer(own, step, validation, watch)


def times_measured(config: TrainConfig, validation: Validation) -> int:
    """How often a run measures its validation loss."""
    return sum(validation.is_due(step, config.optim.steps) for step in range(config.optim.steps + 1))


def numbers_of(layers: Sequence[nn.Module]) -> int:
    """How many numbers some layers train."""
    return sum(p.numel() for layer in layers for p in layer.parameters() if p.requires_grad)
