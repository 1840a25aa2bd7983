"""Layers that hold an adapter's parameters beside the frozen base layer and call the mathematics of `functional`.

`DoRALinear` and `DoRAConv2d` train one adapter. `BlendedLayer` draws with any sum of adapters. Each keeps the very
base module it stands in for, untouched, so that taking it out again leaves the model as it was.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_diffusion.functional import GainForm, compose, dora_gain, initial_magnitude, rows, scale_of
from dora_diffusion.state import ModuleState

NormGrad = Literal["detached", "exact"]
Adaptable = nn.Linear | nn.Conv2d


class Adapter(nn.Module):
    """The trainable parameters A, B and m of one layer, fp32 whatever the base's dtype."""

    def __init__(self, base: Adaptable, *, rank: int, alpha: float, use_dora: bool, generator: torch.Generator) -> None:
        super().__init__()
        out, *rest = base.weight.shape
        device = base.weight.device
        down = torch.empty(rank, *rest)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(out, rank, *[1] * (len(rest) - 1), device=device))
        self.magnitude = nn.Parameter(initial_magnitude(base.weight.detach().float())) if use_dora else None
        self.alpha = alpha
        self.scale = scale_of(alpha, rank)

    def gain(self, weight: Tensor, norm_grad: NormGrad) -> Tensor | None:
        """g (out,) fp32, or None for plain LoRA."""
        if self.magnitude is None:
            return None
        return dora_gain(weight, self.down, self.up, self.scale, self.magnitude, exact=norm_grad == "exact")

    def state(self) -> ModuleState:
        """A copy of the parameters."""
        magnitude = None if self.magnitude is None else self.magnitude.detach().clone()
        return ModuleState(self.down.detach().clone(), self.up.detach().clone(), self.alpha, magnitude)


class DoRALinear(nn.Module):
    """y = g (x W^T + s B(A x)) + b; plain LoRA when the adapter has no magnitude.

    Dropout acts on the low-rank branch only. Input (..., in), output (..., out) in the base's dtype.
    """

    def __init__(self, base: nn.Linear, adapter: Adapter, *, dropout: float, norm_grad: NormGrad) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.dropout = dropout
        self.norm_grad = norm_grad

    def forward(self, x: Tensor) -> Tensor:
        base: Tensor = self.base(x)
        a = self.adapter
        inner = F.linear(F.dropout(x, self.dropout, self.training), a.down.to(x.dtype))
        low = a.scale * F.linear(inner, a.up.to(inner.dtype))
        g = a.gain(self.base.weight, self.norm_grad)
        if g is None:
            return base + low
        return compose(base, low, g.reshape(*[1] * (base.dim() - 1), -1), self.base.bias)

    @property
    def weight(self) -> Tensor:
        """The base's weight (some model code asks a layer for its dtype)."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias


class DoRAConv2d(nn.Module):
    """As DoRALinear for convolutions: A has the base's kernel, stride, padding and dilation; B is 1 x 1."""

    def __init__(self, base: nn.Conv2d, adapter: Adapter, *, dropout: float, norm_grad: NormGrad) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.dropout = dropout
        self.norm_grad = norm_grad

    def forward(self, x: Tensor) -> Tensor:
        base: Tensor = self.base(x)
        a = self.adapter
        inner = _convolve_like(self.base, F.dropout(x, self.dropout, self.training), a.down.to(x.dtype))
        low = a.scale * F.conv2d(inner, a.up.to(inner.dtype))
        g = a.gain(self.base.weight, self.norm_grad)
        if g is None:
            return base + low
        bias = self.base.bias
        return compose(base, low, g.reshape(1, -1, 1, 1), None if bias is None else bias.reshape(1, -1, 1, 1))

    @property
    def weight(self) -> Tensor:
        """The base's weight (some model code asks a layer for its dtype)."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias


def _convolve_like(base: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """Convolve with another kernel under the base's stride, padding, padding mode and dilation."""
    padding: str | tuple[int, ...] = base.padding
    if base.padding_mode != "zeros":
        x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
        padding = (0, 0)
    return F.conv2d(x, weight, None, base.stride, padding, base.dilation)


class BlendedLayer(nn.Module):
    """A frozen base layer under a gain form: y = base(x) + (c - 1)(base(x) - b) + P(Q x). For drawing, not training.

    Without a form it is the base, bit for bit.
    """

    def __init__(self, base: Adaptable) -> None:
        super().__init__()
        self.base = base
        self.form: GainForm | None = None

    def forward(self, x: Tensor) -> Tensor:
        base: Tensor = self.base(x)
        if self.form is None:
            return base
        form = self.form.to(x.device)
        if isinstance(self.base, nn.Conv2d):
            offset = form.gain_offset.reshape(1, -1, 1, 1)
            bias = None if self.base.bias is None else self.base.bias.reshape(1, -1, 1, 1)
            right = form.right.reshape(-1, *self.base.weight.shape[1:]).to(x.dtype)
            low = F.conv2d(_convolve_like(self.base, x, right), form.left[:, :, None, None].to(x.dtype))
        else:
            offset, bias = form.gain_offset, self.base.bias
            low = F.linear(F.linear(x, form.right.to(x.dtype)), form.left.to(x.dtype))
        scaled = base if bias is None else base - bias
        return base + offset.to(base.dtype) * scaled + low

    @property
    def weight(self) -> Tensor:
        """The base's weight (some model code asks a layer for its dtype)."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias


def check_adaptable(path: str, module: nn.Module) -> Adaptable:
    """The module, if it can carry an adapter; else a ValueError that names it."""
    if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.is_floating_point():
        raise ValueError(f"{path}: a weight quantised to {module.weight.dtype} cannot be adapted yet; load it in bf16")
    if isinstance(module, nn.Linear):
        return module
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            raise ValueError(
                f"{path}: a convolution in {module.groups} groups cannot be adapted; leave it out of target_modules"
            )
        return module
    raise ValueError(f"{path}: expected nn.Linear or nn.Conv2d, got {type(module).__name__}")


def check_shapes(path: str, state: ModuleState, base: Adaptable) -> None:
    """Raise a ValueError of one line when an adapter's tensors do not fit a layer."""
    out, *rest = base.weight.shape
    flat = rows(base.weight).shape[1]
    fits = list(state.down.shape[1:]) in (rest, [flat]) and rows(state.up).shape == (out, state.rank)
    if not fits:
        got = f"A {tuple(state.down.shape)}, B {tuple(state.up.shape)}"
        raise ValueError(
            f"{path}: {got} do not fit a weight of {tuple(base.weight.shape)}; is this another base model?"
        )
    if state.magnitude is not None and state.magnitude.shape != (out,):
        raise ValueError(f"{path}: magnitude has shape {tuple(state.magnitude.shape)}, expected ({out},)")
