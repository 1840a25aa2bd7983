"""What is counted and estimated of a published model at its real size, without weights.

Every model of `published` is built on the meta device. Counted are its parameters, the layers that each preset adapts
and the numbers of an adapter; a training step is taken on shapes alone (`training.memory`). Some models that fit into
main memory are then made with random weights and trained for a step, each in a process of its own (`measured_peaks`).
"""

import importlib
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from benchmarks.full_size.published import Part, Published
from dora_diffusion.families import component_of_model, coverage, family_of_pipeline
from dora_diffusion.layers.base_layers import logical_shape
from dora_diffusion.layers.targets import target_paths
from dora_diffusion.training.base.memory import Device, MemoryEstimate, estimate_memory
from dora_diffusion.training.base.meta import model_on_meta, pipeline_on_meta
from dora_diffusion.training.base.trainable import PRECISIONS, prepare_trainable
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run.dry_run import file_bytes

RANKS = (4, 8, 16, 32, 64)
PRESETS = ("attention", "all-linear")


def model_of(part: Part, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A component on the meta device."""
    return model_on_meta(getattr(importlib.import_module(part.library), part.kind), part.config, dtype)


def pipeline_of(model: Published, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A published pipeline on the meta device; tokenizers and the scheduler are left out."""
    import diffusers

    parts = {name: model_of(part, dtype) for name, part in model.parts.items()}
    return pipeline_on_meta(getattr(diffusers, model.pipeline), parts, {"requires_safety_checker": False})


def config_of(**sections: Mapping[str, Any]) -> TrainConfig:
    """A training of one picture at native size: DoRA of rank 16 on attention layers, bf16; `sections` change it."""
    plain = {
        "data": {"instance_dir": ".", "instance_prompt": "a cat"},
        "adapter": {"rank": 16},
        "optim": {"mixed_precision": "bf16"},
    }
    merged = {name: {**values, **sections.get(name, {})} for name, values in plain.items()}
    return TrainConfig.model_validate({"output_dir": "run", **merged})


def estimate(model: Published, config: TrainConfig, *, device: Device = "cuda") -> MemoryEstimate:
    """The memory that training a published model takes."""
    pipe = pipeline_of(model, PRECISIONS[config.optim.mixed_precision])
    return estimate_memory(prepare_trainable(pipe, config), config, device=device)


def adapter_numbers(model: nn.Module, preset: str, rank: int) -> int:
    """Numbers of a DoRA adapter: rank (in + out) + out for each layer, a convolution's `in` with its kernel."""
    shapes = [logical_shape(model.get_submodule(p)) for p in target_paths(model, preset)]
    return sum(rank * (math.prod(rest) + out) + out for out, *rest in shapes)


def describe(model: Published) -> dict[str, Any]:
    """All that the report says of a model."""
    pipe = pipeline_of(model)
    family = family_of_pipeline(pipe)
    trained = [part.name for part in family.components if getattr(pipe, part.name, None) is not None]
    memory = {"plain": estimate(model, config_of())}
    if getattr(pipe, family.denoiser.name)._supports_gradient_checkpointing:  # diffusers has none for Hunyuan-DiT
        memory["checkpointing"] = estimate(model, config_of(optim={"gradient_checkpointing": True}))
        blocks = len(memory["checkpointing"].spared) - 1
        memory["half of the blocks swapped"] = memory["checkpointing"].with_swapped(blocks // 2)
        memory["low-memory"] = estimate(model, config_of(optim={"preset": "low-memory"}))
    return {
        "family": family.name,
        "side": model.side,
        "parts": {name: _part(getattr(pipe, name), part) for name, part in model.parts.items()},
        "coverage": {name: _coverage(getattr(pipe, name)) for name in trained},
        "sizes": {preset: _sizes(pipe, preset) for preset in PRESETS},
        "memory": {name: _memory(found) for name, found in memory.items()},
    }


def _memory(found: MemoryEstimate) -> dict[str, Any]:
    """An estimate with what follows from it."""
    own = {name: value for name, value in asdict(found).items() if name != "spared"}
    worst = {"total": found.total, "activations": found.activations, "worst_moment": found.worst_moment}
    return {**own, **worst, "present": found.present}


def _part(model: nn.Module, part: Part) -> dict[str, Any]:
    numbers = sum(parameter.numel() for parameter in model.parameters())  # shared ones count once
    return {"kind": part.kind, "parameters": numbers, "published_millions": part.millions}


def _coverage(model: nn.Module) -> dict[str, Any]:
    component = component_of_model(model)
    assert component is not None, type(model).__name__
    found = coverage(component, model)
    return {**found.matched, "total": found.total, "outside": found.outside, "unmatched": len(found.unmatched)}


def _sizes(pipe: Any, preset: str) -> dict[int, dict[str, int]]:
    """Rank -> numbers of the denoiser's adapter and bytes of its file."""
    family = family_of_pipeline(pipe)
    denoiser = getattr(pipe, family.denoiser.name)
    numbers = {rank: adapter_numbers(denoiser, preset, rank) for rank in RANKS}
    trainable = prepare_trainable(pipe, config_of(adapter={"target_modules": preset}))
    assert sum(parameter.numel() for parameter in trainable.parameters()) == numbers[16]
    header = file_bytes(trainable.adapter({})) - 4 * numbers[16]  # of another rank it has a digit more or less
    trainable.eject()
    return {rank: {"numbers": count, "bytes": 4 * count + header} for rank, count in numbers.items()}
