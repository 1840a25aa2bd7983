"""The layer that trains one adapter beside the frozen base layer: its parameters, and calls of `functional.dora`.

It keeps the very base module it stands in for, untouched, so that taking it out again leaves the model as it was.
`base_layers` knows the kinds of layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from dora_diffusion.functional.dora import (
    Rare,
    RowNorms,
    RowSums,
    SquaredNorms,
    compose,
    finished_norms,
    gain,
    norms_from,
    rare_rows,
    row_sums,
    squared_norms,
)
from dora_diffusion.functional.row_changes import RowChanges, row_changes
from dora_diffusion.layers.base_layers import Base, branch_dtype, dense_weight, kind_of
from dora_diffusion.layers.config import NormGrad
from dora_diffusion.layers.initialisation import InitialPair
from dora_diffusion.layers.offloaded import home_of, is_spread
from dora_diffusion.layers.step_counter import CLOCK, stamp
from dora_diffusion.layers.transparent import Transparent
from dora_diffusion.state import ModuleState


class Adapter(nn.Module):
    """The trainable parameters A, B and m of one layer: fp32 masters, also when the model around them is cast to less.

    With an anchor (A0, B0), which is frozen, D = s (B A - B0 A0).
    """

    def __init__(self, pair: InitialPair, magnitude: Tensor | None, *, scale: float) -> None:
        super().__init__()
        self.down = nn.Parameter(pair.down)
        self.up = nn.Parameter(pair.up)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.register_buffer("anchor_down", None if pair.anchor is None else pair.anchor.down)
        self.register_buffer("anchor_up", None if pair.anchor is None else pair.anchor.up)
        self.anchor_down: Tensor | None
        self.anchor_up: Tensor | None
        self.scale = scale

    def pair(self) -> tuple[Tensor, Tensor]:
        """(A, B) such that D = s B A."""
        if self.anchor_down is None or self.anchor_up is None:
            return self.down, self.up
        return torch.cat([self.down, self.anchor_down]), torch.cat([self.up, -self.anchor_up], dim=1)

    def state(self) -> ModuleState:
        """A copy of the parameters; an anchor doubles the rank."""
        down, up = (part.detach().clone() for part in self.pair())
        magnitude = None if self.magnitude is None else self.magnitude.detach().clone()
        return ModuleState(down, up, self.scale * down.shape[0], magnitude)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapter":
        """Moves go through; a cast below fp32 does not: in bf16 a step of 1e-4 on an m near 1 rounds away."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_less = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if is_less else moved

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self


@dataclass(frozen=True)
class _KeptNorm:
    """Norms, detached, and the facts under which they still hold."""

    facts: tuple[object, ...]
    sums: RowSums
    rare: Rare
    norms: RowNorms

    def __deepcopy__(self, memo: object) -> None:
        """A copy of the layer has parameters of its own, and nobody tells it of steps: it takes its norm anew."""


