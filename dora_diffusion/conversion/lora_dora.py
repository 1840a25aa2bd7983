"""LoRA to DoRA, DoRA to LoRA, and magnitudes of the in axis to the out axis."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from dora_diffusion.conversion.modules import change_of, dtype_of, error_of, module_of, weight_for
from dora_diffusion.conversion.reports import Converted, Progress, Report, rewritten
from dora_diffusion.conversion.resize import check_budget
from dora_diffusion.functional.dora import rows, squared_row_norms
from dora_diffusion.functional.low_rank import extract_dora, low_rank
from dora_diffusion.pipelines.base_weights import weights_of
from dora_diffusion.state import AdapterState, FactoredState


def to_dora(
    lora: AdapterState,
    *,
    base: Any,
    progress: Progress | None = None,
    report: Callable[[Report], None] | None = None,
) -> AdapterState:
    """The same adapter with magnitudes m = N(W + D), which change nothing: W' is exactly W + D.

    Layers that are DoRA already stay as they are; the differences stay in the form they have. Magnitudes are fp32.

    Args:
        lora: the adapter.
        base: what `base_weights.weights_of` takes.
        progress: called after every layer.
        report: is given the record of errors at the end.

    Raises:
        ValueError: the base does not fit.
    """
    weights = weights_of(base)

    def convert(path: str) -> Converted | None:
        module = lora.modules[path]
        if module.magnitude is not None:
            return None
        weight = weight_for(module, weights, path)
        change = change_of(module, weight)
        new = replace(module, magnitude=squared_row_norms(weight + change).sqrt(), axis="out")
        return Converted(new, error_of(new, change, weight))

    return rewritten(lora, "to_dora", convert, progress, report)


def to_lora(
    dora: AdapterState,
    *,
    base: Any,
    rank: int | None = None,
    error: float = 0.0,
    progress: Progress | None = None,
    report: Callable[[Report], None] | None = None,
) -> AdapterState:
    """The adapter without magnitudes: W' - W = (g - 1) W + g D, which is of full rank, at a rank or whole.

    Layers without magnitudes stay as they are. Both axes of magnitudes are taken.

    Args:
        dora: the adapter.
        base: what `base_weights.weights_of` takes.
        rank: of the pairs; None, with no `error`, keeps each difference whole, as exact as its dtype.
        error: keep no more ranks than leave this relative error in a layer.
        progress: called after every layer.
        report: is given the record of errors at the end.

    Raises:
        ValueError: the base does not fit.
    """
    is_whole = rank is None and error == 0
    if not is_whole:
        check_budget(rank, error)
    weights = weights_of(base)

    def convert(path: str) -> Converted | None:
        module = dora.modules[path]
        if module.magnitude is None:
            return None
        weight = weight_for(module, weights, path)
        change = change_of(module, weight)
        if is_whole:
            whole = FactoredState("full", {"diff": change.to(dtype_of(module))})
            return Converted(whole, error_of(whole, change, weight))
        pair = low_rank(change, min(rows(change).shape) if rank is None else rank, error=error)
        new = module_of(pair, weight.shape, dtype_of(module))
        return Converted(new, error_of(new, change, weight))

    return rewritten(dora, "to_lora", convert, progress, report)


def to_out_axis(
    adapter: AdapterState,
    *,
    base: Any,
    rank: int | None = None,
    error: float = 0.0,
    progress: Progress | None = None,
    report: Callable[[Report], None] | None = None,
) -> AdapterState:
    """Magnitudes of the in axis as a DoRA of the out axis: W' is formed, and the nearest DoRA is extracted from it.

    One gain per input is no low-rank change of the outputs, so this costs a share of W', which `report` tells; a higher
    rank costs less. Other layers stay as they are.

    Args:
        adapter: the adapter.
        base: what `base_weights.weights_of` takes.
        rank: of the new pairs; None keeps each layer's.
        error: keep no more ranks than leave this relative error in a layer, as far as `rank` reaches.
        progress: called after every layer.
        report: is given the record of errors at the end.

    Raises:
        ValueError: the base does not fit.
    """
    check_budget(1 if rank is None else rank, error)
    weights = weights_of(base)

    def convert(path: str) -> Converted | None:
        module = adapter.modules[path]
        if module.magnitude is None or module.axis == "out":
            return None
        weight = weight_for(module, weights, path)
        change: Tensor = change_of(module, weight)
        parts = extract_dora(weight + change, weight, rank or module.rank, error=error)
        new = module_of(parts.pair, weight.shape, dtype_of(module), parts.magnitude)
        return Converted(new, error_of(new, change, weight))

    return rewritten(adapter, "to_out_axis", convert, progress, report)
