"""How long a low-rank update is, and what cuts it to a length. Letters as in `functional.dora`: D = s B A.

Keeping the norm of each layer's update below a limit is kohya's `scale_weight_norms` (max-norm regularisation:
Srivastava et al., 2014, section 5.1).
"""

import torch
from torch import Tensor

from dora_diffusion.functional.dora import rows


@torch.no_grad()
def update_norm(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """||s B A|| in the Frobenius norm, by two matrices of r x r; B A, as large as the layer, is not formed.

        ||B A||^2 = trace(A^T B^T B A) = sum((B^T B) * (A A^T))

    Args:
        down: A, (r, in[, kh, kw]).
        up: B, (out, r[, 1, 1]).
        scale: s.

    Returns:
        A number in the dtype of A and on its device.
    """
    a, b = rows(down), rows(up)
    with torch.autocast(a.device.type, enabled=False):
        squares = ((b.T @ b) * (a @ a.T)).sum()
    return abs(scale) * squares.clamp(min=0).sqrt()  # rounding may leave less than nothing


@torch.no_grad()
def factor_to_norm(down: Tensor, up: Tensor, scale: float, limit: float) -> Tensor:
    """What A and B are each to be multiplied by so that ||s B A|| is at most a limit:

        f = min(1, sqrt(limit / ||s B A||)),   s (f B) (f A) = f^2 s B A

    It is exactly 1 where the update is no longer than that, and where it is 0. Arguments as in `update_norm`; nothing
    waits for the device.
    """
    return (limit / update_norm(down, up, scale)).clamp(max=1).sqrt()
