"""What a blend is asked for, and what it tells of the result."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dora_diffusion.functional.blend_modes import MODE_SENTENCES
from dora_diffusion.functional.merge_methods import METHOD_SENTENCES, Election, Sparsity
from dora_diffusion.state import AdapterState
from dora_diffusion.utils.checks import check_fields

BLEND_SENTENCES: Mapping[str, str] = {**MODE_SENTENCES, **METHOD_SENTENCES}
"""Every mode of `blend` -> one sentence for people."""


@dataclass(frozen=True)
class BlendOptions:
    """What only some modes ask for.

    Attributes:
        density: the share of entries that ties, dare and magnitude-prune keep.
        seed: of dare's choice; each layer has a choice of its own, whatever the order of the layers.
        elect: how ties and dare-ties elect a sign.
        as_dora: save layers as DoRA, or as plain LoRA. None: DoRA where an adapter is one and the mode is one of whole
            weights, plain LoRA for the modes of differences.
        extra: what happens when tensors that belong to no layer stand in two files and differ: "refuse" the blend, or
            "drop" them from it.

    Examples:
        ```python
        import dora_diffusion as dd

        adapters = {"ink": dd.load_adapter("ink.safetensors"), "lego": dd.load_adapter("lego.safetensors")}
        options = dd.BlendOptions(density=0.3, seed=7)
        mix = dd.blend(adapters, {"ink": 1, "lego": 1}, base="pocket", mode="dare-ties", rank=4, options=options)
        ```
    """

    density: float = 0.5
    seed: int = 0
    elect: Election = "total"
    as_dora: bool | None = None
    extra: Literal["refuse", "drop"] = "refuse"

    def __post_init__(self) -> None:
        check_fields(self)
        Sparsity(self.density, None, self.elect)  # for its checks
        if self.extra not in ("refuse", "drop"):
            raise ValueError(f"extra must be 'refuse' or 'drop', got {self.extra!r}")


@dataclass(frozen=True)
class LayerReport:
    """One layer of a blend.

    Attributes:
        rank: of the saved pair.
        error: ||W'_saved - W'|| / ||W' - W||; 0 where the saved pair is the blend by its form.
        adapters: whose layers went into it.
    """

    rank: int
    error: float
    adapters: tuple[str, ...]


@dataclass(frozen=True)
class BlendReport:
    """What a blend became.

    Attributes:
        mode: as asked.
        layers: path -> its report.
        vectors: how many parameters have a vector.
        kept_extra: keys of tensors that belong to no layer and were taken along, unchanged.
        dropped_extra: keys of those that were left out, for two files disagreed.
    """

    mode: str
    layers: Mapping[str, LayerReport]
    vectors: int = 0
    kept_extra: tuple[str, ...] = ()
    dropped_extra: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"BlendReport({self.sentence()})"

    @property
    def exact(self) -> int:
        """How many layers are the blend by their form, not by approximation."""
        return sum(layer.error == 0 for layer in self.layers.values())

    @property
    def worst(self) -> str:
        """The path of the layer with the largest error; empty where there is no layer."""
        return max(self.layers, key=lambda path: self.layers[path].error, default="")

    def sentence(self) -> str:
        """The whole on one line."""
        if not self.layers:
            return f"{self.mode}: no layer"
        ranks = [layer.rank for layer in self.layers.values()]
        errors = [layer.error for layer in self.layers.values()]
        extra = f"; {len(self.kept_extra)} other tensors kept" if self.kept_extra else ""
        extra += f"; {len(self.dropped_extra)} other tensors dropped" if self.dropped_extra else ""
        return (
            f"{self.mode}: {len(self.layers)} layers, rank {min(ranks)} to {max(ranks)}, {self.exact} exact; "
            f"relative error {sum(errors) / len(errors):.2g} on average, {max(errors):.2g} at most{extra}"
        )

    def as_json(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        return {**asdict(self), "exact": self.exact, "worst": self.worst}


@dataclass(frozen=True)
class Blended:
    """A blend and its report."""

    adapter: AdapterState
    report: BlendReport
