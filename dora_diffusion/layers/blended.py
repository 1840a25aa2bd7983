"""A layer that draws with any sum of adapters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dora_diffusion.functional.dora import GainForm, rows
from dora_diffusion.layers.base_layers import Base, branch_dtype, kind_of, logical_shape
from dora_diffusion.layers.offloaded import device_of, value_of
from dora_diffusion.layers.transparent import Transparent


class BlendedLayer(Transparent):
    """A frozen base layer under a sum of adapters in gain form. For drawing, not training.

        y = base(x) + (c - 1)(base(x) - b) + P (mix * Q x)          and  + W (c_in - 1) x  for magnitudes of the in axis

    `set_terms` lays the adapters' P and Q side by side; `set_strengths` touches c and mix alone. Without adapters it is
    the base, bit for bit. With `room` the buffers have a fixed shape, padded with zeros, so that a compiled model swaps
    adapters without compiling anew.
    """

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self._kind = kind_of(base)
        for name in _Mix._fields:
            self.register_buffer(name, None, persistent=False)
        self.offset: Tensor | None  # c - 1, (out,); None when no adapter scales outputs
        self.shift: Tensor | None  # -(c - 1) b, (out,): the bias never scales
        self.mix: Tensor | None  # each adapter's strength, once for each of its ranks, (R,); again for each group
        self.left: Tensor | None  # P at strength 1, (out, R[, 1, 1])
        self.right: Tensor | None  # Q, (R, in[, kernel])
        self.in_offset: Tensor | None  # c_in - 1, (in,); None when no adapter scales inputs
        self._held = _HeldTerms(*[torch.empty(0)] * 3)

    def forward(self, x: Tensor) -> Tensor:
        mix = self._now()
        if mix.left is None or mix.right is None or mix.mix is None:
            base: Tensor = self.base(x)
            return base
        kind, y = self._kind, self._scaled(x, mix)
        h = kind.shrink(self.base, x, mix.right.to(branch_dtype(x, y)), _keep_all)
        h = h * kind.per_output(self.base, mix.mix).to(h.dtype)
        shift = None if mix.shift is None else mix.shift.to(h.dtype)
        return y + kind.expand(self.base, h, mix.left.to(h.dtype), shift)

    def _now(self) -> "_Mix":
        """The buffers at one look: another thread may let the layer take up other adapters meanwhile."""
        if torch.compiler.is_compiling():
            return _Mix(self.offset, self.shift, self.mix, self.left, self.right, self.in_offset)
        return _Mix(**self._buffers.copy())

    def _scaled(self, x: Tensor, mix: "_Mix") -> Tensor:
        """base(x) + (c - 1) base(x) + W (c_in - 1) x; the bias is put right by `shift`."""
        base: Tensor
        if mix.in_offset is None or self._kind.per_input is None:
            return self._scale_outputs(self.base(x), mix)
        pulled = x * self._kind.per_input(self.base, mix.in_offset).to(x.dtype)
        if mix.offset is None:
            base = self.base(x + pulled)
            return base
        extra: Tensor = self.base(pulled)
        if self.bias is not None:
            extra = extra - self._kind.per_output(self.base, self.bias).to(extra.dtype)
        return self._scale_outputs(self.base(x), mix) + extra

    def _scale_outputs(self, base: Tensor, mix: "_Mix") -> Tensor:
        if mix.offset is None:
            return base
        return torch.addcmul(base, base, self._kind.per_output(self.base, mix.offset).to(base.dtype))

    @torch.no_grad()
    def set_terms(self, terms: Sequence[GainForm], room: int | None = None) -> None:
        """Take up adapters, each as its gain form at strength 1; `set_strengths` must follow.

        Args:
            terms: gain forms on this base; their order is that of `set_strengths`'s strengths.
            room: the total rank of the buffers whatever `terms` need; None = as they need.
        """
        ranks = [term.right.shape[0] for term in terms]
        if room is not None and sum(ranks) > room:
            raise ValueError(f"adapters of rank {sum(ranks)} in all do not fit the {room} that were set aside")
        if not terms and room is None:
            self._buffers.update(dict.fromkeys(self._buffers))
            return
        mix = self._allocated(terms, room) if room is None or self.left is None else self._now()
        assert mix.left is not None and mix.right is not None
        mix.left.zero_()
        mix.right.zero_()
        if terms:
            rows(mix.left)[:, : sum(ranks)] = torch.cat([term.left for term in terms], dim=1)
            rows(mix.right)[: sum(ranks)] = torch.cat([term.right for term in terms])
        self._held = _held(terms, mix.left)
        self._buffers.update(mix._asdict())

    def _allocated(self, terms: Sequence[GainForm], room: int | None) -> "_Mix":
        """Buffers in the dtype that the base computes in, all zero."""
        (out, *rest), weight = logical_shape(self.base), self.base.weight
        total = room if room is not None else sum(term.right.shape[0] for term in terms)
        computes = weight.is_floating_point() and weight.dtype.itemsize > 1  # fp8 only stores
        dtype = weight.dtype if computes else torch.float32
        flat = [1] * (len(rest) - 1)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device_of(self.base))

        scales_outputs = room is not None or any(bool(term.gain_offset.any()) for term in terms)
        return _Mix(
            offset=zeros(out) if scales_outputs else None,
            shift=zeros(out) if scales_outputs and self.bias is not None else None,
            mix=zeros(total * getattr(self.base, "groups", 1)),
            left=zeros(out, total, *flat),
            right=zeros(total, *rest),
            in_offset=zeros(rest[0]) if any(term.in_offset is not None for term in terms) else None,
        )

    @torch.no_grad()
    def set_strengths(self, strengths: Tensor) -> None:
        """Set the strengths (n,) fp32 of the adapters that `set_terms` took up, in its order."""
        if self.mix is None:
            return
        held = self._held = self._held.on(strengths.device)  # the layer may have moved: CPU offload does at every call
        per_rank = torch.cat([strengths, strengths.new_zeros(1)])[held.owners]
        self.mix.copy_(per_rank.repeat(len(self.mix) // len(per_rank)))
        if self.offset is not None:
            offset = strengths @ held.offsets
            self.offset.copy_(offset)
            if self.shift is not None and self.bias is not None:
                self.shift.copy_(-offset * value_of(self.base, "bias").to(offset))
        if self.in_offset is not None:
            self.in_offset.copy_(strengths @ held.in_offsets)


class _Mix(NamedTuple):
    """The buffers of a blended layer; see there."""

    offset: Tensor | None
    shift: Tensor | None
    mix: Tensor | None
    left: Tensor | None
    right: Tensor | None
    in_offset: Tensor | None


def _keep_all(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class _HeldTerms:
    """What `set_strengths` needs of the n adapters: who owns each rank (R,), and gain offsets at strength 1, fp32.

    A rank that nobody owns (padding) belongs to number n, whose strength is 0.
    """

    owners: Tensor
    offsets: Tensor
    in_offsets: Tensor

    def on(self, device: torch.device) -> "_HeldTerms":
        """The same on a device; itself when it is there already."""
        if self.offsets.device == device:
            return self
        return _HeldTerms(self.owners.to(device), self.offsets.to(device), self.in_offsets.to(device))


def _held(terms: Sequence[GainForm], left: Tensor) -> _HeldTerms:
    owners = [index for index, term in enumerate(terms) for _ in range(term.right.shape[0])]
    owners += [len(terms)] * (left.shape[1] - len(owners))
    device, none = left.device, torch.zeros(0, left.shape[0], device=left.device)
    offsets = torch.stack([term.gain_offset for term in terms]) if terms else none
    inputs = [term.in_offset for term in terms]
    known = next((offset for offset in inputs if offset is not None), None)
    in_offsets = none
    if known is not None:
        in_offsets = torch.stack([torch.zeros_like(known) if offset is None else offset for offset in inputs])
    return _HeldTerms(torch.tensor(owners, device=device), offsets, in_offsets)
