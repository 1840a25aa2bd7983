"""What a machine draws on, and the dtypes that people name in short."""

from collections.abc import Mapping

import torch

AUTO = "auto"
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device_of(name: str) -> str:
    """The device of a name: for "auto" the first of cuda, mps and cpu that is here, any other name as it is."""
    if name != AUTO:
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def dtype_name(dtype: torch.dtype) -> str:
    """`fp32` and the like; torch's own name for one that has no short one."""
    short = {known: name for name, known in DTYPES.items()}
    return short.get(dtype, str(dtype).removeprefix("torch."))


def is_here(device: str) -> bool:
    """Whether this machine has a device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        return False
    return True
