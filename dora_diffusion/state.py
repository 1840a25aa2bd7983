"""AdapterState: what an adapter is, whatever file it came from or goes to."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dora_diffusion.functional import Axis, scale_of


@dataclass(frozen=True)
class ModuleState:
    """One adapted layer.

    Attributes:
        down: A, (r, in) or (r, in, kh, kw).
        up: B, (out, r) or (out, r, 1, 1).
        alpha: the scale is alpha / r (alpha / sqrt(r) when `rank_stabilised`).
        magnitude: m, (out,), or None for plain LoRA; (in,) on the in axis.
        rank_stabilised: see alpha.
        axis: what m scales: "out" rows of the weight (the paper, PEFT), "in" columns (older files; drawing only).
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None
    rank_stabilised: bool = False
    axis: Axis = "out"

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """s of D = s B A."""
        return scale_of(self.alpha, self.rank, rank_stabilised=self.rank_stabilised)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "ModuleState":
        """The same module with its tensors moved or cast."""
        magnitude = self.magnitude
        return replace(
            self,
            down=self.down.to(device=device, dtype=dtype),
            up=self.up.to(device=device, dtype=dtype),
            magnitude=None if magnitude is None else magnitude.to(device=device, dtype=dtype),
        )


@dataclass(frozen=True)
class AdapterState:
    """A whole adapter: module path -> ModuleState, and the file's metadata.

    Paths start with the pipeline's component: `unet.down_blocks.0...to_q`, `text_encoder.encoder.layers.0...q_proj`
    (without the `text_model.` that CLIP's files carry).
    """

    modules: Mapping[str, ModuleState]
    metadata: Mapping[str, str] = field(default_factory=dict)

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
        return tuple(dict.fromkeys(path.split(".", 1)[0] for path in self.modules))

    def under(self, component: str) -> "AdapterState":
        """The same adapter with `component.` before every path."""
        return replace(self, modules={f"{component}.{path}": module for path, module in self.modules.items()})


def join(states: list[AdapterState], metadata: Mapping[str, str]) -> AdapterState:
    """Adapters of different components as one; a path that occurs twice is an error."""
    modules: dict[str, ModuleState] = {}
    for state in states:
        if both := modules.keys() & state.modules.keys():
            raise ValueError(f"two adapters both hold {sorted(both)[0]}: expected each layer once")
        modules.update(state.modules)
    return AdapterState(modules, dict(metadata))
