"""Training checkpoints: safetensors and JSON only, saved whole or not at all, resumed bit for bit."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.formats import RUN_FILE, save_adapter
from dora_diffusion.state import AdapterState
from dora_diffusion.training.config import OptimConfig, TrainConfig
from dora_diffusion.training.run.history import FILE as HISTORY
from dora_diffusion.training.run.history import History
from dora_diffusion.training.run.identity import Identity
from dora_diffusion.training.run.standing import Standing
from dora_diffusion.training.step.guard import Guard
from dora_diffusion.utils import atomic as storage
from dora_diffusion.utils.optimizer_state import Groups, OptimizerState, load_optimizer_state, optimizer_state

ADAPTER = RUN_FILE
_PLACES = {"data": ("instance_dir", "validation_dir", "cache_dir", "cache_memory"), "prior": ("class_dir",)}
_PARAMETERS = "parameters.safetensors"
_IDENTITY, _PROGRESS, _LAST_GOOD = "identity.json", "progress.json", "last-good.safetensors"


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint holds and a resumed run puts back.

    Attributes:
        parameters: name -> tensor, all that the injections need, and their average; filled in place.
        optimizer: with its moments.
        scaler: torch.amp.GradScaler under fp16, else None.
        processes: how many train together.
        validation: (step, loss) pairs so far.
        guard: with the last good state.
        told: the optimiser's `group_settings` before the first step.
        identity: what the run is made of.
        history: the loss of each step.
        standing: what the losses of held-out pictures come to.
        device: the kind of device that trains.
    """

    parameters: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    scaler: Any
    processes: int
    validation: list[tuple[int, float]]
    guard: Guard | None = None
    told: Groups = ()
    identity: Identity | None = None
    history: History | None = None
    standing: Standing = field(default_factory=Standing)
    device: str = "cpu"

    @property
    def best(self) -> int | None:
        """The step of the best checkpoint, which stays."""
        return None if self.standing.best is None else self.standing.best.step


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint.

    Attributes:
        path: its folder.
        progress: steps done, settings and what else is neither a tensor nor a hash.
        identity: what its run was made of; None in those from before that was noted.
        skipped: names of newer ones that are not whole.
    """

    path: Path
    progress: dict[str, Any]
    identity: Identity | None
    skipped: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """How many steps were done."""
        return int(self.progress["step"])

    @property
    def standing(self) -> Mapping[str, Any]:
        """What the losses of held-out pictures came to; empty in those from before that was noted."""
        return self.progress.get("standing") or {}

    @property
    def ended_early(self) -> bool:
        """Whether its run ended there, before its last step."""
        return bool(self.standing.get("ended_early"))

    @property
    def device(self) -> str | None:
        """The kind of device that trained it; None in those from before that was noted."""
        return self.progress.get("device")

    @property
    def precision(self) -> str:
        """What it was trained in."""
        return str(self.progress["settings"]["optim"].get("mixed_precision", "no"))

    @property
    def planned(self) -> int:
        """How many there were to be."""
        return int(self.progress["settings"]["optim"]["steps"])


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint after so many steps lies, in the folder of all."""
    return folder / f"step-{step:08d}"


def resolved(optim: OptimConfig) -> dict[str, Any]:
    """What null stands for in settings that were numbers and words before they could be null."""
    rates = {"learning_rate": optim.rate, "words_learning_rate": optim.words_rate}
    return {**rates, "weight_decay": optim.decay, "lr_scheduler": optim.schedule}


def resumable_part(config: TrainConfig) -> dict[str, Any]:
    """The settings that make up a run; previews are not among them, nor where pictures and caches lie."""
    sections = {"model", "data", "prior", "adapter", "words", "optim", "loss", "flow"}
    parts = config.model_dump(mode="json", include=sections)
    # its weights and adapters are compared by their bytes; swapped blocks change none
    parts["base"] = {"quantise": config.base.quantise, "compile": config.base.compile}
    parts["optim"].pop("preset")  # whose settings are there
    for section, keys in _PLACES.items():
        for key in keys:
            parts[section].pop(key)
    parts["adapter"].pop("start")  # a checkpoint has taken its place
    parts["optim"] |= resolved(config.optim)
    if config.prior.mode == "generated":
        parts["prior"]["class_images"] = config.prior.drawn_images  # which was a number before it could be null
    for concept in parts["data"]["concepts"]:
        concept.pop("dir")
    return parts


