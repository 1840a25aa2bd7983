"""Layers that hold an adapter's parameters beside the frozen base layer and call the mathematics of `functional`.

`DoRALayer` trains one adapter. `BlendedLayer` draws with any sum of adapters. Each keeps the very base module it stands
in for, untouched, so that taking it out again leaves the model as it was. `bases` knows the kinds of layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from dora_diffusion.bases import Base, dense_weight, kind_of, logical_shape
from dora_diffusion.functional import GainForm, RowNorms, RowSums, compose, gain, norms_from, row_sums, rows
from dora_diffusion.initialisation import Pair
from dora_diffusion.state import ModuleState
from dora_diffusion.step_clock import CLOCK, stamp

NormGrad = Literal["detached", "exact"]
NORM_GRADS: tuple[NormGrad, ...] = ("detached", "exact")


class Adapter(nn.Module):
    """The trainable parameters A, B and m of one layer: fp32 masters, also when the model around them is cast to less.

    With an anchor (A0, B0), which is frozen, D = s (B A - B0 A0).
    """

    def __init__(self, pair: Pair, magnitude: Tensor | None, *, scale: float) -> None:
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
    norms: RowNorms


def _dtype_of(x: Tensor, base: Tensor) -> torch.dtype:
    """What the low-rank branch computes in: the input's dtype, or the base's output's where the input is token ids."""
    return x.dtype if x.is_floating_point() else base.dtype


class DoRALayer(nn.Module):
    """y = g (x W^T + s B(A x)) + b,  g = m / N(W + s B A); plain LoRA when the adapter has no magnitude.

    Any kind of base that `bases` knows. Dropout acts on the low-rank branch only. The output has the base's shape and
    dtype. The norm is taken anew at every forward, unless `keeps_norm`: then once an optimiser step (see `_norms`).
    """

    def __init__(self, base: Base, adapter: Adapter, *, dropout: float, norm_grad: NormGrad) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.dropout = dropout
        self.norm_grad = norm_grad
        self.keeps_norm = False
        self._kept: _KeptNorm | None = None
        self._kind = kind_of(base)

    def forward(self, x: Tensor) -> Tensor:
        base: Tensor = self.base(x)
        kind, (down, up) = self._kind, self.adapter.pair()
        h = self.adapter.scale * kind.shrink(self.base, x, down.to(_dtype_of(x, base)), self._drop)
        low = kind.expand(self.base, h, up.to(h.dtype), None)
        g = self.gain()
        if g is None:
            return base + low
        bias = None if self.bias is None else kind.per_output(self.base, self.bias)
        return compose(base, low, kind.per_output(self.base, g), bias)

    def gain(self) -> Tensor | None:
        """g (out,) fp32, or None for plain LoRA."""
        magnitude = self.adapter.magnitude
        if magnitude is None:
            return None
        return gain(magnitude, self._norms())

    @_disable_dynamo  # torch.compiler.disable itself imports the compiler, which takes longer than torch, here and now
    def _norms(self) -> RowNorms:
        """N(V), a constant in the backward pass when `norm_grad` is "detached" (paper, section 4.3).

        g depends on the parameters, not on x: one norm serves every micro-batch and the recomputation under gradient
        checkpointing. It is kept only under gradients and while the clock runs, and is old after any optimiser's step
        and when A, B, W or s are replaced, moved or edited in place. An edit through `.data` outside an optimiser
        leaves no trace: `forget_norm` is for that.
        """
        facts = self._facts()
        kept = self._kept if self._kept is not None and self._kept.facts == facts else None
        is_exact = self.norm_grad == "exact"
        if kept is not None and not is_exact:
            return kept.norms
        with torch.set_grad_enabled(is_exact and torch.is_grad_enabled()):
            weight, (down, up) = dense_weight(self.base), self.adapter.pair()
            sums = kept.sums if kept is not None else row_sums(weight, down)
            norms = norms_from(sums, weight, down, up, self.adapter.scale)
        self._kept = _KeptNorm(facts, sums, RowNorms(norms.values.detach(), norms.dead)) if facts else None
        return norms

    def _facts(self) -> tuple[object, ...]:
        """What a kept norm depends on; empty when none may be kept."""
        now = CLOCK.now
        if not self.keeps_norm or now is None or not torch.is_grad_enabled():
            return ()
        a = self.adapter
        return now, a.scale, stamp(a.down), stamp(a.up), stamp(self.base.weight)

    def forget_norm(self) -> None:
        """Take the norm anew at the next forward."""
        self._kept = None

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DoRALayer":
        self.forget_norm()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def weight(self) -> Tensor:
        """The base's weight (some model code asks a layer for its dtype)."""
        return self.base.weight  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return getattr(self.base, "bias", None)


