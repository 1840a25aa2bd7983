"""Layers whose weights are kept elsewhere and brought for each forward: accelerate's sequential CPU offload, FSDP2.

The hook that brings them knows where they are. It is accelerate's own: where a layer has one, accelerate is there.
What torch's FSDP2 has spread over processes is a DTensor, known by what it can do: its module is not imported for it.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn


def value_of(layer: nn.Module, name: str) -> Tensor:
    """A parameter of a layer, from where it is kept; still on the meta device where nobody keeps it.

    One that is spread over processes is gathered: all of them have to ask for it.
    """
    own: Tensor = getattr(layer, name)
    if is_spread(own):
        return whole(own)
    hook = _hook_of(layer) if own.is_meta else None
    kept: Tensor = own if hook is None else hook.weights_map[name]
    return kept


def is_spread(tensor: Tensor) -> bool:
    """Whether each of several processes keeps a part of it."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered if it is spread over processes, which all have to ask then."""
    gathered: Tensor = tensor.detach().full_tensor() if is_spread(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer computes."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    hook = _hook_of(layer) if weight.is_meta else None
    return weight.device if hook is None else torch.device(hook.execution_device)


def move_hook(layer: nn.Module, base: nn.Module) -> None:
    """Let the hook that accelerate gave to a layer be its base's, which then stands for itself again."""
    hook = getattr(layer, "_hf_hook", None)
    if hook is not None:
        hooks = import_module("accelerate.hooks")
        hooks.remove_hook_from_module(layer)
        hooks.add_hook_to_module(base, hook)


def _hook_of(layer: nn.Module) -> Any:
    hook = getattr(layer, "_hf_hook", None)
    return next((one for one in getattr(hook, "hooks", [hook]) if getattr(one, "weights_map", None) is not None), None)
