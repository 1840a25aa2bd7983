"""One layer of a blend: exact where it can be, else the best of its rank."""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from dora_diffusion.blending.exact import Side, side_by_side
from dora_diffusion.blending.layer_inputs import Made, Piece
from dora_diffusion.blending.reports import BlendOptions
from dora_diffusion.functional.blend_modes import MODES, difference
from dora_diffusion.functional.dora import dora_weight
from dora_diffusion.functional.low_rank import extract_dora, low_rank, recompress, relative_error
from dora_diffusion.functional.merge_methods import METHODS, Sparsity
from dora_diffusion.state import ModuleState


@torch.no_grad()
def blend_layer(
    path: str, weight: Tensor | None, pieces: Sequence[Piece], mode: str, rank: int | None, options: BlendOptions
) -> Made:
    """The pieces as one module.

    Args:
        path: of the layer: part of dare's seed, and for messages.
        weight: W (out, in[, kh, kw]), any float dtype; None is enough where plain differences make a plain one.
        pieces: at least one.
        mode: a key of MODES or METHODS.
        rank: at most this; None for the sum of the pieces' ranks.
        options: see there.

    Returns:
        The module on the weight's device, in fp32 (fp64 of fp64).
    """
    sides = min(pieces[0].module.shape)
    most = min(rank or sum(piece.module.rank for piece in pieces), sides)
    joined = side_by_side(weight, pieces, mode, as_dora=options.as_dora)
    if joined is not None and (joined.right.shape[0] <= most or most == sides):
        return Made(_module(_shrunk(joined, most), _tail(weight, pieces)), 0.0)
    if joined is not None and joined.magnitude is None:
        small = _shrunk(joined, most)
        error = relative_error(small.left @ small.right, joined.left @ joined.right)
        return Made(_module(small, _tail(weight, pieces)), error)
    if weight is None:  # differences merged to one: W falls out of them
        weight = torch.zeros_like(pieces[0].module.delta()).reshape(-1, *_tail(None, pieces))
    goal = _goal(path, weight, pieces, mode, options)
    if joined is not None:
        made = _module(_shrunk(joined, most), weight.shape[1:])
    else:
        made = _approximated(goal, weight.to(goal.dtype), most, as_dora=_wants_dora(pieces, mode, options))
    return Made(made, relative_error(_dense(weight, made), goal, weight))


def _goal(path: str, weight: Tensor, pieces: Sequence[Piece], mode: str, options: BlendOptions) -> Tensor:
    """The dense W'."""
    terms = [piece.term() for piece in pieces]
    if mode in MODES:
        return MODES[mode](weight, terms)
    seed = zlib.crc32(f"{options.seed} {path}".encode())
    generator = torch.Generator(weight.device).manual_seed(seed)
    deltas = [difference(weight, term) for term in terms]
    merged = METHODS[mode](deltas, [t.strength for t in terms], Sparsity(options.density, generator, options.elect))
    return weight.to(merged.dtype) + merged


def _wants_dora(pieces: Sequence[Piece], mode: str, options: BlendOptions) -> bool:
    if options.as_dora is not None:
        return options.as_dora
    return mode in MODES and any(piece.is_dora for piece in pieces)


def _approximated(goal: Tensor, weight: Tensor, rank: int, *, as_dora: bool) -> ModuleState:
    if not as_dora:
        pair = low_rank(goal - weight, rank)
        return _module(Side(pair.left, pair.right, None, "out"), weight.shape[1:])
    parts = extract_dora(goal, weight, rank)
    return _module(Side(parts.pair.left, parts.pair.right, parts.magnitude, "out"), weight.shape[1:])


def _shrunk(side: Side, rank: int) -> Side:
    if side.right.shape[0] <= rank:
        return side
    pair = recompress(side.left, side.right, rank)
    return Side(pair.left, pair.right, side.magnitude, side.axis)


def _module(side: Side, tail: Sequence[int]) -> ModuleState:
    """At scale 1, in the shapes of a weight (out, *tail)."""
    rank = side.right.shape[0]
    up = side.left.reshape(-1, rank, *[1] * (len(tail) - 1))
    return ModuleState(side.right.reshape(rank, *tail), up, float(rank), side.magnitude, axis=side.axis)


def _tail(weight: Tensor | None, pieces: Sequence[Piece]) -> Sequence[int]:
    """(in[, kh, kw]): of the weight, else of the piece that knows most dimensions."""
    if weight is not None:
        return weight.shape[1:]
    return max((piece.pair().down.shape[1:] for piece in pieces), key=len)


def _dense(weight: Tensor, module: ModuleState) -> Tensor:
    return dora_weight(weight, module.down, module.up, module.scale, module.magnitude, axis=module.axis)