def save(
    state: TrainingState, config: TrainConfig, *, step: int, folder: Path, adapter: AdapterState | None = None
) -> Path:
    """Save a checkpoint after `step` optimiser steps; elders beyond `config.checkpoint.keep` go, but for the best.

    Args:
        state: what a resumed run puts back.
        config: the run's settings.
        step: how many steps are done.
        folder: of all checkpoints of the run.
        adapter: what is learnt so far, saved beside it as a file to draw with; None when new words are learnt alone.

    Raises:
        ValueError: a value is not finite, or the optimiser keeps what cannot be saved; nothing is written, and the
            elders stay.
    """
    for name, parameter in state.parameters.items():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"step {step}: {name} is no longer finite; lower the learning rate and resume from before")
    optimizer = optimizer_state(state.optimizer, told=state.told)
    progress = {
        "step": step,
        "processes": state.processes,
        "device": state.device,
        "validation": state.validation,
        "standing": state.standing.progress(),
        "settings": resumable_part(config),
        "guard": None if state.guard is None else state.guard.progress(),
        "scaler": None if state.scaler is None else state.scaler.state_dict(),
        "optimizer": optimizer.values,
    }
    target = checkpoint_folder(folder, step)
    files: dict[str, Callable[[Path], None]] = {
        _PARAMETERS: lambda path: storage.save_tensors(state.parameters, path),
        "optimizer.safetensors": lambda path: storage.save_tensors(optimizer.tensors, path),
        _PROGRESS: partial(storage.write_atomically, data=json.dumps(progress).encode()),
    }
    if state.identity is not None:
        files[_IDENTITY] = partial(storage.write_atomically, data=state.identity.to_json().encode())
    if state.history is not None:
        files[HISTORY] = partial(storage.write_atomically, data=state.history.as_csv().encode())
    if state.guard is not None and state.guard.tensors():
        files[_LAST_GOOD] = partial(storage.save_tensors, state.guard.tensors())
    if adapter is not None:
        files[ADAPTER] = partial(_write_adapter, adapter)
    storage.save_checkpoint(target, files, keep=config.checkpoint.keep, spared=names_of_kept(state.best))
    return target


def names_of_kept(best: int | None) -> frozenset[str]:
    """The names of checkpoints that stay, however old they are."""
    return frozenset() if best is None else frozenset({checkpoint_folder(Path(), best).name})


def _write_adapter(adapter: AdapterState, path: Path) -> None:
    save_adapter(adapter, path)


def newest(folder: Path) -> Saved | None:
    """The newest whole checkpoint of `folder`; None when it holds none at all.

    Raises:
        ValueError: there are some, but none is whole.
    """
    path, broken = storage.newest_checkpoint(folder)
    if path is None and broken:
        raise ValueError(f"{folder}: none of its {len(broken)} checkpoints is whole; remove the folder to start anew")
    if path is None:
        return None
    identity = path / _IDENTITY
    return Saved(
        path,
        json.loads((path / _PROGRESS).read_text()),
        Identity.from_json(identity.read_text()) if identity.is_file() else None,
        tuple(sorted(other.name for other in broken)),
    )


@torch.no_grad()
def resume(state: TrainingState, saved: Saved) -> None:
    """Put back what a checkpoint holds.

    Raises:
        ValueError: it holds other tensors than are trained now; the first that differs is named.
    """
    put_back(state, saved.path)
    if state.scaler is not None and saved.progress["scaler"]:
        state.scaler.load_state_dict(saved.progress["scaler"])
    if state.guard is not None:
        good = saved.path / _LAST_GOOD
        state.guard.resume(saved.progress.get("guard"), storage.load_tensors(good) if good.is_file() else {})
    if state.history is not None:
        state.history.resume(saved.path / HISTORY)
    state.validation[:] = [(step, loss) for step, loss in saved.progress["validation"]]
    state.standing.resume(saved.standing)


@torch.no_grad()
def put_back(state: TrainingState, checkpoint: Path) -> None:
    """Fill what is trained, and its optimiser, with what a checkpoint holds; a ValueError where that does not fit."""
    held = storage.load_tensors(checkpoint / _PARAMETERS)
    _refuse_misfit(checkpoint, held, state.parameters)
    for name, value in held.items():
        state.parameters[name].copy_(value)
    values = json.loads((checkpoint / _PROGRESS).read_text()).get("optimizer", {})
    moments = OptimizerState(storage.load_tensors(checkpoint / "optimizer.safetensors"), values)
    load_optimizer_state(state.optimizer, moments, told=state.told)


def _refuse_misfit(path: Path, held: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    for name in sorted(held.keys() | trained.keys()):
        before, now = (None if name not in side else tuple(side[name].shape) for side in (held, trained))
        if before != now:
            raise ValueError(
                f"{path}: cannot be resumed, {name} was {before or 'not trained'} and is now {now or 'not trained'}; "
                "use the same base and settings, or another output_dir"
            )
