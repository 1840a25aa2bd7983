"""An adapter out of a fine-tuned model and the base that it was tuned from."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.conversion.modules import error_of, module_of
from dora_diffusion.conversion.reports import Converted, Report, walk
from dora_diffusion.conversion.resize import check_budget
from dora_diffusion.conversion.targets import layers_of, source_of, vectors_of
from dora_diffusion.functional.dora import master_dtype
from dora_diffusion.functional.low_rank import extract_dora, low_rank
from dora_diffusion.pipelines.base_weights import BaseWeights
from dora_diffusion.state import AdapterState, WeightOf
from dora_diffusion.utils.checks import check_fields
from dora_diffusion.utils.progress import LayerProgress


@dataclass(frozen=True)
class Extraction:
    """How an adapter is extracted.

    Attributes:
        target_modules: as in `DoRAConfig`, but paths begin with the component and regular expressions fit what follows
            it; None for the attention layers of every component.
        use_dora: False extracts a plain LoRA, the truncated SVD of T - W.
        error: keep no more ranks than leave this relative error in a layer, as far as the rank reaches.
        rounds: of the alternation (`low_rank.extract_dora`).
        vectors: also take the biases and normalisations that changed, whole.
        negligible: a layer that changed by no more than this share of its norm is left out, as one that is equal is.
        dtype: of the pairs and vectors; magnitudes are fp32.

    Examples:
        ```python
        import dora_diffusion as dd

        options = dd.Extraction(target_modules=["to_q", "to_k"], use_dora=False, error=0.05)
        adapter = dd.extract("tuned", "pocket", rank=16, options=options)  # no more ranks than 5 % of error ask for
        print(adapter.ranks)
        ```
    """

    target_modules: str | Sequence[str] | None = None
    use_dora: bool = True
    error: float = 0.0
    rounds: int = 30
    vectors: bool = False
    negligible: float = 0.0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_fields(self)


def extract(
    tuned: Any,
    base: Any,
    *,
    rank: int,
    options: Extraction | None = None,
    progress: LayerProgress | None = None,
    report: Callable[[Report], None] | None = None,
) -> AdapterState:
    """The adapter of a rank that comes nearest to turning a base into a model fine-tuned from it.

    Two models of different dtypes are compared in the coarser, so that rounding alone is no change.

    Args:
        tuned: a pipeline, a diffusers folder, a single file, a mapping of tensors by path, or a function of paths.
        base: likewise.
        rank: of every layer; what is above a layer's smaller side is capped.
        options: see `Extraction`.
        progress: called after every layer.
        report: is given the record of errors at the end.

    Raises:
        ValueError: the models are not of one shape, or nothing changed; one line says where.

    Examples:
        ```python
        import dora_diffusion as dd

        adapter = dd.extract("tuned", "pocket", rank=4)  # folders, files or pipelines
        dd.save_adapter(adapter, "tuned-dora.safetensors")
        ```
    """
    chosen = options or Extraction()
    check_budget(rank, chosen.error)
    new, old = source_of(tuned), source_of(base)

    def convert(path: str) -> Converted | None:
        both = _both(path, new.weight, old.weight)
        return None if both is None else _extracted(path, both, rank, chosen)

    modules, summary = walk(layers_of(new, chosen.target_modules), convert, progress)
    vectors = _changed_vectors(tuned, new, old, chosen.dtype) if chosen.vectors else {}
    if not modules and not vectors:
        raise ValueError(f"nothing to extract: the {len(summary.left_out)} layers compared are equal in both models")
    if report is not None:
        report(summary)
    return AdapterState(modules, {"dora_diffusion.extracted": summary.sentence()}, vectors)


@dataclass(frozen=True)
class _Both:
    """A parameter of both models, in one dtype that is fine enough to compute in."""

    tuned: Tensor
    base: Tensor

    @property
    def change(self) -> Tensor:
        return self.tuned - self.base


def _both(path: str, new: WeightOf, old: WeightOf) -> _Both | None:
    """A parameter of both models; None when it is the same."""
    tuned, base = new(path), old(path)
    if tuned.shape != base.shape:
        got, expected = tuple(tuned.shape), tuple(base.shape)
        raise ValueError(f"{path}: the tuned model has shape {got}, the base {expected}; are they of one architecture?")
    coarse = max((tuned.dtype, base.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    if torch.equal(tuned.to(coarse), base.to(coarse)):
        return None
    fine = master_dtype(torch.promote_types(tuned.dtype, base.dtype))
    return _Both(tuned.to(fine), base.to(fine))


def _extracted(path: str, both: _Both, rank: int, options: Extraction) -> Converted | None:
    change = both.change
    size, whole = (float(torch.linalg.vector_norm(tensor)) for tensor in (change, both.base))
    if not math.isfinite(size):
        raise ValueError(f"{path}: one of the models holds NaN or infinities there")
    if size <= options.negligible * whole:
        return None
    if options.use_dora:
        parts = extract_dora(both.tuned, both.base, rank, rounds=options.rounds, error=options.error)
        new = module_of(parts.pair, change.shape, options.dtype, parts.magnitude)
    else:
        new = module_of(low_rank(change, rank, error=options.error), change.shape, options.dtype)
    return Converted(new, error_of(new, change, both.base))


def _changed_vectors(tuned: Any, new: BaseWeights, old: BaseWeights, dtype: torch.dtype) -> dict[str, Tensor]:
    found = {path: _both(path, new.parameter, old.parameter) for path in vectors_of(tuned)}
    return {path: both.change.to(dtype) for path, both in found.items() if both is not None}
