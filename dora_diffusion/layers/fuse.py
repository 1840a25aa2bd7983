"""Fuse mixes into weights, and undo it bit for bit (the base's own bytes are kept, never divided back)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dora_diffusion.functional.dora import GainForm, apply_gain_form
from dora_diffusion.layers.base_layers import Base, dense_weight, stored_as
from dora_diffusion.layers.quantisation import is_quantised


class FusedWeights:
    """Layers that now hold an adapter mix; `undo()` gives each parameter back the very memory it had.

    Until then a layer says so itself (`is_fused`): who reads its weight as the base's would be misled.
    """

    def __init__(self, kept: Mapping[str, tuple[Base, Tensor]], *, saves_base: bool = False) -> None:
        """`saves_base`: state dicts hold the base's weights meanwhile, not the mix."""
        self._kept = dict(kept)
        self._hooks: list[RemovableHandle] = []
        for layer, weight in self._kept.values():
            layer.is_fused = True
            self._hooks.append(refuse_loading(layer, "they are folded into its weights: undo that first"))
            if saves_base:
                self._hooks.append(on_saving(layer, partial(save_kept, name="weight", kept=weight)))

    def undo(self) -> None:
        """Put the kept weights back: nothing is computed, or copied but for a model that has since moved."""
        for layer, weight in self._kept.values():
            layer.weight.data = weight.to(layer.weight.device)
            layer.is_fused = False
        for hook in self._hooks:
            hook.remove()
        self._kept.clear()


def on_saving(layer: Any, change: Callable[[Any, Any, str, Any], None]) -> RemovableHandle:
    """Let a function (layer, state dict, prefix, metadata) change what is saved of a layer."""
    handle: RemovableHandle = layer.register_state_dict_post_hook(change)
    return handle


def refuse_loading(layer: Any, why: str) -> RemovableHandle:
    """Let `load_state_dict` say that what it loads would be lost again."""

    def refuse(module: Any, state: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
        if any(key.startswith(prefix) for key in state):
            raise ValueError(f"a state dict cannot be loaded into {prefix.rstrip('.')} under adapters: {why}")

    handle: RemovableHandle = layer.register_load_state_dict_pre_hook(refuse)
    return handle


def save_kept(layer: Any, state: Any, prefix: str, metadata: Any, *, name: str, kept: Tensor) -> None:
    """A hook that puts a parameter's own value into a state dict; the live one holds a mix."""
    live = state[prefix + name]
    state[prefix + name] = kept.to(live.device, live.dtype)


Change = Callable[[Tensor], Tensor]  # W (out, in[, kernel]) in the layer's dtype -> W', rounded to it when fused


def fuse_weights(layers: Mapping[str, tuple[Base, GainForm]]) -> FusedWeights:
    """Replace each layer's weight by its gain form's, in fp32 and rounded once; errors as `fuse_weights_by`."""
    return fuse_weights_by(
        {path: (layer, partial(apply_gain_form, form=form)) for path, (layer, form) in layers.items()}
    )


def check_fusable(path: str, layer: Base) -> None:
    """A ValueError of one line for a layer whose weight is quantised."""
    if is_quantised(layer) or layer.weight.dtype.itemsize == 1:
        raise ValueError(f"{path}: a quantised {type(layer).__name__} cannot be folded; leave the adapter unfused")


@torch.no_grad()
def fuse_weights_by(layers: Mapping[str, tuple[Base, Change]], *, saves_base: bool = False) -> FusedWeights:
    """Replace each layer's weight by what its change makes of it; `saves_base` as in `FusedWeights`.

    Raises:
        ValueError: a layer is quantised. Whatever is raised, no weight has changed then.
    """
    for path, (layer, _) in layers.items():
        check_fusable(path, layer)
    undoable = FusedWeights(
        {path: (layer, layer.weight.data) for path, (layer, _) in layers.items()}, saves_base=saves_base
    )
    try:
        for layer, change in layers.values():
            fused = change(dense_weight(layer)).to(layer.weight.dtype)
            layer.weight.data = stored_as(layer, fused)
    except BaseException:  # out of memory, or stopped: all of it or nothing
        undoable.undo()
        raise
    return undoable
