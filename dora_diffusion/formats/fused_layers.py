"""An adapter of a layer of the original model <-> adapters of the layers of diffusers' model that it is.

The rows of a fused weight are those of its parts, one below the other:

    W = [W_1; W_2; ...],   D = s [B_1; B_2; ...] A,   m = [m_1; m_2; ...]

so each part has its rows of B and of an out-axis magnitude, and all share A and s. An in-axis magnitude divides by
norms of whole columns, which no part has: it can be neither split nor fused. Parts whose A differ are fused with the
blocks of their B on a diagonal, which adds their ranks and is exact.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate

import torch
from torch import Tensor

from dora_diffusion.formats.layouts.record import Fusion
from dora_diffusion.functional.dora import master_dtype, rows
from dora_diffusion.functional.lycoris import kronecker_factor
from dora_diffusion.state import Module, ModuleState

_MAGNITUDE = "magnitude"


def split(fusion: Fusion, module: Module) -> dict[str, Module]:
    """The adapter of a fused layer -> its parts' adapters, by path; exact, and bit for bit but for some LoKr.

    Low-rank pairs share `down`, `mid` and alpha. LoHa divides the rows of its first factors, a whole difference its
    own. LoKr divides the rows of its small factor where parts end between them, and becomes a pair where they do not.

    Raises:
        ValueError: the rows are not divisible as the fusion shares them, or an in-axis magnitude would be divided.
    """
    if module.magnitude is not None and module.axis == "in" and len(fusion.paths) > 1:
        raise ValueError(
            f"{fusion.original}: an in-axis magnitude belongs to all rows of the {len(fusion.paths)} layers that are"
            " fused here and cannot be split: convert the adapter to the out axis first"
        )
    sizes = _sizes(fusion, module.shape[0])
    if fusion.swaps(*module.shape):
        module = _swap(fusion, module)
    module = _divisible(module, sizes)
    starts = accumulate(sizes[:-1], initial=0)
    parts = [_narrow(module, start, size) for start, size in zip(starts, sizes, strict=True)]
    return dict(zip(fusion.paths, parts, strict=True))


def fuse(fusion: Fusion, modules: Mapping[str, Module]) -> Module:
    """The parts' adapters -> the fused layer's; the inverse of `split`, bit for bit where all parts share A and s.

    Parts that do not share them become one pair whose rank is the sum of theirs; scales that differ are folded into B,
    in fp32 at least. A part without an adapter gets rows of zeros.

    Args:
        modules: path -> its adapter, for one of `fusion.paths` at least; other paths are not looked at.

    Raises:
        ValueError: the result would not be exact: magnitudes of the in axis, or of some parts only; shapes do not fit.
    """
    present = {path: modules[path] for path in fusion.paths if path in modules}
    if not present:
        raise ValueError(f"{fusion.original}: no adapter to fuse: expected one for {' or '.join(fusion.paths)}")
    _check_magnitudes(fusion, present)
    sizes = _sizes_from(fusion, present)
    some = next(iter(present.values()))
    parts = [
        present[path] if path in present else _blank(some, size) for path, size in zip(fusion.paths, sizes, strict=True)
    ]
    fused = _concatenated(parts if _all_shared(parts) else _aligned(parts))
    return _swap(fusion, fused) if fusion.swaps(*fused.shape) else fused


# Rows of a fusion


def _sizes(fusion: Fusion, total: int) -> list[int]:
    """How many of all rows each part has."""
    unit, rest = divmod(total, sum(fusion.shares))
    if rest:
        shares = ":".join(str(share) for share in fusion.shares)
        raise ValueError(f"{fusion.original}: {total} rows cannot be shared {shares}: is this another model's layer?")
    return [unit * share for share in fusion.shares]


def _sizes_from(fusion: Fusion, present: Mapping[str, Module]) -> list[int]:
    """The same from the parts that are there."""
    shapes = {path: module.shape for path, module in present.items()}
    counts = ", ".join(f"{path} has {total} x {columns}" for path, (total, columns) in shapes.items())
    if len({columns for _, columns in shapes.values()}) > 1:
        raise ValueError(f"{fusion.original}: its parts have the same inputs, but {counts}")
    shares = dict(zip(fusion.paths, fusion.shares, strict=True))
    units = {divmod(total, shares[path]) for path, (total, _) in shapes.items()}
    unit, rest = next(iter(units))
    if len(units) > 1 or rest:
        ratio = ":".join(str(share) for share in fusion.shares)
        raise ValueError(f"{fusion.original}: rows of its parts are as {ratio}, but {counts}")
    return [unit * share for share in fusion.shares]


# Rows of one adapter


@dataclass(frozen=True)
class _Rows:
    """Where the rows of D stand in an adapter's tensors.

    Attributes:
        dims: tensor -> the dimension that counts rows of D; every other tensor is all rows'.
        unit: how many rows of D are one of theirs.
    """

    dims: Mapping[str, int]
    unit: int = 1


def _rows_of(module: Module) -> _Rows:
    """The tensors of an adapter that hold rows of D, but for its magnitude."""
    if isinstance(module, ModuleState):
        return _Rows({"up": 0})
    factors = module.factors
    if module.algorithm == "full":
        return _Rows({"diff": 0})
    if module.algorithm == "loha":  # a Tucker core wants its factors lying
        return _Rows({f"hada_w{number}_a": int(f"hada_t{number}" in factors) for number in (1, 2)})
    second = kronecker_factor({name: factor.to("meta") for name, factor in factors.items()}, 2)
    return _Rows({"lokr_w1" if "lokr_w1" in factors else "lokr_w1_a": 0}, unit=second.shape[0])


def _divisible(module: Module, sizes: Sequence[int]) -> Module:
    """The same adapter in a form whose rows can be divided so."""
    unit = _rows_of(module).unit
    return module if all(size % unit == 0 for size in sizes) else module.as_pair()


def _with(module: Module, changed: Mapping[str, Tensor]) -> Module:
    """The same adapter with other tensors."""
    if isinstance(module, ModuleState):
        return replace(
            module,
            down=changed.get("down", module.down),
            up=changed.get("up", module.up),
            magnitude=changed.get(_MAGNITUDE, module.magnitude),
        )
    factors = {name: changed.get(name, factor) for name, factor in module.factors.items()}
    return replace(module, factors=factors, magnitude=changed.get(_MAGNITUDE, module.magnitude))


def _row_tensors(module: Module) -> Iterator[tuple[str, Tensor, int, int]]:
    """Name, tensor, its dimension of rows and how many rows of D are one of its own."""
    where = _rows_of(module)
    for name, dim in where.dims.items():
        yield name, module.tensors[name], dim, where.unit
    if module.magnitude is not None and module.axis == "out":
        yield _MAGNITUDE, module.magnitude, 0, 1


def _narrow(module: Module, start: int, size: int) -> Module:
    """The adapter of `size` rows from `start`."""
    if size == module.shape[0]:
        return module
    return _with(
        module,
        {name: tensor.narrow(dim, start // unit, size // unit) for name, tensor, dim, unit in _row_tensors(module)},
    )


def _swap(fusion: Fusion, module: Module) -> Module:
    """The adapter whose halves of rows stand the other way round."""
    half, rest = divmod(module.shape[0], 2)
    if rest:
        raise ValueError(f"{fusion.original}: {module.shape[0]} rows have no halves: is this another model's layer?")
    module = _divisible(module, [half])
    return _with(
        module, {name: tensor.roll(tensor.shape[dim] // 2, dim) for name, tensor, dim, _ in _row_tensors(module)}
    )


def _blank(module: Module, size: int) -> Module:
    """An adapter of `size` rows that changes nothing, with all that other rows may share with `module`."""
    module = _divisible(module, [size])
    return _with(module, {name: _zeros(tensor, dim, size // unit) for name, tensor, dim, unit in _row_tensors(module)})


def _zeros(tensor: Tensor, dim: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size
    return tensor.new_zeros(shape)


# Several adapters


def _check_magnitudes(fusion: Fusion, present: Mapping[str, Module]) -> None:
    if len(fusion.paths) == 1:
        return
    with_magnitude = {path: module for path, module in present.items() if module.magnitude is not None}
    if not with_magnitude:
        return
    for path, module in with_magnitude.items():
        if module.axis == "in":
            raise ValueError(
                f"{path}: an in-axis magnitude divides by norms over this layer's rows only and cannot be fused into"
                f" {fusion.original}: convert the adapter to the out axis first"
            )
    if without := [path for path in fusion.paths if path not in with_magnitude]:
        raise ValueError(
            f"{fusion.original}: {next(iter(with_magnitude))} has a magnitude and {without[0]} has none, which would"
            " be the base's norms: expected one for all of its parts, or for none"
        )


def _all_shared(parts: Sequence[Module]) -> bool:
    """Whether the parts are rows of one adapter: all but their rows is the same."""
    return all(_common(part) == _common(parts[0]) and _same_rest(part, parts[0]) for part in parts[1:])


def _common(module: Module) -> tuple[object, ...]:
    if isinstance(module, ModuleState):
        return ModuleState, module.alpha, module.rank_stabilised, set(module.tensors)
    return module.algorithm, module.alpha, module.scale, set(module.tensors), _rows_of(module)


def _same_rest(one: Module, other: Module) -> bool:
    own = {*_rows_of(one).dims, _MAGNITUDE}
    return all(_equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items() if name not in own)


def _equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _concatenated(parts: Sequence[Module]) -> Module:
    """Parts that share all but their rows, as one."""
    if len(parts) == 1:
        return parts[0]
    found = [{name: (tensor, dim) for name, tensor, dim, _ in _row_tensors(part)} for part in parts]
    joined = {name: torch.cat([part[name][0] for part in found], dim) for name, (_, dim) in found[0].items()}
    return _with(parts[0], joined)


def _aligned(parts: Sequence[Module]) -> list[ModuleState]:
    """Parts that share no A, as pairs that do: every A below the other, B zero where it meets another's A."""
    pairs = [part.as_pair() for part in parts]
    if len({pair.down.dim() for pair in pairs}) > 1:  # some tell the taps of their layer, 1 x 1
        pairs = [replace(pair, down=rows(pair.down), up=rows(pair.up)) for pair in pairs]
    if scales_differ := len({pair.scale for pair in pairs}) > 1:
        pairs = [_folded(pair) for pair in pairs]
    dtype = reduce(torch.promote_types, (tensor.dtype for pair in pairs for tensor in (pair.down, pair.up)))
    downs: list[Tensor] = []
    for pair in pairs:
        if not any(_equal(pair.down, down) for down in downs):
            downs.append(pair.down)
    down = torch.cat(downs).to(dtype)
    starts = list(accumulate((each.shape[0] for each in downs[:-1]), initial=0))
    alpha = (1.0 if scales_differ else pairs[0].scale) * down.shape[0]
    aligned = []
    for pair in pairs:
        start = next(start for start, each in zip(starts, downs, strict=True) if _equal(pair.down, each))
        up = torch.zeros(pair.up.shape[0], down.shape[0], dtype=dtype, device=down.device)
        up[:, start : start + pair.rank] = rows(pair.up)
        aligned.append(ModuleState(down, up, alpha, pair.magnitude, axis=pair.axis))
    return aligned


def _folded(pair: ModuleState) -> ModuleState:
    """The same D at scale 1, the scale multiplied into B in fp32 at least."""
    dtype = master_dtype(torch.promote_types(pair.down.dtype, pair.up.dtype))
    return replace(
        pair, down=pair.down.to(dtype), up=pair.scale * pair.up.to(dtype), alpha=pair.rank, rank_stabilised=False
    )
