"""Layers whose weights are kept elsewhere and brought for each forward.

Under accelerate's sequential CPU offload they are on the meta device, and the hook that brings them knows where they
are. (It is accelerate's own: where a layer has one, accelerate is there.) Those of a swapped block stay where they
compute, but their storages are empty meanwhile; each has its numbers in main memory, as its `home`.
What torch's FSDP2 has spread over processes is a DTensor, known by what it can do: its module is not imported for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

_HOME = "_dora_home"


def value_of(layer: nn.Module, name: str) -> Tensor:
    """A parameter of a layer, from where it is kept; still on the meta device where nobody keeps it.

    One that is spread over processes is gathered: all of them have to ask for it.
    """
    own: Tensor = getattr(layer, name)
    if is_spread(own):
        return whole(own)
    home = home_of(own)
    if home is not None and is_away(own):
        return home.to(own.device, non_blocking=True)
    hook = _hook_of(layer) if own.is_meta else None
    kept: Tensor = own if hook is None else hook.weights_map[name]
    return kept


def settle(tensor: Tensor, *, is_pinned: bool) -> None:
    """Keep a tensor's numbers in main memory, as what may be emptied and filled again.

    Args:
        tensor: where it computes.
        is_pinned: whether in page-locked memory, from which a CUDA device reads without waiting.
    """
    home = tensor.detach().to("cpu", copy=True)
    tensor.data = torch.empty_like(tensor.data)  # a storage of its own, of which no file is the memory
    _remember(tensor, home.pin_memory() if is_pinned else home)
    fill(tensor)


def release(tensor: Tensor) -> None:
    """Let a tensor's numbers be where it is, always."""
    if is_away(tensor):
        fill(tensor)
    delattr(tensor, _HOME)


def _remember(tensor: Tensor, home: Tensor) -> None:
    setattr(tensor, _HOME, (home, tensor.untyped_storage()._cdata))


def home_of(tensor: Tensor) -> Tensor | None:
    """Where a tensor's numbers are kept; None for one that is not swapped."""
    home: Tensor | None = getattr(tensor, _HOME, (None,))[0]
    return home


@torch.no_grad()
def fill(tensor: Tensor) -> None:
    """Give a swapped tensor its numbers back, in the very storage that whoever has a view of it knows.

    It does not count as an edit. From pinned memory it does not wait for the device.
    """
    home = home_of(tensor)
    assert home is not None
    make_room(tensor)
    with _unsafe_preserve_version_counter(tensor):
        tensor.copy_(home, non_blocking=True)


def make_room(tensor: Tensor) -> None:
    """Give a swapped tensor memory for its numbers, which are not there yet."""
    home, storage = home_of(tensor), tensor.untyped_storage()
    if home is not None and not storage.nbytes():
        storage.resize_(home.untyped_storage().nbytes())


def empty(tensor: Tensor) -> None:
    """Give a swapped tensor's memory back. Nobody may read it until it is filled: torch does not look, and crashes."""
    home, storage = getattr(tensor, _HOME)
    if tensor.untyped_storage()._cdata != storage:  # a library has packed it anew, as bitsandbytes does on some CPUs
        settle(tensor, is_pinned=home.is_pinned())
    tensor.untyped_storage().resize_(0)


def is_away(tensor: Tensor) -> bool:
    """Whether a tensor is swapped and empty."""
    return home_of(tensor) is not None and not tensor.untyped_storage().nbytes()


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors that one of a quantisation library's own kind consists of; any other itself."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [part for name in flatten()[0] for part in plain_tensors(getattr(tensor, name))]


@contextmanager
def at_hand(layer: nn.Module) -> Iterator[None]:
    """While the block lasts a layer's own tensors can be read, whatever is swapped."""
    own = (*layer.parameters(False), *layer.buffers(False))
    brought = [part for tensor in own for part in plain_tensors(tensor) if is_away(part)]
    for tensor in brought:
        fill(tensor)
    try:
        yield
    finally:
        for tensor in brought:
            empty(tensor)


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
