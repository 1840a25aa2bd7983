"""Fold gain forms into weights, and unfold them bit for bit (the base's own bytes are kept, never divided back)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dora_diffusion.bases import Base, dense_weight
from dora_diffusion.functional import GainForm, apply_gain_form
from dora_diffusion.quantised import is_quantised


class Fold:
    """Layers that now hold an adapter mix; `undo()` gives each parameter back the very memory it had."""

    def __init__(self, kept: Mapping[str, tuple[Base, Tensor]]) -> None:
        self._kept = dict(kept)

    def undo(self) -> None:
        """Put the kept weights back: nothing is computed, or copied but for a model that has since moved."""
        for layer, weight in self._kept.values():
            layer.weight.data = weight.to(layer.weight.device)
        self._kept.clear()


@torch.no_grad()
def fold(layers: Mapping[str, tuple[Base, GainForm]]) -> Fold:
    """Replace each layer's weight by its gain form's, computed in fp32 and rounded once.

    Raises:
        ValueError: a layer is quantised. Whatever is raised, no weight has changed then.
    """
    for path, (layer, _) in layers.items():
        if is_quantised(layer) or layer.weight.dtype.itemsize == 1:
            raise ValueError(f"{path}: a quantised {type(layer).__name__} cannot be folded; leave the adapter unfused")
    undoable = Fold({path: (layer, layer.weight.data) for path, (layer, _) in layers.items()})
    try:
        for layer, form in layers.values():
            folded = apply_gain_form(dense_weight(layer), form)
            layer.weight.data = folded.T.contiguous() if isinstance(layer, nn.Embedding) else folded
    except BaseException:  # out of memory, or stopped: all of it or nothing
        undoable.undo()
        raise
    return undoable
