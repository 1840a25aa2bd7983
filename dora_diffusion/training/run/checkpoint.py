"""Training checkpoints: safetensors and JSON only, saved whole or not at all, resumed bit for bit."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.formats import RUN_FILE, save_adapter
from dora_diffusion.state import AdapterState
from dora_diffusion.training.config import CaptionsConfig, FlowConfig, OptimConfig, TrainConfig, WordsConfig
from dora_diffusion.training.step.guard import Guard
from dora_diffusion.utils import atomic as storage

ADAPTER = RUN_FILE
_LAST_GOOD = "last-good.safetensors"


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint holds and a resumed run puts back.

    Attributes:
        parameters: name -> tensor, all that the injections need; filled in place.
        optimizer: with its moments.
        scaler: torch.amp.GradScaler under fp16, else None.
        processes: how many train together.
        validation: (step, loss) pairs so far.
        guard: with the last good state.
        below: name of an adapter in `base.adapters` -> its strength and its file's hash.
    """

    parameters: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    scaler: Any
    processes: int
    validation: list[tuple[int, float]]
    guard: Guard
    below: Mapping[str, Sequence[Any]]


def resumable_part(config: TrainConfig) -> dict[str, Any]:
    """The settings that must not change between a run and its resumption; previews, and where pictures lie, may."""
    parts = config.model_dump(mode="json", include={"model", "data", "prior", "adapter", "words", "optim", "flow"})
    for section, key in (("data", "instance_dir"), ("data", "validation_dir"), ("prior", "class_dir")):
        parts[section].pop(key)
    parts["adapter"].pop("start")  # a checkpoint has taken its place
    if config.prior.mode == "generated":
        parts["prior"]["class_images"] = config.prior.drawn_images  # which was a number before it could be null
    for concept in parts["data"]["concepts"]:
        concept.pop("dir")
    return parts


def save(
    state: TrainingState, config: TrainConfig, *, step: int, folder: Path, adapter: AdapterState | None = None
) -> Path:
    """Save a checkpoint after `step` optimiser steps; elders beyond `config.checkpoint.keep` go.

    Args:
        state: what a resumed run puts back.
        config: the run's settings.
        step: how many steps are done.
        folder: of all checkpoints of the run.
        adapter: what is learnt so far, saved beside it as a file to draw with; None when new words are learnt alone.

    Raises:
        ValueError: a value is not finite; nothing is written, and the elders stay.
    """
    for name, parameter in state.parameters.items():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"step {step}: {name} is no longer finite; lower the learning rate and resume from before")
    progress = {
        "step": step,
        "processes": state.processes,
        "validation": state.validation,
        "settings": resumable_part(config),
        "guard": state.guard.progress(),
        "below": {name: list(facts) for name, facts in state.below.items()},
        "scaler": None if state.scaler is None else state.scaler.state_dict(),
    }
    tensors = storage.optimizer_tensors(state.optimizer)
    target = folder / f"step-{step:08d}"
    files: dict[str, Callable[[Path], None]] = {
        "parameters.safetensors": lambda path: storage.save_tensors(state.parameters, path),
        "optimizer.safetensors": lambda path: storage.save_tensors(tensors, path),
        "progress.json": lambda path: storage.write_atomically(path, json.dumps(progress).encode()),
    }
    if good := state.guard.tensors():
        files[_LAST_GOOD] = lambda path: storage.save_tensors(good, path)
    if adapter is not None:
        files[ADAPTER] = partial(_write_adapter, adapter)
    storage.save_checkpoint(target, files, keep=config.checkpoint.keep)
    return target


def _write_adapter(adapter: AdapterState, path: Path) -> None:
    save_adapter(adapter, path)


@torch.no_grad()
def resume(state: TrainingState, config: TrainConfig, *, folder: Path) -> int:
    """Load the newest valid checkpoint of `folder`; return how many steps it had done, 0 when there is none.

    Raises:
        ValueError: the checkpoint was made with other settings; the first that differs is named.
    """
    found = storage.valid_checkpoints(folder)
    broken = sorted(path.name for path in folder.glob("step-*") if path not in found)
    if broken and not found:
        raise ValueError(f"{folder}: none of its {len(broken)} checkpoints is whole; remove the folder to start anew")
    if not found:
        return 0
    newest = found[-1]
    progress = json.loads((newest / "progress.json").read_text())
    difference = _first_difference(
        {
            **_with_later_defaults(progress["settings"]),
            "processes": progress["processes"],
            "base.adapters": progress.get("below", {}),
        },
        {**resumable_part(config), "processes": state.processes, "base.adapters": dict(state.below)},
    )
    if difference:
        raise ValueError(f"{newest}: cannot resume, {difference}; use the same settings or another output_dir")
    for name, value in storage.load_tensors(newest / "parameters.safetensors").items():
        state.parameters[name].copy_(value)
    storage.load_optimizer_tensors(state.optimizer, storage.load_tensors(newest / "optimizer.safetensors"))
    if state.scaler is not None and progress["scaler"]:
        state.scaler.load_state_dict(progress["scaler"])
    good = storage.load_tensors(newest / _LAST_GOOD) if (newest / _LAST_GOOD).is_file() else {}
    state.guard.resume(progress.get("guard"), good)
    state.validation[:] = [(step, loss) for step, loss in progress["validation"]]
    print(f"resuming from {newest.name}" + (f"; skipped what is not whole: {', '.join(broken)}" if broken else ""))
    step: int = progress["step"]
    return step


def _with_later_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an older checkpoint, with the defaults of sections and keys that came later."""
    later = {
        "flow": FlowConfig().model_dump(mode="json"),
        "data": {"trigger": None, "concepts": [], "captions": CaptionsConfig().model_dump(mode="json")},
        "words": WordsConfig().model_dump(mode="json"),
        "prior": {"mode": "generated", "caption": None},
        "optim": OptimConfig().model_dump(mode="json"),
    }
    return settings | {name: defaults | settings.get(name, {}) for name, defaults in later.items()}


def _first_difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str | None:
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            if inner := _first_difference(before, now, f"{prefix}{key}."):
                return inner
        elif before != now:
            return f"{prefix}{key} was {before!r} and is now {now!r}"
    return None
