"""What each adapter brings to one layer, and what a blend of them is as one module."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dora_diffusion.functional.blend_modes import AdapterTerm
from dora_diffusion.functional.dora import rows
from dora_diffusion.state import Module, ModuleState, term_of


@dataclass(frozen=True)
class Piece:
    """One adapter's module on the layer.

    Attributes:
        name: of the adapter.
        module: in fp32 (fp64 stays fp64), on the device where the layer is blended.
        strength: s.
    """

    name: str
    module: Module
    strength: float

    @property
    def is_dora(self) -> bool:
        """Whether it has a magnitude."""
        return self.module.magnitude is not None

    def pair(self) -> ModuleState:
        """As a low-rank pair, its magnitude flat."""
        pair = self.module.as_pair()
        return pair if pair.magnitude is None else replace(pair, magnitude=pair.magnitude.flatten())

    def term(self) -> AdapterTerm:
        """As a dense difference."""
        return term_of(self.module, self.strength)


@dataclass(frozen=True)
class Made:
    """A layer's new module; `error` is 0 where it is the blend by its form."""

    module: ModuleState
    error: float


def piece_of(name: str, module: Module, strength: float, weight: Tensor | None, path: str) -> Piece:
    """A piece, cast and moved; `weight` the layer's W, if it is at hand.

    Raises:
        ValueError: the module is for a weight of another shape.
    """
    shape = module.shape
    if weight is not None and shape != rows(weight).shape:
        raise ValueError(
            f"{path}: {name!r} is for a weight of {shape}, the base's is {tuple(weight.shape)}; "
            "is the adapter for another base model?"
        )
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in module.tensors.values()) else torch.float32
    return Piece(name, module.to(dtype=wide, device=None if weight is None else weight.device), strength)
