"""Where a pipeline's components are in a run: on the device while they are used, in main memory while they are not.

One large component at a time: what is asked for comes, and what is not used together with it goes.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import send_to_device
from torch import Tensor, nn

from dora_diffusion.layers.offloaded import home_of, plain_tensors
from dora_diffusion.training.base.swap import BlockSwap

_CPU = torch.device("cpu")


class Placement:
    """Moves a pipeline's components. On the CPU, or the meta device, nothing is moved.

    Args:
        pipe: a diffusers pipeline.
        device: where its models compute.
        together: components that are used together, so that none of them goes for another.
        fixed: components that stay where they are, come what may.
        swap: of the denoiser, some of whose blocks wait in main memory in any case.
    """

    def __init__(
        self,
        pipe: Any,
        device: torch.device,
        *,
        together: Collection[str] = (),
        fixed: Collection[str] = (),
        swap: BlockSwap | None = None,
    ) -> None:
        self.device, self._pipe, self._swap = device, pipe, swap
        self.together, self._fixed = frozenset(together), frozenset(fixed)

    def beside(self, *names: str) -> frozenset[str]:
        """Components, and all that may stay on the device while they are there."""
        return frozenset(names) | self._fixed | (self.together if self.together.intersection(names) else frozenset())

    def bring(self, *names: str) -> None:
        """Have components on the device, and all that is not used together with them in main memory."""
        if self.device.type in ("cpu", "meta"):
            return
        stays, models = self.beside(*names), self._models()
        for name, model in models.items():
            if name not in stays and _is_on(model, self.device):
                if self._swap is not None and self._swap.model is model:
                    self._swap.rest()
                _move(model, _CPU)
        for name in names:
            if name in models and name not in self._fixed and not _is_on(models[name], self.device):
                _move(models[name], self.device)

    def bring_together(self) -> None:
        """Have what is used together on the device."""
        self.bring(*sorted(self.together))

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """While the block lasts, each component comes for its own part of drawing a picture."""
        models = {} if self.device.type in ("cpu", "meta") else self._models()
        own = {name for name, model in models.items() if "forward" in vars(model)}
        try:
            for name, model in models.items():
                add_hook_to_module(model, _Comes(self, name))
            yield
        finally:
            for name, model in models.items():
                remove_hook_from_module(model)
                if name not in own:  # accelerate leaves the class's as the model's own
                    vars(model).pop("forward", None)

    def _models(self) -> dict[str, nn.Module]:
        parts = self._pipe.components.items()
        return {name: part for name, part in parts if isinstance(part, nn.Module) and _staying(part) is not None}


class _Comes(ModelHook):
    """Brings a component for its forward; where it computes is what diffusers asks of it."""

    def __init__(self, placement: Placement, name: str) -> None:
        self.execution_device, self._placement, self._name = placement.device, placement, name

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """As accelerate calls it."""
        self._placement.bring(self._name)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)


def _staying(model: nn.Module) -> Tensor | None:
    """One of a model's tensors that is not swapped and has numbers; None of a model without any."""
    return next((tensor for tensor in model.parameters() if not (tensor.is_meta or _is_swapped(tensor))), None)


def _is_swapped(tensor: Tensor) -> bool:
    return any(home_of(part) is not None for part in plain_tensors(tensor))


def _is_on(model: nn.Module, device: torch.device) -> bool:
    tensor = _staying(model)
    return tensor is not None and tensor.device == device


def _move(model: nn.Module, device: torch.device) -> None:
    """As `model.to(device)`, but for what is swapped; diffusers' own refuses quantised models, which their libraries
    move."""
    if not any(map(_is_swapped, model.parameters())):
        nn.Module.to(model, device)
        return
    for module in model.modules():
        if not any(map(_is_swapped, (*module.parameters(False), *module.buffers(False)))):
            module._apply(lambda tensor: tensor.to(device), recurse=False)
