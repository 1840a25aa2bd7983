"""An adapter at another rank."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.conversion.modules import change_of, dtype_of, error_of, module_of, weight_for
from dora_diffusion.conversion.reports import Converted, Report, rewritten
from dora_diffusion.functional.low_rank import extract_dora, low_rank, recompress, relative_error
from dora_diffusion.functional.lycoris import Pair
from dora_diffusion.pipelines.base_weights import weights_of
from dora_diffusion.state import AdapterState, FactoredState, Module, WeightOf
from dora_diffusion.utils.progress import LayerProgress


def resize(
    adapter: AdapterState,
    *,
    rank: int | None = None,
    error: float = 0.0,
    base: Any = None,
    progress: LayerProgress | None = None,
    report: Callable[[Report], None] | None = None,
) -> AdapterState:
    """The adapter at a lower rank, every layer as near as that rank allows.

    The magnitude of a DoRA is kept, so the rows of W' keep their lengths to the digit and only their directions give
    way. Without a base D itself is cut (its truncated SVD), which is not quite what is nearest once rows are scaled to
    m; with one, D is sought anew for W' (`low_rank.extract_dora`), and errors are those of W'.

    Tucker, LoHa, LoKr and whole differences become low-rank pairs. A layer whose rank is no higher already stays as it
    is. Pairs keep their dtype; alpha becomes the rank.

    Args:
        adapter: any kind, any mix.
        rank: the highest rank left; None leaves it to `error`.
        error: keep no more ranks than leave this relative error in a layer (of D, or of W' with a base).
        base: a pipeline, an embedded base's name, a diffusers folder or a single .safetensors file; or
            None.
        progress: called after every layer.
        report: is given the record of errors at the end.

    Raises:
        ValueError: neither a rank nor an error is given, or the base does not fit.

    Examples:
        ```python
        import dora_diffusion as dd

        ink = dd.load_adapter("ink.safetensors")
        smaller = dd.resize(ink, rank=2, report=lambda report: print(report.sentence()))
        assert smaller.ranks == (2,)
        ```
    """
    check_budget(rank, error)
    weights = None if base is None else weights_of(base)

    def convert(path: str) -> Converted | None:
        module = adapter.modules[path]
        most = module.rank if rank is None else min(rank, module.rank)
        if most == module.rank and error == 0:
            return None
        new = _cut(module, most, error) if weights is None else _sought_anew(module, path, weights, most, error)
        return new if new.module.rank < module.rank else None

    return rewritten(adapter, "resized", convert, progress, report)


def check_budget(rank: int | None, error: float) -> None:
    """Raise a ValueError of one line unless a rank or an error says how much is to be kept."""
    if rank is None and error == 0:
        raise ValueError("expected a rank, an error, or both; got neither")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if not 0 <= error < 1:
        raise ValueError(f"error must lie in [0, 1), the share of the change that may be lost; got {error}")


def cut_pair(module: Module, rank: int, error: float) -> Pair:
    """The best pair of a rank for D of any module."""
    fine = module.to(dtype=torch.float32)
    if isinstance(fine, FactoredState):
        return low_rank(fine.delta(), rank, error=error)
    pair = fine.as_pair()
    return recompress(pair.scale * pair.up, pair.down, rank, error=error)


def _cut(module: Module, rank: int, error: float) -> Converted:
    whole = module.to(dtype=torch.float32).delta()
    new = module_of(cut_pair(module, rank, error), whole.shape, dtype_of(module), module.magnitude, axis=module.axis)
    return Converted(new, relative_error(new.to(dtype=torch.float32).delta(), whole))


def _sought_anew(module: Module, path: str, weights: WeightOf, rank: int, error: float) -> Converted:
    weight = weight_for(module, weights, path)
    change = change_of(module, weight)
    if module.magnitude is not None and module.axis == "out":
        pair = _direction_pair(module.magnitude, weight, change, rank, error)
    else:
        pair = cut_pair(module, rank, error)
    new = module_of(pair, weight.shape, dtype_of(module), module.magnitude, axis=module.axis)
    return Converted(new, error_of(new, change, weight))


def _direction_pair(magnitude: Tensor, weight: Tensor, change: Tensor, rank: int, error: float) -> Pair:
    """D for directions V = W' / m. A negative magnitude turns its row about; V itself stands beside W."""
    turned = (magnitude.to(weight.dtype) < 0).reshape(-1, *[1] * (weight.dim() - 1))
    tuned = weight + change
    return extract_dora(torch.where(turned, -tuned, tuned), weight, rank, error=error).pair
