"""AdapterState: what an adapter is, whatever file it came from or goes to."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypeVar

import torch
from torch import Tensor

from dora_diffusion.functional.blend_modes import AdapterTerm
from dora_diffusion.functional.dora import Axis, low_rank_delta, rows, scale_of
from dora_diffusion.functional.lycoris import (
    Factors,
    Pair,
    dense_pair,
    hadamard_delta,
    hadamard_pair,
    kronecker_delta,
    kronecker_norm,
    kronecker_pair,
    pair_norm,
    tucker_down,
)
from dora_diffusion.utils.checks import check_fields

Algorithm = Literal["loha", "lokr", "full"]
_NAMES: Mapping[Algorithm, str] = {"loha": "LoHa", "lokr": "LoKr", "full": "whole difference"}

WeightOf = Callable[[str], Tensor]
"""An adapter's path, component first -> the layer's dense W (out, in[, kh, kw]) as stored; ValueError when missing."""


@dataclass(frozen=True)
class ModuleState:
    """One adapted layer, as a low-rank pair.

    Attributes:
        down: A, (r, in) or (r, in, kh, kw); (r, in, 1, 1) beside a `mid`.
        up: B, (out, r) or (out, r, 1, 1).
        alpha: the scale is alpha / r (alpha / sqrt(r) when `rank_stabilised`).
        magnitude: m, (out,), or None for plain LoRA; (in,) on the in axis.
        rank_stabilised: see alpha.
        axis: what m scales: "out" rows of the weight (the paper, PEFT), "in" columns (older files; drawing only).
        mid: the core (r, r, kh, kw) of a convolution's Tucker pair (LyCORIS), or None.

    Examples:
        ```python
        import torch

        import dora_diffusion as dd

        module = dd.ModuleState(down=torch.randn(4, 64), up=torch.randn(128, 4), alpha=2.0, magnitude=torch.ones(128))
        assert (module.rank, module.scale, module.shape) == (4, 0.5, (128, 64))
        torch.testing.assert_close(module.delta(), 0.5 * module.up @ module.down)
        ```
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None
    rank_stabilised: bool = False
    axis: Axis = "out"
    mid: Tensor | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def __repr__(self) -> str:
        return _line_of(self)

    @property
    def kind(self) -> str:
        """What it is called: "DoRA" or "LoRA"."""
        return "LoRA" if self.magnitude is None else "DoRA"

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """s of D = s B A."""
        return scale_of(self.alpha, self.rank, rank_stabilised=self.rank_stabilised)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in kh kw) of the weight."""
        taps = 1 if self.mid is None else self.mid[0, 0].numel()
        return self.up.shape[0], self.down[0].numel() * taps

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that there is, by attribute."""
        found = {"down": self.down, "up": self.up, "mid": self.mid, "magnitude": self.magnitude}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def as_pair(self) -> "ModuleState":
        """The same adapter without a Tucker core: itself, where it has none."""
        return self if self.mid is None else replace(self, down=tucker_down(self.down, self.mid), mid=None)

    def delta(self) -> Tensor:
        """D = s B A, dense (out, in[, kh, kw]), in the factors' dtype."""
        pair = self.as_pair()
        return low_rank_delta(pair.down, pair.up, self.scale)

    def delta_norm(self) -> Tensor:
        """||D||, without forming D where it need not be."""
        pair = self.as_pair()
        return abs(self.scale) * pair_norm(rows(pair.up), rows(pair.down))

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "ModuleState":
        """The same module with its tensors moved or cast."""
        moved = {name: tensor.to(device=device, dtype=dtype) for name, tensor in self.tensors.items()}
        return replace(self, down=moved["down"], up=moved["up"], magnitude=moved.get("magnitude"), mid=moved.get("mid"))


