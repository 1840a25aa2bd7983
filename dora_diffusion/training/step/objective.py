"""Which objective a base is trained by: its scheduler says the kind, the config the details."""

import inspect
from typing import Any

from dora_diffusion.families import family_of_pipeline
from dora_diffusion.functional.objectives import (
    DiffusionObjective,
    FlowObjective,
    Huber,
    NoiseChanges,
    Objective,
    TimestepDistribution,
    zero_terminal_alphas_cumprod,
)
from dora_diffusion.training.base.sizes import sizes_of
from dora_diffusion.training.config import FlowConfig, LossConfig, OptimConfig, TimestepsConfig

_PLAIN = LossConfig()


def objective_of(
    pipe: Any, optim: OptimConfig, flow: FlowConfig, loss: LossConfig = _PLAIN, *, tokens: int
) -> Objective:
    """The objective of a base.

    Args:
        pipe: the base; its scheduler says what is predicted, its family how a flow's timesteps are shifted.
        optim: its `min_snr_gamma`, of diffusion.
        flow: how timesteps of a flow are shifted and weighed.
        loss: all else of loss and noise.
        tokens: the picture's tokens in the denoiser, on which some schedulers' shift depends.

    Raises:
        ValueError: the scheduler predicts something that cannot be trained, or not with this loss.
    """
    scheduler = pipe.scheduler
    if is_flow(scheduler):
        _refuse_of_flows(loss)
        return FlowObjective(
            shift=family_of_pipeline(pipe).shift(scheduler, tokens) if flow.shift is None else flow.shift,
            distribution=_distribution(loss.timesteps) if loss.timesteps.density else _of_flow(loss.timesteps, flow),
            weighting=flow.weighting,
            noise=_noise(loss),
            huber=_huber(loss),
        )
    kind = scheduler.config.get("prediction_type")
    # EDM's schedulers predict epsilon, too, but of another noise
    if kind not in ("epsilon", "v_prediction") or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"the base's {type(scheduler).__name__} predicts {kind!r}; epsilon and v_prediction of a "
            "scheduler with alphas_cumprod, and flow matching, can be trained"
        )
    if loss.zero_terminal_snr and kind == "epsilon":
        raise ValueError(
            "loss.zero_terminal_snr: got true for a base that predicts epsilon, which says nothing of a picture in "
            "pure noise; expected false, or a base that predicts v"
        )
    is_weighed = loss.weighting != "min_snr" or optim.min_snr_gamma is not None
    return DiffusionObjective(
        zero_terminal_alphas_cumprod(scheduler.betas) if loss.zero_terminal_snr else scheduler.alphas_cumprod.clone(),
        kind,
        weighting=loss.weighting if is_weighed else "none",
        min_snr_gamma=optim.min_snr_gamma or 0.0,
        distribution=_distribution(loss.timesteps),
        noise=_noise(loss),
        huber=_huber(loss),
    )


def _refuse_of_flows(loss: LossConfig) -> None:
    if loss.zero_terminal_snr:
        raise ValueError(
            "loss.zero_terminal_snr: got true for a base of flow matching, whose last timestep is pure noise as it is; "
            "expected false"
        )
    if loss.weighting == "debiased":
        raise ValueError(
            "loss.weighting: got 'debiased' for a base of flow matching, which flow.weighting weighs; expected min_snr "
            "or none, which it leaves unused"
        )


def _distribution(timesteps: TimestepsConfig) -> TimestepDistribution:
    return TimestepDistribution(
        timesteps.density or "uniform",
        mean=timesteps.mean,
        std=timesteps.std,
        mode_scale=timesteps.mode_scale,
        alpha=timesteps.alpha,
        beta=timesteps.beta,
        bias=timesteps.bias,
        lowest=timesteps.min,
        highest=timesteps.max,
    )


def _of_flow(timesteps: TimestepsConfig, flow: FlowConfig) -> TimestepDistribution:
    """With the density of section flow."""
    return TimestepDistribution(
        flow.density,
        mean=flow.logit_mean,
        std=flow.logit_std,
        mode_scale=flow.mode_scale,
        bias=timesteps.bias,
        lowest=timesteps.min,
        highest=timesteps.max,
    )


def _noise(loss: LossConfig) -> NoiseChanges:
    return NoiseChanges(
        offset=loss.noise_offset, has_random_offset=loss.noise_offset_random, perturbation=loss.input_perturbation
    )


def _huber(loss: LossConfig) -> Huber | None:
    return Huber(loss.huber_c, loss.huber_schedule) if loss.kind == "huber" else None


def with_zero_terminal_snr(scheduler: Any) -> Any:
    """A scheduler that draws what `loss.zero_terminal_snr` trains: rescaled betas, timesteps that start at the last.

    It is of the same class, or DDIM where that class has no rescaled betas (PNDM).
    """
    from diffusers import DDIMScheduler

    has_it = "rescale_betas_zero_snr" in inspect.signature(type(scheduler).__init__).parameters
    kind = type(scheduler) if has_it else DDIMScheduler
    return kind.from_config(scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing")


class Objectives:
    """The objectives of a base, one for each number of tokens that pictures have."""

    def __init__(self, pipe: Any, optim: OptimConfig, flow: FlowConfig, loss: LossConfig = _PLAIN) -> None:
        self._pipe, self._optim, self._flow, self._loss = pipe, optim, flow, loss
        self._sizes = sizes_of(pipe)
        self._made: dict[tuple[int, LossConfig], Objective] = {}

    def of(self, size: tuple[int, int]) -> Objective:
        """For pictures of (width, height); raises as `objective_of` does."""
        return self._of(size, self._loss)

    def measuring(self, size: tuple[int, int]) -> Objective:
        """What pictures of (width, height) are measured by, whatever is trained.

        The squared error of plain noise at all timesteps, as without a section `loss`, so that runs compare that differ
        in it; with the same schedule, for that is what the adapter will be asked to draw with.
        """
        return self._of(size, LossConfig(zero_terminal_snr=self._loss.zero_terminal_snr))

    def _of(self, size: tuple[int, int], loss: LossConfig) -> Objective:
        key = self._sizes.tokens(size), loss
        if key not in self._made:
            self._made[key] = objective_of(self._pipe, self._optim, self._flow, loss, tokens=key[0])
        return self._made[key]


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler draws by flow matching."""
    predicted = scheduler.config.get("prediction_type")
    return "FlowMatch" in type(scheduler).__name__ or predicted == "flow_prediction"