class DoRALayer(Transparent):
    """y = g (x W^T + s B(A x)) + b,  g = m / N(W + s B A); plain LoRA when the adapter has no magnitude.

    Any kind of base that `base_layers` knows. Dropout acts on the low-rank branch only. The output has the base's shape
    and dtype. The norm is taken anew at every forward, unless `keeps_norm`: then once an optimiser step (see
    `_kept_norm`). While `is_off` the layer is its base, and a norm that is kept stays. With `strength` it is
    y0 + strength (y - y0) of its base's y0, which is linear in the weights: W + strength (W' - W).
    """

    def __init__(self, base: Base, adapter: Adapter, *, dropout: float, norm_grad: NormGrad) -> None:
        super().__init__(base)
        self.adapter = adapter
        self.dropout = dropout
        self.norm_grad = norm_grad
        self.keeps_norm = False
        self.is_off = False
        self.strength = 1.0
        self._kept: _KeptNorm | None = None
        self._fresh: _KeptNorm | None = None  # what `refresh_norms` has taken since the last step
        self._is_spread = False  # a base weight that several processes keep is another tensor in a forward
        self._kind = kind_of(base)

    def forward(self, x: Tensor) -> Tensor:
        base: Tensor = self.base(x)
        if self.is_off:
            return base
        adapted = self._adapted(x, base)
        return adapted if self.strength == 1 else torch.lerp(base, adapted, self.strength)

    def _adapted(self, x: Tensor, base: Tensor) -> Tensor:
        kind, (down, up) = self._kind, self.adapter.pair()
        h = self.adapter.scale * kind.shrink(self.base, x, down.to(branch_dtype(x, base)), self._drop)
        low = kind.expand(self.base, h, up.to(h.dtype), None)
        g = self.gain()
        if g is None:
            return base + low
        bias = None if self.bias is None else kind.per_output(self.base, self.bias).to(base.dtype)
        return compose(base, low, kind.per_output(self.base, g), bias)

    @torch.no_grad()
    def row_changes(self) -> RowChanges:
        """How far the rows of W' have turned and stretched from those of W."""
        return row_changes(dense_weight(self.base), *self.adapter.pair(), self.adapter.scale, self.adapter.magnitude)

    def gain(self) -> Tensor | None:
        """g (out,) fp32, or None for plain LoRA."""
        magnitude = self.adapter.magnitude
        if magnitude is None:
            return None
        return gain(magnitude, self._norms())

    def _norms(self) -> RowNorms:
        """N(V), a constant in the backward pass when `norm_grad` is "detached" (paper, section 4.3)."""
        kept = self._fresh if torch.compiler.is_compiling() or self._is_spread else None
        if kept is None:
            kept = self._kept_norm()
        if self.norm_grad == "detached" or not torch.is_grad_enabled():
            return kept.norms
        weight, (down, up) = dense_weight(self.base), self.adapter.pair()
        return norms_from(kept.sums, weight, down, up, self.adapter.scale, rare=kept.rare)

    @_disable_dynamo  # torch.compiler.disable itself imports the compiler, which takes longer than torch, here and now
    def _kept_norm(self) -> _KeptNorm:
        """The norm that is kept, taken anew where it no longer holds.

        g depends on the parameters, not on x: one norm serves every micro-batch and the recomputation under gradient
        checkpointing. It is kept only under gradients, or once refreshed, and while the clock runs, and is old after
        any optimiser's step and when A, B, W or s are replaced, moved or edited in place. An edit through `.data`
        outside an optimiser leaves no trace: `forget_norm` is for that.
        """
        facts = self._facts()
        if facts and self._kept is not None and self._kept.facts == facts:
            return self._kept
        sums, squared = self._squared_norm()
        (rare,) = rare_rows([squared])
        return self._keep(facts, sums, squared, rare)

    @torch.no_grad()
    def _squared_norm(self) -> tuple[RowSums, SquaredNorms]:
        weight, (down, up) = dense_weight(self.base), self.adapter.pair()
        sums = row_sums(weight, down)
        return sums, squared_norms(sums, weight, down, up, self.adapter.scale)

    @torch.no_grad()
    def _keep(self, facts: tuple[object, ...], sums: RowSums, squared: SquaredNorms, rare: Rare) -> _KeptNorm:
        down, up = self.adapter.pair()
        norms = finished_norms(squared, rare, partial(dense_weight, self.base), down, up, self.adapter.scale)
        kept = _KeptNorm(facts, sums, rare, norms)
        self._kept = kept if facts else None
        return kept

    def _facts(self) -> tuple[object, ...]:
        """What a kept norm depends on; empty when none may be kept."""
        now = CLOCK.now
        if not self.keeps_norm or now is None or not (torch.is_grad_enabled() or self._fresh is not None):
            return ()
        a, weight, home = self.adapter, self.base.weight, home_of(self.base.weight)
        return now, a.scale, stamp(a.down), stamp(a.up), stamp(weight if home is None else home)

    def forget_norm(self) -> None:
        """Take the norm anew at the next forward."""
        self._kept = self._fresh = None

    def outdated(self) -> None:
        """An optimiser has stepped: a norm that was refreshed is old."""
        self._fresh = None

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DoRALayer":
        self.forget_norm()
        super()._apply(fn, recurse)
        return self


def refresh(layers: Sequence[DoRALayer]) -> None:
    """Take the norms of layers that do not hold any more, with one wait for the device in all; see `refresh_norms`."""
    with torch.enable_grad():  # facts are those of training
        facts = {layer: layer._facts() for layer in layers if layer.adapter.magnitude is not None}
    stale = [layer for layer, now in facts.items() if layer._kept is None or layer._kept.facts != now]
    taken = [layer._squared_norm() for layer in stale]
    for layer, (sums, squared), rare in zip(stale, taken, rare_rows([one for _, one in taken]), strict=True):
        layer._keep(facts[layer], sums, squared, rare)
    for layer in facts:
        layer._fresh, layer._is_spread = layer._kept, is_spread(layer.base.weight)
        CLOCK.tell(layer)
