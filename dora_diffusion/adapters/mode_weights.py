"""The modes that are no sum of adapters: what each makes of a layer's weight, computed densely to be folded in."""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from dora_diffusion.adapters.matching import Loaded
from dora_diffusion.functional.blend_modes import MODES
from dora_diffusion.functional.dora import master_dtype
from dora_diffusion.functional.strengths import Weight, is_meant, strength_at
from dora_diffusion.layers.base_layers import Base
from dora_diffusion.layers.fuse import Change
from dora_diffusion.state import ModuleState, term_of

Meant = Sequence[tuple[ModuleState, float]]


def mode_changes(
    blend: str, bases: Mapping[str, Base], adapters: Mapping[str, Loaded], weights: Mapping[str, Weight]
) -> dict[str, tuple[Base, Change]]:
    """Path -> the layer, and what a mode makes of its weight; of the layers that some strength speaks of, be it 0."""
    meant = {path: _meant(path, adapters, weights) for path in bases}
    return {path: (bases[path], partial(_mixed, path=path, blend=blend, meant=m)) for path, m in meant.items() if m}


def _meant(path: str, adapters: Mapping[str, Loaded], weights: Mapping[str, Weight]) -> Meant:
    """The adapters on a layer and their strengths, in the order that `weights` names them."""
    here = [(adapters[name].modules.get(path), weight) for name, weight in weights.items()]
    return [(module, strength_at(path, weight)) for module, weight in here if module and is_meant(path, weight)]


def _mixed(weight: Tensor, *, path: str, blend: str, meant: Meant) -> Tensor:
    """W' of a mode, fp32 (fp64 stays fp64), from the layer's own weight."""
    terms = [term_of(module.to(device=weight.device), strength) for module, strength in meant]
    try:
        return MODES[blend](weight.to(master_dtype(weight.dtype)), terms)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
