"""How far an adapter turns and stretches the rows of a weight: what DoRA's section 3.2 looks at (arXiv 2402.09353).

For each row of W' = diag(g) V, V = W + D, D = s B A, beside the same row of W:

    angle(W'_i, W_i) = atan2(||D_perp||, ||W|| + D_par)        stretch = | ||W'_i|| / ||W_i|| - 1 |

where D_par = <W, D> / ||W|| is what of D lies along W, and ||D_perp||^2 = ||D||^2 - D_par^2. A gain turns nothing. The
angle of a small change keeps its digits, which the arc cosine of a number near 1 would not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_diffusion.functional.dora import TINY_NORM, norms_from, row_sums, rows


@dataclass(frozen=True)
class RowChanges:
    """Of the rows of a weight that have a direction, before and after.

    Attributes:
        angles: in radians, (n,), fp64.
        stretches: share of a row's length, (n,), fp64, 0 or more.
    """

    angles: Tensor
    stretches: Tensor


def row_changes(weight: Tensor, down: Tensor, up: Tensor, scale: float, magnitude: Tensor | None) -> RowChanges:
    """Without forming V or D: W is read once.

    Args:
        weight: (out, in[, kh, kw]), any float dtype.
        down: (r, in[, kh, kw]).
        up: (out, r[, 1, 1]).
        scale: s.
        magnitude: m (out,); None for plain LoRA.
    """
    sums = row_sums(weight, down)
    norms = norms_from(sums, weight, down, up, scale)
    # small tensors, in fp64: where B A takes away what a frozen pair adds, little of each is left
    a, b, products, squares = (_exact(part) for part in (rows(down), rows(up), sums.products, sums.squares))
    before = squares.clamp(min=TINY_NORM**2).sqrt()
    along = scale * (b * products).sum(1) / before
    across = (scale**2 * (b * (b @ (a @ a.T))).sum(1) - along.square()).clamp(min=0).sqrt()
    after = _exact(norms.values if magnitude is None else magnitude)
    # both as fp32 has them, or a row that was not touched would have moved
    stretches = (after / _exact(sums.squares.clamp(min=TINY_NORM**2).sqrt()) - 1).abs()
    alive = torch.ones(len(b), dtype=torch.bool) if norms.dead is None else ~norms.dead.cpu()
    return RowChanges(torch.atan2(across, before + along)[alive], stretches[alive])


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def mean_changes(changes: Sequence[RowChanges]) -> tuple[float, float]:
    """The mean angle in radians and the mean stretch over all rows of some weights; 0 where there are none."""
    angles, stretches = (
        torch.cat(list(each)) for each in zip(*((c.angles, c.stretches) for c in changes), strict=True)
    )
    return (float(angles.mean()), float(stretches.mean())) if len(angles) else (0.0, 0.0)
