"""A small base of two components and adapters of several kinds on it."""

import torch
from torch import Tensor

from dora_diffusion.functional.dora import Axis
from dora_diffusion.state import AdapterState, FactoredState, Module, ModuleState

LINEAR = "unet.down_blocks.0.attn.to_q"
CONV = "unet.up_blocks.1.conv"
TEXT = "text_encoder.encoder.layers.0.q_proj"
SHAPES: dict[str, tuple[int, ...]] = {LINEAR: (12, 10), CONV: (9, 8, 3, 3), TEXT: (11, 11)}


def base(path: str, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """W of a layer: the base as a function."""
    if path not in SHAPES:
        raise ValueError(f"layer {path} is not there")
    generator = torch.Generator().manual_seed(len(path))
    return torch.randn(SHAPES[path], generator=generator, dtype=torch.float64).to(dtype)


def dora_module(
    path: str, seed: int, *, rank: int = 2, dora: bool = True, axis: Axis = "out", dtype: torch.dtype = torch.float64
) -> ModuleState:
    """A pair of some size on a layer, its scale not 1, its magnitude near N(W)'s."""
    generator = torch.Generator().manual_seed(seed)
    out, *tail = SHAPES[path]
    down = torch.randn(rank, *tail, generator=generator, dtype=dtype)
    up = 0.3 * torch.randn(out, rank, *[1] * (len(tail) - 1), generator=generator, dtype=dtype)
    weight = base(path, dtype=dtype)
    lengths = (weight if axis == "out" else weight.transpose(0, 1)).flatten(1).norm(dim=1)
    share = 0.7 + 0.8 * torch.rand(lengths.shape, generator=generator, dtype=dtype)
    return ModuleState(down, up, 1.5 * rank, share * lengths if dora else None, axis=axis)


def full_module(path: str, seed: int) -> FactoredState:
    """A whole difference."""
    generator = torch.Generator().manual_seed(seed)
    return FactoredState("full", {"diff": 0.1 * torch.randn(SHAPES[path], generator=generator, dtype=torch.float64)})


def adapter(seed: int, *, paths: tuple[str, ...] = tuple(SHAPES), **settings) -> AdapterState:
    """An adapter on some layers; settings of `dora_module`."""
    modules: dict[str, Module] = {path: dora_module(path, seed + n, **settings) for n, path in enumerate(paths)}
    return AdapterState(modules, {"ss_seed": str(seed), "dora_diffusion.family": "sd1", "modelspec.title": f"A{seed}"})