class BlendedLayer(nn.Module):
    """A frozen base layer under a sum of adapters in gain form. For drawing, not training.

        y = base(x) + (c - 1)(base(x) - b) + P (mix * Q x)          and  + W (c_in - 1) x  for magnitudes of the in axis

    `hold` lays the adapters' P and Q side by side; `weigh` sets their strengths, which touches c and mix alone. Without
    adapters it is the base, bit for bit. With `room` the buffers have a fixed shape, padded with zeros, so that a
    compiled model swaps adapters without compiling anew.
    """

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = base
        self._kind = kind_of(base)
        for name in ("offset", "shift", "mix", "left", "right", "in_offset"):
            self.register_buffer(name, None, persistent=False)
        self.offset: Tensor | None  # c - 1, (out,); None when no adapter scales outputs
        self.shift: Tensor | None  # -(c - 1) b, (out,): the bias never scales
        self.mix: Tensor | None  # each adapter's strength, once for each of its ranks, (R,); again for each group
        self.left: Tensor | None  # P at strength 1, (out, R[, 1, 1])
        self.right: Tensor | None  # Q, (R, in[, kernel])
        self.in_offset: Tensor | None  # c_in - 1, (in,); None when no adapter scales inputs
        self._held = _Held(*[torch.empty(0)] * 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.left is None or self.right is None or self.mix is None:
            base: Tensor = self.base(x)
            return base
        kind, y = self._kind, self._scaled(x)
        h = kind.shrink(self.base, x, self.right.to(_dtype_of(x, y)), _keep_all)
        h = h * kind.per_output(self.base, self.mix).to(h.dtype)
        shift = None if self.shift is None else self.shift.to(h.dtype)
        return y + kind.expand(self.base, h, self.left.to(h.dtype), shift)

    def _scaled(self, x: Tensor) -> Tensor:
        """base(x) + (c - 1) base(x) + W (c_in - 1) x; the bias is put right by `shift`."""
        base: Tensor
        if self.in_offset is None or self._kind.per_input is None:
            return self._scale_outputs(self.base(x))
        pulled = x * self._kind.per_input(self.base, self.in_offset).to(x.dtype)
        if self.offset is None:
            base = self.base(x + pulled)
            return base
        extra: Tensor = self.base(pulled)
        if self.bias is not None:
            extra = extra - self._kind.per_output(self.base, self.bias)
        return self._scale_outputs(self.base(x)) + extra

    def _scale_outputs(self, base: Tensor) -> Tensor:
        if self.offset is None:
            return base
        return torch.addcmul(base, base, self._kind.per_output(self.base, self.offset).to(base.dtype))

    @torch.no_grad()
    def hold(self, terms: Sequence[GainForm], room: int | None = None) -> None:
        """Take up adapters, each as its gain form at strength 1; `weigh` must follow.

        Args:
            terms: gain forms on this base; their order is that of `weigh`'s strengths.
            room: the total rank of the buffers whatever `terms` need; None = as they need.
        """
        ranks = [term.right.shape[0] for term in terms]
        if room is not None and sum(ranks) > room:
            raise ValueError(f"adapters of rank {sum(ranks)} in all do not fit the {room} that were set aside")
        if not terms and room is None:
            self.offset = self.shift = self.mix = self.left = self.right = self.in_offset = None
            return
        if room is None or self.left is None:
            self._allocate(terms, room)
        left, right = self.left, self.right
        assert left is not None and right is not None
        left.zero_()
        right.zero_()
        if terms:
            rows(left)[:, : sum(ranks)] = torch.cat([term.left for term in terms], dim=1)
            rows(right)[: sum(ranks)] = torch.cat([term.right for term in terms])
        self._held = _held(terms, left)

    def _allocate(self, terms: Sequence[GainForm], room: int | None) -> None:
        """Buffers in the dtype that the base computes in."""
        (out, *rest), weight = logical_shape(self.base), self.base.weight
        total = room if room is not None else sum(term.right.shape[0] for term in terms)
        computes = weight.is_floating_point() and weight.dtype.itemsize > 1  # fp8 only stores
        dtype = weight.dtype if computes else torch.float32
        flat = [1] * (len(rest) - 1)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=weight.device)

        self.left, self.right = zeros(out, total, *flat), zeros(total, *rest)
        self.mix = zeros(total * getattr(self.base, "groups", 1))
        scales_outputs = room is not None or any(bool(term.gain_offset.any()) for term in terms)
        self.offset = zeros(out) if scales_outputs else None
        self.shift = zeros(out) if scales_outputs and self.bias is not None else None
        self.in_offset = zeros(rest[0]) if any(term.in_offset is not None for term in terms) else None

    @torch.no_grad()
    def weigh(self, strengths: Tensor) -> None:
        """Set the strengths (n,) fp32 of the adapters that `hold` took up, in its order."""
        if self.mix is None:
            return
        held = self._held = self._held.on(strengths.device)  # the layer may have moved: CPU offload does at every call
        per_rank = torch.cat([strengths, strengths.new_zeros(1)])[held.owners]
        self.mix.copy_(per_rank.repeat(len(self.mix) // len(per_rank)))
        if self.offset is not None:
            offset = strengths @ held.offsets
            self.offset.copy_(offset)
            if self.shift is not None and self.bias is not None:
                self.shift.copy_(-offset * self.bias)
        if self.in_offset is not None:
            self.in_offset.copy_(strengths @ held.in_offsets)

    @property
    def weight(self) -> Tensor:
        """The base's weight (some model code asks a layer for its dtype)."""
        return self.base.weight  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return getattr(self.base, "bias", None)


def _keep_all(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class _Held:
    """What `weigh` needs of the n adapters: who owns each rank (R,), and their gain offsets at strength 1, fp32.

    A rank that nobody owns (padding) belongs to number n, whose strength is 0.
    """

    owners: Tensor
    offsets: Tensor
    in_offsets: Tensor

    def on(self, device: torch.device) -> "_Held":
        """The same on a device; itself when it is there already."""
        if self.offsets.device == device:
            return self
        return _Held(self.owners.to(device), self.offsets.to(device), self.in_offsets.to(device))


def _held(terms: Sequence[GainForm], left: Tensor) -> _Held:
    owners = [index for index, term in enumerate(terms) for _ in range(term.right.shape[0])]
    owners += [len(terms)] * (left.shape[1] - len(owners))
    device, none = left.device, torch.zeros(0, left.shape[0], device=left.device)
    offsets = torch.stack([term.gain_offset for term in terms]) if terms else none
    inputs = [term.in_offset for term in terms]
    known = next((offset for offset in inputs if offset is not None), None)
    in_offsets = none
    if known is not None:
        in_offsets = torch.stack([torch.zeros_like(known) if offset is None else offset for offset in inputs])
    return _Held(torch.tensor(owners, device=device), offsets, in_offsets)
