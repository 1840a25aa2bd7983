"""Changes that are made of the weight itself: OFT, BOFT, GLoRA, (IA)^3. Each comes to a difference D of that weight.

OFT: arXiv 2306.07280. BOFT: arXiv 2311.06243. GLoRA: arXiv 2306.07967. (IA)^3: arXiv 2205.05638. Shapes, order of
blocks and the limit of a rotation are those of LyCORIS' files. Everything is fp32, or fp64 of fp64.
"""

import torch
from torch import Tensor

from dora_diffusion.functional.dora import master_dtype, rows
from dora_diffusion.functional.lycoris import Pair


def rotations(blocks: Tensor, limit: float = 0.0) -> Tensor:
    """Cayley's orthogonal matrices R = (1 + Q) (1 - Q)^-1 of Q = X - X^T.

    Args:
        blocks: X, (..., b, b).
        limit: most that the norm of all Q together may be; 0 for any.
    """
    x = blocks.to(master_dtype(blocks.dtype))
    skew = x - x.transpose(-1, -2)
    if limit > 0:
        norm = torch.linalg.vector_norm(skew) + 1e-8
        skew = skew * (limit / norm).clamp(max=1.0)
    one = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    turned: Tensor = torch.linalg.solve(one - skew, one + skew)  # both are functions of Q: they commute
    return turned


def oft_delta(weight: Tensor, blocks: Tensor, *, limit: float = 0.0, rescale: Tensor | None = None) -> Tensor:
    """D = diag(c) R^T W - W, the rotation of each block of rows for itself.

    Args:
        weight: W, (out, in[, kh, kw]).
        blocks: (n, b, b), n b = out.
        limit: as in `rotations`.
        rescale: c, out numbers; None for 1.

    Returns:
        D, as W.
    """
    w = _matrix(weight)
    turned = rotations(blocks, limit).to(w).transpose(1, 2) @ w.reshape(*blocks.shape[:2], -1)
    return _scaled(turned.flatten(0, 1), w, rescale).reshape(weight.shape)


def boft_delta(weight: Tensor, blocks: Tensor, *, limit: float = 0.0, rescale: Tensor | None = None) -> Tensor:
    """D = diag(c) R_m ... R_1 W - W, where stage i turns rows that stand 2^i b / 2 apart (a butterfly).

    Args:
        weight: W, (out, in[, kh, kw]).
        blocks: (m, n, b, b), n b = out.
        limit: as in `rotations`.
        rescale: c, out numbers; None for 1.

    Returns:
        D, as W.
    """
    w = _matrix(weight)
    turned, (out, columns), (_, count, size, _) = w, w.shape, blocks.shape
    for stage, rotation in enumerate(rotations(blocks, limit).to(w)):
        apart = 2**stage * (size // 2)
        groups = out // (2 * apart)
        paired = turned.reshape(groups, 2, apart, columns).transpose(1, 2).reshape(count, size, columns)
        turned = (rotation @ paired).reshape(groups, apart, 2, columns).transpose(1, 2).reshape(out, columns)
    return _scaled(turned, w, rescale).reshape(weight.shape)


def glora_pair(weight: Tensor, towards: Pair, beside: Pair) -> Pair:
    """The exact pair of D = W A + B for A = A1 A2 and B = B1 B2, of both their ranks together.

    Args:
        weight: W, (out, in), or (out, in, 1, 1).
        towards: A1 (in, r) and A2 (r, in).
        beside: B1 (out, r) and B2 (r, in).
    """
    w = _matrix(weight)
    left = torch.cat([beside.left.to(w), w @ towards.left.to(w)], dim=1)
    return Pair(left, torch.cat([beside.right.to(w), towards.right.to(w)]))


def glora_delta(weight: Tensor, towards: Pair, beside: Tensor) -> Tensor:
    """D = W A + B of a convolution with taps, A mixing the inputs of each tap.

    Args:
        weight: W, (out, in, kh, kw).
        towards: A1 (in, r) and A2 (r, in).
        beside: B, as W.
    """
    w = weight.to(master_dtype(weight.dtype))
    mixed = torch.einsum("oi...,ij->oj...", w, towards.left.to(w) @ towards.right.to(w))
    return mixed + beside.to(w).reshape(w.shape)


def ia3_delta(weight: Tensor, gains: Tensor, *, of_inputs: bool) -> Tensor:
    """D = diag(l) W, or W diag(l) of inputs.

    Args:
        weight: W, (out, in[, kh, kw]).
        gains: l, out or in numbers: the gain less 1.
        of_inputs: which.
    """
    w = weight.to(master_dtype(weight.dtype))
    shape = [1] * w.dim()
    shape[1 if of_inputs else 0] = -1
    return w * gains.to(w).reshape(shape)


def _matrix(weight: Tensor) -> Tensor:
    return rows(weight).to(master_dtype(weight.dtype))


def _scaled(turned: Tensor, w: Tensor, rescale: Tensor | None) -> Tensor:
    return (turned if rescale is None else rescale.reshape(-1, 1).to(w) * turned) - w
