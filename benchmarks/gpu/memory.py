"""Section 2: the peak memory of the trainer's own step beside its estimate."""

import gc
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from benchmarks.full_size.models import pipeline_of
from benchmarks.gpu.models import Model, config_for, inputs, models, pipeline
from benchmarks.gpu.setting import NOT_ON_CPU, NotAvailable, Row, Rows, Setting, row_of
from dora_diffusion.training.base.memory import Device, estimate_memory
from dora_diffusion.training.base.trainable import TrainablePipeline, prepare_trainable
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.batches import Batch
from dora_diffusion.training.step.guard import Guard
from dora_diffusion.training.step.objective import Objectives
from dora_diffusion.training.step.optimisers import build_optimizer
from dora_diffusion.training.step.training_step import TrainingStep

_ENOUGH = 25.0  # seconds that an estimate and its steps may take


def rows(setting: Setting) -> Rows:
    """Each model, with gradient checkpointing and plain."""
    for checkpointing in (True, False):
        for model in models(is_tiny=setting.is_tiny):
            config = config_for(model, gradient_checkpointing=checkpointing)
            facts = {"name": model.name, "checkpointing": checkpointing}
            yield row_of(facts, lambda model=model, config=config: _one(model, config, setting))
            gc.collect()


def _one(model: Model, config: TrainConfig, setting: Setting) -> Row:
    if setting.left < _ENOUGH and not setting.is_tiny:
        raise NotAvailable(f"no time was left, {setting.left:.0f} s")
    device: Device = "cuda" if setting.device == "cuda" else "cpu"
    skeleton = prepare_trainable(pipeline_of(model.published), config)
    expected = estimate_memory(skeleton, config, device=device)
    if device == "cpu":
        _steps(model, config, device)
        return {"estimate": expected.total, "activations": expected.activations, "measured": NOT_ON_CPU}
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    peak = _steps(model, config, device) - before
    facts = {"estimate": expected.total, "activations": expected.activations}
    return {**facts, "measured": peak, "error_share": expected.total / peak - 1}


def _steps(model: Model, config: TrainConfig, device: str) -> int:
    """A step to make the optimiser's moments, then a picture encoded and one more step; the peak of that, in bytes."""
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    try:
        return _peak(model, config, device)
    finally:
        AcceleratorState._reset_state()


def _peak(model: Model, config: TrainConfig, device: str) -> int:
    pipe = pipeline(model, device)
    trainable = prepare_trainable(pipe, config, device=torch.device(device))
    step = _step_of(trainable, config, _batch(pipe, model, device), device)
    step.take(0)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainable.encode_pictures(torch.zeros(1, 3, model.side, model.side, device=device))
    step.take(1)
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0


def _batch(pipe: Any, model: Model, device: str) -> Batch:
    made = inputs(pipe, model, device)
    weights = torch.ones(1, device=device)
    return Batch(made.latents, made.conditioning, made.frames, weights, ("random",), (model.side, model.side))


def _step_of(trainable: TrainablePipeline, config: TrainConfig, batch: Batch, device: str) -> TrainingStep:
    optimizer = build_optimizer(trainable, config.optim, config.words)
    return TrainingStep(
        config.optim,
        Accelerator(mixed_precision=config.optim.mixed_precision, cpu=device == "cpu"),
        trainable,
        Objectives(trainable.pipe, config.optim, config.flow, config.loss).of,
        batches_at=lambda _: [batch],
        optimizer=optimizer,
        guard=Guard(config.guard, trainable.named_tensors(), optimizer),
    )
