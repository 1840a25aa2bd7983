"""Whose adapters are in a model: one manager's at a time, and none in a model that takes another's place."""

import warnings
from collections.abc import Mapping
from typing import Protocol
from weakref import WeakKeyDictionary, ref

from torch import nn

from dora_diffusion.layers.blended import BlendedLayer
from dora_diffusion.layers.dora import DoRALayer

_MARKS = ("is_fused", "holds_offset")


class Holder(Protocol):
    """A manager."""

    @property
    def names(self) -> tuple[str, ...]: ...
    def unload(self) -> None: ...


# While adapters are in a model, its hooks keep their manager alive.
_HOLDERS: WeakKeyDictionary[nn.Module, ref[Holder]] = WeakKeyDictionary()


def take_over(manager: Holder, models: Mapping[str, nn.Module | None]) -> None:
    """Unload another manager's adapters from models that get this one's: it would go on as if they were there."""
    for component, model in models.items():
        if model is None:
            continue
        holder = _HOLDERS[model]() if model in _HOLDERS else None
        if holder is not None and holder is not manager and holder.names:
            names = ", ".join(holder.names)
            holder.unload()
            warnings.warn(
                f"another AdapterManager had adapters on {component} ({names}): they are unloaded; keep one manager "
                "for pipelines that share a model",
                stacklevel=4,
            )
        _HOLDERS[model] = ref(manager)


def refuse_held(component: str, model: nn.Module) -> None:
    """A ValueError for a model that holds adapters already: its parameters are not its own."""
    ours = (isinstance(module, BlendedLayer | DoRALayer) for module in model.modules())
    marked = (getattr(module, mark, False) for module in model.modules() for mark in _MARKS)
    if any(ours) or any(marked):
        raise ValueError(
            f"{component} was replaced by a model that holds adapters (a copy?): unload before copying one"
        )
