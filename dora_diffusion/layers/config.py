"""How layers are adapted."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dora_diffusion.layers.initialisation import INITS, Init
from dora_diffusion.utils.checks import check_fields

NormGrad = Literal["detached", "exact"]
NORM_GRADS: tuple[NormGrad, ...] = ("detached", "exact")


@dataclass(frozen=True)
class DoRAConfig:
    """How layers are adapted.

    Attributes:
        rank: r of the low-rank pair.
        alpha: the scale is alpha / rank.
        target_modules: None for the family's attention layers; a preset (`attention`, `all-linear`, `all`); a list of
            path endings; or a regular expression that must match the whole path.
        dropout: probability, on the low-rank branch only.
        use_dora: False trains a plain LoRA.
        norm_grad: "detached" holds the norm constant in the backward pass (the paper's default), "exact" does not.
        use_rslora: the scale is alpha / sqrt(rank) (arXiv 2312.03732).
        rank_pattern: pattern -> rank of the layers whose path ends in it; a regular expression, the first that fits, as
            in PEFT: `{"mid_block.*to_k": 32, "to_out.0": 4}`.
        alpha_pattern: pattern -> alpha, likewise.
        init: what A and B start from: "default" (B = 0), "gaussian", "orthogonal" or "pissa"; see
            `layers.initialisation`. An embedding knows "pissa" and one other start, A = 0.
        train_magnitude: False freezes m at the norm of the base's rows, so that only directions are learnt.

    Examples:
        ```python
        from torch import nn

        import dora_diffusion as dd

        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
        config = dd.DoRAConfig(rank=4, alpha=8, target_modules=["0", "2"], rank_pattern={"2": 2})
        injection = dd.inject(model, config)
        assert injection.matched == {"0": 4, "2": 2}
        ```
    """

    rank: int = 8
    alpha: float = 8.0
    target_modules: str | list[str] | None = None
    dropout: float = 0.0
    use_dora: bool = True
    norm_grad: NormGrad = "detached"
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    init: Init = "default"
    train_magnitude: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank < 1:
                raise ValueError(f"rank must be at least 1, got {rank}")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if not 0 < alpha < math.inf:
                raise ValueError(f"alpha must be a positive number, got {alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        for name, value, known in (("norm_grad", self.norm_grad, NORM_GRADS), ("init", self.init, INITS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
