"""How a run was launched: what `accelerate launch` asks for and is not done here is refused before anything is built.

The launcher says what it was told in environment variables, which accelerate reads.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.processes import Processes

_FSDP, _VERSION = "ACCELERATE_USE_FSDP", "FSDP_VERSION"
_INSTEAD = (
    "expected --multi_gpu, or --use_fsdp --fsdp_version 2 for a base that one device cannot hold "
    "(docs/several_devices.md)"
)
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed spreads gradients and moments over devices, which an adapter has few of",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM has models of its own",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor and context parallelism cut layers that adapters stand beside",
    "FSDP_OFFLOAD_PARAMS": "weights that FSDP2 keeps in main memory cannot be trained beside",
}


@dataclass(frozen=True)
class Launched:
    """This process, and those that train with it.

    Attributes:
        accelerator: of this one.
        processes: as this one sees them.
    """

    accelerator: Accelerator
    processes: Processes


def check_launch(environment: Mapping[str, str]) -> bool:
    """Whether the base is to be spread over the processes (`accelerate launch --use_fsdp --fsdp_version 2`).

    Args:
        environment: what the launcher has set.

    Raises:
        ValueError: it asks for something else than processes with a copy each, or FSDP2; one line that names it.
    """
    shards = _is_set(environment, _FSDP)
    for name, reason in _REFUSED.items():
        if _is_set(environment, name) and (shards or not name.startswith("FSDP")):
            raise ValueError(f"{name}={environment[name]}: {reason}; {_INSTEAD}")
    version = environment.get(_VERSION, "1")
    if shards and version != "2":
        raise ValueError(f"{_FSDP}={environment[_FSDP]} with {_VERSION}={version}: FSDP1 is not supported; {_INSTEAD}")
    return shards


def check_sharded(config: TrainConfig, pipeline: Any) -> None:
    """A ValueError of one line for what cannot be had while the base is spread over processes."""
    refused = {
        "base.quantise": (config.base.quantise, "null: FSDP2 spreads weights of one dtype"),
        "base.swap_blocks": (config.base.swap_blocks, "0: what is spread does not wait in main memory"),
        "base.compile": (config.base.compile, "false: it has not been tried together"),
        "export": (config.export, "[]: the leading process alone has not the base; dora-diffusion convert writes them"),
        "train(pipeline=...)": (pipeline is not None or None, "a config: what was spread is not given back"),
    }
    for key, (value, expected) in refused.items():
        if value:
            raise ValueError(f"{key}: got {value!r} with --use_fsdp, expected {expected}")


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("true", "1", "yes", "y", "on")


@contextmanager
def as_plain_processes() -> Iterator[None]:
    """Inside the block accelerate does not hear of FSDP: it would wrap what is trained, which stays whole here."""
    said = os.environ.pop(_FSDP, None)
    try:
        yield
    finally:
        if said is not None:
            os.environ[_FSDP] = said
