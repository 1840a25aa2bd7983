"""Fold gain forms into weights, and unfold them bit for bit (the base's own bytes are kept, never divided back)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dora_diffusion.functional import GainForm, apply_gain_form
from dora_diffusion.layers import Adaptable


class Fold:
    """Weights that now hold an adapter mix; `undo()` restores the bytes that were there."""

    def __init__(self, kept: Mapping[str, tuple[Adaptable, Tensor]]) -> None:
        self._kept = dict(kept)

    @torch.no_grad()
    def undo(self) -> None:
        """Put the kept weights back."""
        for layer, weight in self._kept.values():
            layer.weight.copy_(weight)
        self._kept.clear()


@torch.no_grad()
def fold(layers: Mapping[str, tuple[Adaptable, GainForm]]) -> Fold:
    """Replace each layer's weight by its gain form's, computed in fp32 and rounded once.

    Raises:
        ValueError: a weight is not a plain floating-point tensor (quantised layers cannot be folded).
    """
    for path, (layer, _) in layers.items():
        if type(layer) not in (nn.Linear, nn.Conv2d) or not layer.weight.is_floating_point():
            raise ValueError(f"{path}: {type(layer).__name__} cannot be folded; leave the adapter unfused")
    kept = {path: (layer, layer.weight.detach().clone()) for path, (layer, _) in layers.items()}
    for layer, form in layers.values():
        layer.weight.copy_(apply_gain_form(layer.weight, form))
    return Fold(kept)
