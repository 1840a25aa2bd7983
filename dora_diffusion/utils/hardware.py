"""What a machine draws and trains on, what that can compute, and the dtypes that people name in short."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

AUTO = "auto"
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Precision = Literal["no", "fp16", "bf16"]


def device_of(name: str) -> str:
    """The device of a name: for "auto" the first of cuda, xpu, mps and cpu that is here, any other name as it is."""
    if name != AUTO:
        return name
    found = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}
    return next((kind for kind, module in found.items() if module.is_available()), "cpu")


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


def best_precision(device: str | torch.device) -> Precision:
    """What a device trains fastest in without harm: bf16 where it computes in it, fp16 on other GPUs, fp32 on a CPU.

    Of a kind of GPU that is not here, what those that are sold today can.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return "no"
    if device.type == "cuda" and torch.cuda.is_available():
        with torch.cuda.device(device):  # those before Ampere only emulate it
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if not is_here(str(device)) or _multiplies(device, torch.bfloat16) else "fp16"


def has_float64(device: str | torch.device) -> bool:
    """Whether a device has fp64: Apple's have not, nor have some of Intel's."""
    device = torch.device(device)
    return device.type in ("cpu", "cuda", "meta") or _multiplies(device, torch.float64)


def in_float64(tensor: Tensor) -> Tensor:
    """A tensor in fp64, in main memory where its device has none."""
    return (tensor if has_float64(tensor.device) else tensor.cpu()).double()


def _multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        square = torch.ones(2, 2, dtype=dtype, device=device)
        (square @ square).sum().item()
    except (RuntimeError, TypeError, AssertionError):
        return False
    return True
