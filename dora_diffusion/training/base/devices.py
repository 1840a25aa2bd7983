"""Where a run trains and in what precision: what `auto` stands for on this machine."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, str_to_bool

from dora_diffusion.training.config import TrainConfig
from dora_diffusion.utils.hardware import AUTO, Precision, best_precision, device_of, is_here

_ON_CPU, _DEVICE = "ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE"


def device_for(name: str, environment: Mapping[str, str] = os.environ) -> torch.device:
    """The device of `device` in a config; for "auto" what `accelerate launch --cpu` asks for, else the best.

    Raises:
        ValueError: this machine has not got it, or this process is one of several, which share devices out.
    """
    if name == AUTO and str_to_bool(environment.get(_ON_CPU) or "no"):
        return torch.device("cpu")
    if ":" in name and is_one_of_several(environment):
        kind = name.partition(":")[0]
        raise ValueError(f"device: got {name!r} in one of several processes, each of another; expected {kind} or auto")
    found = device_of(name)
    if name != AUTO and not is_here(found):
        here = device_of(AUTO)
        others = " or auto" if here == "cpu" else ", cpu or auto"
        raise ValueError(f"device: got {name!r}, which is not here; expected {here}{others}")
    return torch.device(found)


def precision_for(name: str, device: torch.device, *, before: str | None = None) -> Precision:
    """The precision of `optim.mixed_precision` on a device; for "auto" that of the run until now, else the best.

    Args:
        name: in the config.
        device: where the run trains.
        before: what a run that goes on has been trained in so far; None for one that begins.

    Raises:
        ValueError: fp16 on a CPU.
    """
    is_cpu = device.type == "cpu"
    if name == "fp16" and is_cpu:
        raise ValueError(
            "optim.mixed_precision: got 'fp16' on a CPU, where no scaler keeps small gradients from becoming 0; "
            "expected auto, no or bf16"
        )
    if name != AUTO:
        return cast(Precision, name)
    if before is not None and not (before == "fp16" and is_cpu):
        return cast(Precision, before)
    return best_precision(device)


def with_precision(config: TrainConfig, device: torch.device, *, before: str | None = None) -> TrainConfig:
    """A config that says in which precision its run trains on a device; see `precision_for`."""
    precision = precision_for(config.optim.mixed_precision, device, before=before)
    return config.model_copy(update={"optim": config.optim.model_copy(update={"mixed_precision": precision})})


@contextmanager
def accelerate_on(device: torch.device) -> Iterator[None]:
    """An Accelerator that is made within the block has this device, whatever another of this process had before.

    Of several processes each has a device of its own, which accelerate shares out.
    """
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    if is_one_of_several():
        yield
        return
    if PartialState._shared_state and PartialState().distributed_type == DistributedType.NO:
        PartialState._reset_state()
    before = os.environ.get(_DEVICE)
    os.environ[_DEVICE] = str(device)  # accelerate's own choice has another order
    try:
        yield
    finally:
        os.environ.pop(_DEVICE) if before is None else os.environ.__setitem__(_DEVICE, before)


def is_one_of_several(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process was launched beside others."""
    return int(environment.get("LOCAL_RANK", "-1")) != -1 or int(environment.get("WORLD_SIZE", "1")) > 1
