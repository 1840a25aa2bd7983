"""Which objective a base is trained by: its scheduler says the kind, the config the details."""

from typing import Any

from dora_diffusion.families import family_of_pipeline
from dora_diffusion.functional.objectives import DiffusionObjective, FlowObjective, Objective
from dora_diffusion.training.base.sizes import sizes_of
from dora_diffusion.training.config import FlowConfig, OptimConfig


def objective_of(pipe: Any, optim: OptimConfig, flow: FlowConfig, *, tokens: int) -> Objective:
    """The objective of a base.

    Args:
        pipe: the base; its scheduler says what is predicted, its family how a flow's timesteps are shifted.
        optim: its `min_snr_gamma`, of diffusion.
        flow: how timesteps of a flow are drawn and weighed.
        tokens: the picture's tokens in the denoiser, on which some schedulers' shift depends.

    Raises:
        ValueError: the scheduler predicts something that cannot be trained.
    """
    scheduler = pipe.scheduler
    if is_flow(scheduler):
        shift = family_of_pipeline(pipe).shift(scheduler, tokens) if flow.shift is None else flow.shift
        return FlowObjective(
            shift=shift,
            density=flow.density,
            logit_mean=flow.logit_mean,
            logit_std=flow.logit_std,
            mode_scale=flow.mode_scale,
            weighting=flow.weighting,
        )
    kind = scheduler.config.get("prediction_type")
    # EDM's schedulers predict epsilon, too, but of another noise
    if kind not in ("epsilon", "v_prediction") or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"the base's {type(scheduler).__name__} predicts {kind!r}; epsilon and v_prediction of a "
            "scheduler with alphas_cumprod, and flow matching, can be trained"
        )
    return DiffusionObjective(scheduler.alphas_cumprod.clone(), kind, optim.min_snr_gamma)


class Objectives:
    """The objectives of a base, one for each number of tokens that pictures have."""

    def __init__(self, pipe: Any, optim: OptimConfig, flow: FlowConfig) -> None:
        self._pipe, self._optim, self._flow = pipe, optim, flow
        self._sizes = sizes_of(pipe)
        self._made: dict[int, Objective] = {}

    def of(self, size: tuple[int, int]) -> Objective:
        """For pictures of (width, height); raises as `objective_of` does."""
        tokens = self._sizes.tokens(size)
        if tokens not in self._made:
            self._made[tokens] = objective_of(self._pipe, self._optim, self._flow, tokens=tokens)
        return self._made[tokens]


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler draws by flow matching."""
    predicted = scheduler.config.get("prediction_type")
    return "FlowMatch" in type(scheduler).__name__ or predicted == "flow_prediction"
