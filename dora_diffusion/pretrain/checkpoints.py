"""Checkpoints of the pretraining loops: named parts, the optimiser, and how far and how long it has gone."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dora_diffusion.utils import atomic as storage
from dora_diffusion.utils.optimizer_state import OptimizerState, load_optimizer_state, optimizer_state


@dataclass(frozen=True)
class Progress:
    """Steps done, seconds on the clock so far, and the running loss."""

    step: int = 0
    seconds: float = 0.0
    loss: float = 1.0


Parts = Mapping[str, Mapping[str, Tensor]]


def save(folder: Path, parts: Parts, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Save `PART.safetensors` for every part, the optimiser and the progress; add a line to `curve.jsonl`."""
    contents = {**parts, "optimizer": optimizer_state(optimizer).tensors}
    record = json.dumps(asdict(progress))
    files: dict[str, Callable[[Path], None]] = {
        f"{name}.safetensors": partial(storage.save_tensors, tensors) for name, tensors in contents.items()
    }
    files["progress.json"] = partial(storage.write_atomically, data=record.encode())
    storage.save_checkpoint(folder / f"step-{progress.step:08d}", files)
    with open(folder / "curve.jsonl", "a") as file:
        file.write(record + "\n")


def resume(folder: Path, parts: Parts, optimizer: torch.optim.Optimizer) -> Progress:
    """Put the newest valid checkpoint back in place; a fresh `Progress` when there is none."""
    checkpoints = storage.valid_checkpoints(folder)
    if not checkpoints:
        return Progress()
    newest = checkpoints[-1]
    for name, tensors in parts.items():
        load_into(tensors, newest / f"{name}.safetensors")
    load_optimizer_state(optimizer, OptimizerState(storage.load_tensors(newest / "optimizer.safetensors"), {}))
    return Progress(**json.loads((newest / "progress.json").read_text()))


@torch.no_grad()
def load_into(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Copy a safetensors file's values into tensors of the same names."""
    for name, value in storage.load_tensors(file).items():
        tensors[name].copy_(value)
