"""What a run consists of, put together: its batches, its step, what looks on, and what writes."""

from dataclasses import dataclass

from dora_diffusion.training.base.trainable import TrainablePipeline
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.batches import BatchSource
from dora_diffusion.training.data.concepts import Split
from dora_diffusion.training.processes import Processes
from dora_diffusion.training.run.callbacks import Callbacks
from dora_diffusion.training.run.checkpoint import TrainingState
from dora_diffusion.training.run.history import History
from dora_diffusion.training.run.identity import Identity
from dora_diffusion.training.run.keeper import Keeper
from dora_diffusion.training.run.launch import Launched
from dora_diffusion.training.run.previews import own_previews, prompts_of
from dora_diffusion.training.run.standing import Standing
from dora_diffusion.training.run.validation import Validation, measured_examples
from dora_diffusion.training.run.watchers import Watchers
from dora_diffusion.training.step.average import average_of
from dora_diffusion.training.step.guard import Guard
from dora_diffusion.training.step.objective import Objectives
from dora_diffusion.training.step.optimisers import build_optimizer, limit_weight_norms
from dora_diffusion.training.step.training_step import TrainingStep
from dora_diffusion.utils.optimizer_state import group_settings


@dataclass(frozen=True)
class Parts:
    """The parts of one run.

    Attributes:
        source: its batches.
        step: what is done with a step's batches.
        validation: the loss on fixed noise.
        standing: what that comes to.
        history: the loss of each step.
        watchers: what looks on.
        keeper: writes checkpoints and files.
        callbacks: what hears of it.
        processes: that train together.
    """

    source: BatchSource
    step: TrainingStep
    validation: Validation
    standing: Standing
    history: History
    watchers: Watchers
    keeper: Keeper
    callbacks: Callbacks
    processes: Processes


def parts_of(
    config: TrainConfig,
    launched: Launched,
    trainable: TrainablePipeline,
    objectives: Objectives,
    *,
    examples: Split,
    identity: Identity,
    callbacks: Callbacks,
) -> Parts:
    """Put a run together.

    Args:
        config: of the run.
        launched: this process, and the others.
        trainable: what is trained.
        objectives: of its base.
        examples: its pictures, with their sizes.
        identity: what it is made of.
        callbacks: what hears of it.
    """
    accelerator, processes = launched.accelerator, launched.processes
    source = BatchSource(trainable, config, instances=examples.train, classes=examples.classes, processes=processes)
    source.keep_captions(one.caption for one in measured_examples(examples, config.validation))
    source.keep_prompts(prompts_of(own_previews(config.preview, processes)))
    optimizer = build_optimizer(trainable, config.optim, config.words)
    limit_weight_norms(optimizer, trainable, config.optim.max_weight_norm)
    average = average_of(trainable, optimizer, config.optim)
    tensors = {**trainable.named_tensors(), **average.tensors}
    guard = Guard(config.guard, tensors, optimizer)
    step = TrainingStep(
        config.optim,
        accelerator,
        trainable,
        objectives.of,
        batches_at=source.batches_at,
        optimizer=optimizer,
        guard=guard,
    )
    standing = Standing(keeps_best=config.checkpoint.keep_best, patience=config.validation.patience)
    validation = Validation(
        config.validation,
        step,
        source,
        examples,
        objective_of=objectives.measuring,
        standing=standing,
        processes=processes,
    )
    history = History()
    state = TrainingState(
        tensors,
        optimizer,
        accelerator.scaler,
        accelerator.num_processes,
        validation.losses,
        guard,
        told=group_settings(optimizer),
        identity=identity,
        history=history,
        standing=standing,
        device=accelerator.device.type,
    )
    watchers = Watchers(
        config,
        accelerator,
        trainable,
        validation=validation,
        callbacks=callbacks,
        average=average,
        processes=processes,
    )
    keeper = Keeper(config, launched, trainable, examples, state=state, callbacks=callbacks, average=average)
    return Parts(source, step, validation, standing, history, watchers, keeper, callbacks, processes)