@dataclass(frozen=True)
class FactoredState:
    """One adapted layer whose difference D is written another way than as a low-rank pair.

    Attributes:
        algorithm: "loha", "lokr", or "full" (D itself, as `diff`).
        factors: LyCORIS' tensors by its names: `hada_w1_a`, `lokr_w2`, `diff` ...
        scale: what multiplies the factors' product.
        alpha: as the file has it, from which `scale` came; None where it has none.
        magnitude: as in ModuleState.
        axis: as in ModuleState.
        dimensions: of the weight, as far as the file tells: 4 for a convolution's, whose factors may lie flat.
    """

    algorithm: Algorithm
    factors: Factors
    scale: float = 1.0
    alpha: float | None = None
    magnitude: Tensor | None = None
    axis: Axis = "out"
    dimensions: int = 2

    def __post_init__(self) -> None:
        check_fields(self)

    def __repr__(self) -> str:
        return _line_of(self)

    @property
    def kind(self) -> str:
        """What it is called: "LoHa", "LoKr" or "whole difference", perhaps "with magnitudes"."""
        return _NAMES[self.algorithm] + ("" if self.magnitude is None else " with magnitudes")

    @property
    def rank(self) -> int:
        """The rank of the pair that `as_pair` makes, found without making it."""
        return self._sizes[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in kh kw) of the weight."""
        rows, _, columns = self._sizes
        return rows, columns

    @cached_property
    def _sizes(self) -> tuple[int, int, int]:
        """(out, r, in kh kw) of the pair; kept, for a product of shapes takes torch a millisecond or two."""
        pair = _PAIRS[self.algorithm]({name: tensor.to("meta") for name, tensor in self.factors.items()})
        return pair.left.shape[0], pair.right.shape[0], pair.right.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that there is, by name."""
        return {**self.factors, **({} if self.magnitude is None else {"magnitude": self.magnitude})}

    def as_pair(self) -> ModuleState:
        """The same adapter as a low-rank pair, exactly; its rank may be as high as the weight's.

        A convolution's pair is (r, in, kh, kw) and (out, r, 1, 1) where the factors tell its taps, else flat.
        """
        pair = _PAIRS[self.algorithm](self.factors)
        rank = pair.right.shape[0]
        taps = next((factor.shape[2:] for factor in self.factors.values() if factor.dim() > 2), torch.Size())
        down = pair.right.reshape(rank, -1, *taps) if taps else pair.right
        up = pair.left.reshape(*pair.left.shape, *[1] * len(taps))
        return ModuleState(down, up, self.scale * rank, self.magnitude, axis=self.axis)

    def delta(self) -> Tensor:
        """D, dense, (out, in[, kh, kw]) or flat (out, in kh kw) as the factors are, in their dtype."""
        return self.scale * _DELTAS[self.algorithm](self.factors)

    def delta_norm(self) -> Tensor:
        """||D||, without forming D where it need not be."""
        return abs(self.scale) * _NORMS[self.algorithm](self.factors)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "FactoredState":
        """The same module with its tensors moved or cast."""
        factors = {name: tensor.to(device=device, dtype=dtype) for name, tensor in self.factors.items()}
        magnitude = None if self.magnitude is None else self.magnitude.to(device=device, dtype=dtype)
        return replace(self, factors=factors, magnitude=magnitude)


def _full_delta(factors: Factors) -> Tensor:
    return factors["diff"]


def _full_pair(factors: Factors) -> Pair:
    return dense_pair(rows(factors["diff"]))


def _full_norm(factors: Factors) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(factors["diff"])
    return norm


def _hadamard_norm(factors: Factors) -> Tensor:
    pair = hadamard_pair(factors)
    return pair_norm(pair.left, pair.right)


_NORMS: Mapping[Algorithm, Callable[[Factors], Tensor]] = {
    "loha": _hadamard_norm,
    "lokr": kronecker_norm,
    "full": _full_norm,
}
_DELTAS: Mapping[Algorithm, Callable[[Factors], Tensor]] = {
    "loha": hadamard_delta,
    "lokr": kronecker_delta,
    "full": _full_delta,
}
_PAIRS: Mapping[Algorithm, Callable[[Factors], Pair]] = {
    "loha": hadamard_pair,
    "lokr": kronecker_pair,
    "full": _full_pair,
}

Module = ModuleState | FactoredState


def _line_of(module: Module) -> str:
    """A module without its numbers, on one line."""
    rows, columns = module.shape
    facts = [module.kind, f"rank {module.rank}", f"{rows} x {columns}", f"scale {module.scale:g}"]
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in module.tensors.values()}
    axis = [f"axis {module.axis}"] if module.magnitude is not None else []
    return f"{type(module).__name__}({', '.join([*facts, *axis, *sorted(dtypes)])})"


def rank_in_words(ranks: Sequence[int]) -> str:
    """ "rank 8", "ranks 4 to 16"; nothing where there is none."""
    if not ranks:
        return ""
    low, high = min(ranks), max(ranks)
    return f"rank {low}" if low == high else f"ranks {low} to {high}"


