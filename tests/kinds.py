"""One small layer of every kind that can carry an adapter, for tests that must hold for all of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dora_diffusion.layers.base_layers import dense_weight
from dora_diffusion.layers.dora import DoRALayer

Make = Callable[[bool], nn.Module]


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


# id -> (bias -> layer, shape of an input)
LAYERS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "linear": (lambda bias: nn.Linear(6, 5, bias=bias), (2, 3, 6)),
    "conv": (lambda bias: nn.Conv2d(4, 5, 3, stride=2, padding=2, dilation=2, bias=bias), (2, 4, 9, 9)),
    "circular": (lambda bias: nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular", bias=bias), (2, 4, 6, 6)),
    "grouped": (lambda bias: nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=bias), (2, 4, 5, 5)),
    "depthwise": (lambda bias: nn.Conv2d(4, 4, 3, padding="same", groups=4, bias=bias), (2, 4, 5, 5)),
    "conv1d": (lambda bias: nn.Conv1d(4, 5, 3, stride=2, padding=1, padding_mode="reflect", bias=bias), (2, 4, 9)),
    "conv3d": (lambda bias: nn.Conv3d(2, 5, 2, bias=bias), (2, 2, 3, 4, 4)),
    "embedding": (lambda bias: nn.Embedding(11, 5, padding_idx=3), (2, 7)),
}
KINDS = pytest.mark.parametrize("kind", LAYERS)


def make_model(kind: str, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> Holder:
    """The layer in a model, its weights always the same."""
    torch.manual_seed(0)
    return Holder(LAYERS[kind][0](bias)).to(dtype)


def make_input(kind: str, dtype: torch.dtype = torch.float32, *, seed: int = 3) -> Tensor:
    """An input of the kind: numbers, or token ids."""
    generator = torch.Generator().manual_seed(seed)
    shape = LAYERS[kind][1]
    if kind == "embedding":
        return torch.tensor([[0, 1, 2, 4, 5, 1, 10], [9, 8, 7, 6, 0, 0, 5]])
    return torch.randn(shape, generator=generator).to(dtype)


@torch.no_grad()
def disturb(layer: DoRALayer, *, seed: int = 1) -> None:
    """Give A, B and m values as after training, B far from 0."""
    generator = torch.Generator().manual_seed(seed)
    adapter = layer.adapter
    for parameter in (adapter.down, adapter.up):
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if adapter.magnitude is not None:
        adapter.magnitude.mul_(1 + 0.3 * torch.rand(adapter.magnitude.shape, generator=generator))


def with_weight(base: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """What the base would answer if its matrix (out, in[, kernel]) were `weight`."""
    stored = weight.T if isinstance(base, nn.Embedding) else weight
    return torch.func.functional_call(base, {"weight": stored.to(base.weight.dtype)}, (x,))


def reference(layer: DoRALayer, x: Tensor, *, norm_grad: str = "exact") -> Tensor:
    """The layer's answer by its dense weight, differentiable in A, B and m, by nothing but the paper's equation."""
    a, weight = layer.adapter, dense_weight(layer.base)
    delta = a.scale * (a.up.flatten(1) @ a.down.flatten(1)).reshape(weight.shape)
    dense = weight + delta
    if a.magnitude is not None:
        norm = dense.flatten(1).norm(dim=1)
        norm = norm.detach() if norm_grad == "detached" else norm
        dense = dense * (a.magnitude / norm).reshape(-1, *[1] * (weight.dim() - 1))
    return with_weight(layer.base, dense, x)
