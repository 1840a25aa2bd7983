"""Whether an adapter fits a pipeline: paths are found in the live model, shapes checked, before anything changes."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from dora_diffusion.functional.dora import GainForm, rows
from dora_diffusion.layers.base_layers import Base, check_shapes, logical_shape
from dora_diffusion.layers.offloaded import device_of, value_of
from dora_diffusion.pipelines.modules import PipelineModules, at_hand
from dora_diffusion.pipelines.textual_inversion import WordState
from dora_diffusion.state import AdapterState, FactoredState, Module, ModuleState, rank_in_words


@dataclass(frozen=True)
class LoadReport:
    """What was loaded.

    Attributes:
        name: the adapter's name in the manager.
        kind: "DoRA", "LoRA", "LoHa" ...; of a mixed file, each with its count: see `kind_in_words`.
        ranks: its distinct ranks; of a LoHa, LoKr or whole difference, those of the pair that draws it.
        matched: layers of the pipeline that it adapts.
        total: layers in the file; always equal to `matched`, since a file that does not fit is refused.
        vectors: parameters of the pipeline that it adds to: biases, weights of normalisations.
        extra: tensors of the file that belong to no layer and no word; they draw nothing.
        components: the parts of the pipeline that it changes.
        sha256: of the file, or None for an adapter that came from memory.
        metadata: the file's own.
        words: new words that its file bundles; prompts can use them while the adapter has a strength.
        notes: what of the file is kept and not used here, a line each.

    Examples:
        ```python
        import dora_diffusion as dd

        manager = dd.AdapterManager(dd.load_pipeline("pocket"))
        report = manager.load_adapter("ink.safetensors", name="ink")
        print(f"{report.name}: {report.kind} of rank {report.ranks}, {report.matched} layers of {report.components}")
        ```
    """

    name: str
    kind: str
    ranks: tuple[int, ...]
    matched: int
    total: int
    vectors: int
    extra: int
    components: tuple[str, ...]
    sha256: str | None
    metadata: Mapping[str, str]
    words: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        words = f"new words {', '.join(self.words)}" if self.words else ""
        facts = [self.kind, rank_in_words(self.ranks), f"{self.matched} of {self.total} layers", words]
        return f"LoadReport({self.name}: {', '.join(filter(None, facts))})"


@dataclass(frozen=True)
class Fitted:
    """An adapter as this pipeline spells its paths: fp32, on the base's device, every layer a pair."""

    modules: Mapping[str, ModuleState]
    vectors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Loaded:
    """An adapter in memory, with its layers' gain forms at strength 1, and the new words that it brings."""

    modules: Mapping[str, ModuleState]
    vectors: Mapping[str, Tensor]
    terms: dict[str, GainForm]
    report: LoadReport
    words: tuple[WordState, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Everything that it changes: layers and parameters."""
        return *self.modules, *self.vectors


@torch.no_grad()
def fit(adapter: AdapterState, label: str, pipe_modules: PipelineModules) -> Fitted:
    """An adapter's layers and vectors at their places in a pipeline.

    Args:
        adapter: of any format.
        label: what an error calls it: the file.
        sites: the pipeline's.

    Raises:
        ValueError: one line: how many of its layers fit, and the first that does not.
    """
    modules: dict[str, ModuleState] = {}
    vectors: dict[str, Tensor] = {}
    misfits: list[str] = []
    for path, module in adapter.modules.items():
        try:
            _take(modules, *_fitted_module(path, module, pipe_modules))
        except ValueError as error:
            misfits.append(str(error))
    for path, vector in adapter.vectors.items():
        try:
            _take(vectors, *_fitted_vector(path, vector, pipe_modules))
        except ValueError as error:
            misfits.append(str(error))
    if misfits:
        total = len(adapter.modules) + len(adapter.vectors)
        what = "layers" if adapter.modules else "parameters"
        raise ValueError(
            f"{label}: {total - len(misfits)} of {total} {what} fit this pipeline; first misfit: {misfits[0]}"
        )
    return Fitted(modules, vectors)


T = TypeVar("T")


def _take(have: dict[str, T], path: str, thing: T) -> None:
    if path in have:
        raise ValueError(f"{path} comes twice, with and without `text_model.`: expected each layer once")
    have[path] = thing


def _fitted_module(path: str, module: Module, pipe_modules: PipelineModules) -> tuple[str, ModuleState]:
    live, base = pipe_modules.layer(path)
    at_hand(path, value_of(base, "weight"))
    if isinstance(module, FactoredState) or module.mid is not None:
        _check_factors(path, module, base)
    # cast first: products of the factors of a bf16 file would be rounded again
    pair = module.to(dtype=torch.float32, device=device_of(base)).as_pair()
    check_shapes(path, pair, base)
    return live, pair


def _check_factors(path: str, module: Module, base: Base) -> None:
    """Shapes before products: the factors fit each other, and their product the layer."""
    out, *rest = logical_shape(base)
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in module.tensors.items())
    try:
        made = tuple(rows(module.to(device="meta").delta()).shape)
    except (RuntimeError, IndexError, KeyError, AssertionError):
        raise ValueError(f"{path}: its factors do not fit each other: {shapes}") from None
    if made != (out, math.prod(rest)):
        raise ValueError(f"{path}: {shapes} do not fit a weight of {(out, *rest)}; is this another base model?")


def _fitted_vector(path: str, vector: Tensor, pipe_modules: PipelineModules) -> tuple[str, Tensor]:
    live, owner, name = pipe_modules.parameter(path)
    parameter = at_hand(path, getattr(owner, name))
    if vector.shape != parameter.shape:
        raise ValueError(
            f"{path}: a vector of {tuple(vector.shape)} does not fit a parameter of {tuple(parameter.shape)}; "
            "is this another base model?"
        )
    return live, vector.to(dtype=torch.float32, device=parameter.device)


def kind_in_words(adapter: AdapterState) -> str:
    """ "DoRA", "LoRA", "LoHa with magnitudes" ...; of a mixed adapter "DoRA in 96 layers, LoRA in 32"."""
    counts = Counter(module.kind for module in adapter.modules.values())
    if len(counts) > 1:
        (first, count), *others = counts.most_common()
        return ", ".join([f"{first} in {count} layers", *(f"{kind} in {count}" for kind, count in others)])
    return next(iter(counts), "vectors" if adapter.vectors else "empty")