def term_of(module: Module, strength: float = 1.0) -> AdapterTerm:
    """A module as `blend_modes` takes it: D dense, in the module's dtype, with its magnitude and a strength."""
    return AdapterTerm(module.delta(), module.magnitude, module.axis, strength)


@dataclass(frozen=True)
class AdapterState:
    """A whole adapter: module path -> what changes that layer, and the file's metadata.

    Paths start with the pipeline's component: `unet.down_blocks.0...to_q`, `text_encoder.encoder.layers.0...q_proj`
    (without the `text_model.` that CLIP's files carry).

    Attributes:
        modules: layer -> its low-rank or factored difference.
        metadata: strings of the file.
        vectors: parameter -> what is added to it: biases, and weights of normalisations (`unet...norm1.weight`).
        extra: tensors that belong to no layer, by their keys in the file: kept, written back, reported.
        origin: the name of the format that it was read from; empty for one that came from no file.
        families: the only ones that it can be for, where the file called layers as their makers do; empty for any.

    Examples:
        ```python
        import dora_diffusion as dd

        adapter = dd.load_adapter("ink.safetensors")
        for path, module in adapter.modules.items():
            print(path, module.rank, float(module.delta_norm()))

        unet_alone = {path: module for path, module in adapter.modules.items() if path.startswith("unet.")}
        dd.save_adapter(dd.AdapterState(unet_alone), "ink-unet.safetensors")
        ```
    """

    modules: Mapping[str, Module]
    metadata: Mapping[str, str] = field(default_factory=dict)
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    origin: str = ""
    families: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)

    def __repr__(self) -> str:
        kinds = Counter(module.kind for module in self.modules.values())
        tensors = [tensor for module in self.modules.values() for tensor in module.tensors.values()]
        count = sum(tensor.numel() for tensor in (*tensors, *self.vectors.values()))
        family = self.metadata.get("dora_diffusion.family")
        facts = [
            *(f"{number} {kind} layers" for kind, number in kinds.most_common()),
            rank_in_words(self.ranks),
            *([f"{len(self.vectors)} vectors"] if self.vectors else []),
            f"{count / 1e6:.1f} M parameters",
            f"family {family}" if family else " and ".join(self.components),
        ]
        return f"AdapterState({', '.join(filter(None, facts))})"

    @property
    def is_dora(self) -> bool:
        """Whether any module carries magnitudes."""
        return any(module.magnitude is not None for module in self.modules.values())

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, ascending."""
        return tuple(sorted({module.rank for module in self.modules.values()}))

    @property
    def components(self) -> tuple[str, ...]:
        """The pipeline's parts that are adapted: 'unet', 'text_encoder' ..."""
        return tuple(dict.fromkeys(path.split(".", 1)[0] for path in (*self.modules, *self.vectors)))

    def under(self, component: str) -> "AdapterState":
        """The same adapter with `component.` before every path."""
        return replace(
            self,
            modules={f"{component}.{path}": module for path, module in self.modules.items()},
            vectors={f"{component}.{path}": vector for path, vector in self.vectors.items()},
        )


def cast(adapter: AdapterState, dtype: torch.dtype) -> AdapterState:
    """The same adapter with its pairs, factors and vectors in another dtype.

    Magnitudes stay as they are: m is the length of W's own rows, so that rounding it to 16 bits changes W by as much as
    an adapter does (one part in 256 in bf16). Tensors that belong to no layer stay, too.
    """
    return replace(
        adapter,
        modules={path: replace(m.to(dtype=dtype), magnitude=m.magnitude) for path, m in adapter.modules.items()},
        vectors={path: vector.to(dtype) for path, vector in adapter.vectors.items()},
    )


def join(states: list[AdapterState], metadata: Mapping[str, str]) -> AdapterState:
    """Adapters of different components as one; a path that occurs twice is an error."""
    modules: dict[str, Module] = {}
    vectors: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}
    for state in states:
        _take_up(modules, state.modules)
        _take_up(vectors, state.vectors)
        _take_up(extra, state.extra)
    return AdapterState(modules, dict(metadata), vectors, extra)


T = TypeVar("T")


def _take_up(have: dict[str, T], more: Mapping[str, T]) -> None:
    if both := have.keys() & more.keys():
        raise ValueError(f"two adapters both hold {sorted(both)[0]}: expected each layer once")
    have.update(more)
