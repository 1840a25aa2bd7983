"""Which objective a base is trained by: its scheduler says the kind, the config the details."""

import math
from typing import Any

from dora_diffusion.objectives import DiffusionObjective, FlowObjective, Objective
from dora_diffusion.training.config import TrainConfig


def objective_of(scheduler: Any, config: TrainConfig, *, tokens: int) -> Objective:
    """The objective of a base.

    Args:
        scheduler: the pipeline's.
        config: its `optim.min_snr_gamma` and `flow` section.
        tokens: the picture's tokens in the denoiser, on which some schedulers' shift depends.

    Raises:
        ValueError: the scheduler predicts something that cannot be trained.
    """
    if is_flow(scheduler):
        flow = config.flow
        return FlowObjective(
            shift=scheduler_shift(scheduler, tokens) if flow.shift is None else flow.shift,
            density=flow.density,
            logit_mean=flow.logit_mean,
            logit_std=flow.logit_std,
            mode_scale=flow.mode_scale,
            weighting=flow.weighting,
        )
    kind = scheduler.config.get("prediction_type")
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"{config.model}: its scheduler predicts {kind!r}; epsilon, v_prediction and flow matching can be trained"
        )
    return DiffusionObjective(scheduler.alphas_cumprod.clone(), kind, config.optim.min_snr_gamma)


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler draws by flow matching."""
    predicted = scheduler.config.get("prediction_type")
    return "FlowMatch" in type(scheduler).__name__ or predicted == "flow_prediction"


def scheduler_shift(scheduler: Any, tokens: int) -> float:
    """The shift of its timesteps towards noise for a picture of so many tokens, 1 for none.

    With dynamic shifting mu is linear in the number of tokens and shift = e^mu, or mu itself when it is "linear"
    (diffusers' `FlowMatchEulerDiscreteScheduler.time_shift`).
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift") or config.get("flow_shift") or 1.0)
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - least) / (most - least)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
