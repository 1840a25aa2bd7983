"""How far a flow's timesteps are shifted towards noise when a picture is drawn, by its number of tokens."""

import math
from typing import Any

# FLUX.2's shift depends on the number of steps as well; this is its pipelines' own.
_FLUX_2_STEPS = 50


def scheduler_shift(scheduler: Any, tokens: int) -> float:
    """What a scheduler's config says; 1 is no shift.

    With dynamic shifting mu is linear in the number of tokens and the shift is e^mu, or mu itself when it is "linear"
    (diffusers' `FlowMatchEulerDiscreteScheduler.time_shift`).
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift") or config.get("flow_shift") or 1.0)
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return _of_mu(scheduler, low + (high - low) * (tokens - least) / (most - least))


def flux_2_shift(scheduler: Any, tokens: int) -> float:
    """FLUX.2's, which its pipelines compute from a fit and not from the scheduler's config."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return _of_mu(scheduler, compute_empirical_mu(tokens, _FLUX_2_STEPS))


def _of_mu(scheduler: Any, mu: float) -> float:
    return mu if scheduler.config.get("time_shift_type") == "linear" else math.exp(mu)
