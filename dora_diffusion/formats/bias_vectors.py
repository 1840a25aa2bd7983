"""Biases and normalisations' weights of fused layers: a vector for the whole <-> one for each piece."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dora_diffusion.formats.layouts import Fusion


def split_vector(fusion: Fusion, vector: Tensor) -> dict[str, Tensor]:
    """(out,) of an original layer -> path -> (out of the piece,).

    Raises:
        ValueError: the rows cannot be divided so.
    """
    total, parts = vector.shape[0], sum(fusion.shares)
    if total % parts:
        raise ValueError(f"{fusion.original}: {total} rows cannot be divided in the proportion {fusion.shares}")
    pieces = torch.split(_swap(fusion, vector), [total // parts * share for share in fusion.shares])
    return dict(zip(fusion.paths, pieces, strict=True))


def fuse_vector(fusion: Fusion, vectors: Mapping[str, Tensor]) -> Tensor:
    """The inverse; a piece that is not there adds nothing."""
    known, vector = next(iter(vectors.items()))
    unit = vector.shape[0] // fusion.shares[fusion.paths.index(known)]
    sizes = zip(fusion.paths, fusion.shares, strict=True)
    pieces = [vectors[path] if path in vectors else vector.new_zeros(unit * share) for path, share in sizes]
    return _swap(fusion, torch.cat(pieces))


def _swap(fusion: Fusion, vector: Tensor) -> Tensor:
    if fusion.swapped_by_shape:
        raise ValueError(f"{fusion.original}: a bias alone does not tell whether its halves are swapped in diffusers")
    return torch.cat(vector.chunk(2)[::-1]) if fusion.swapped else vector
