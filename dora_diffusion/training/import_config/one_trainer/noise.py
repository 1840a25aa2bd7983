"""Options of the loss, the noise and the timesteps."""

from typing import Any

from dora_diffusion.training.import_config.one_trainer.network import has_unet
from dora_diffusion.training.import_config.records import (
    Answer,
    Row,
    Source,
    is_off,
    lost,
    needless,
    several,
    to,
    unneeded,
    without,
)
from dora_diffusion.training.import_config.values import flag, number, real, text


def _kind(source: Source) -> str:
    return str(source.get("model_type", "STABLE_DIFFUSION_15"))


def _is_flow(source: Source) -> bool:
    return not (has_unet(source) or _kind(source).startswith(("PIXART", "WUERSTCHEN", "STABLE_CASCADE")))


def _predicts_v(source: Source) -> bool:
    """Whether it is said that the base predicts v, by its kind or outright."""
    return flag(source.get("force_v_prediction", False)) or _kind(source) in (
        "STABLE_DIFFUSION_20",
        "STABLE_DIFFUSION_21",
    )


def _loss_weight(value: Any, source: Source) -> Answer:
    kind = text(value).upper()
    if kind == "MIN_SNR_GAMMA":
        return to("optim.min_snr_gamma", real(source.get("loss_weight_strength", 5.0)))
    answer: dict[str, Any] = {"optim.min_snr_gamma": None}
    if kind == "CONSTANT":
        return several(answer)
    if kind == "SIGMA":
        return several({**answer, "flow.weighting": "sigma_sqrt"}, "the nearest")
    if kind == "DEBIASED_ESTIMATION" and not _is_flow(source) and not _predicts_v(source):
        return several({**answer, "loss.weighting": "debiased"})
    return several(answer, f"{kind} has no counterpart: every timestep weighs the same")


def _is_shifted(source: Source) -> bool:
    return number(source.get("timestep_shift", 1.0)) != 1 or flag(source.get("dynamic_timestep_shifting", False))


def _distribution(value: Any, source: Source) -> Answer:
    kind = text(value).upper()
    if not _is_flow(source) and kind == "UNIFORM":
        return needless("as here")
    weight, bias = real(source.get("noising_weight", 0.0)), real(source.get("noising_bias", 0.0))
    settings: dict[str, dict[str, Any]] = {
        "UNIFORM": {"density": "uniform"},
        "LOGIT_NORMAL": {"density": "logit_normal", "mean": bias, "std": weight + 1.0},
        "HEAVY_TAIL": {"density": "mode", "mode_scale": weight},
        "BETA": {"density": "beta", "alpha": weight, "beta": bias},
    }
    if kind not in settings:
        raise ValueError(f"got {kind}, expected {', '.join(settings)}")
    return several({f"loss.timesteps.{name}": found for name, found in settings[kind].items()})


def _shift(value: Any, source: Source) -> Answer:
    if flag(source.get("dynamic_timestep_shifting", False)):
        return needless("dynamic_timestep_shifting decides")
    if _is_flow(source):
        return to("flow.shift", real(value))
    return needless("as here") if number(value) == 1 else to("loss.timesteps.bias", real(value))


def _dynamic_shift(value: Any, source: Source) -> Answer:
    if not flag(value):
        return needless("timestep_shift decides")
    return to("flow.shift", None, "the shift that the base draws with")


def _strength(ours: str, limit: float) -> Any:
    def convert(value: Any, source: Source) -> Answer:
        if number(value) == limit:
            return needless("as here")
        if _is_shifted(source):
            return lost("cut before the shift there, and after it here")
        return to(ours, int(1000 * real(value)))

    return convert


def _offset(value: Any, source: Source) -> Answer:
    if is_off(value):
        return needless("off there too")
    if flag(source.get("generalized_offset_noise", False)) and not _is_flow(source):
        return lost("generalized: it grows with the timestep, which has no counterpart")
    return to("loss.noise_offset", real(value))


def _zero_terminal(value: Any, source: Source) -> Answer:
    if not flag(value) or not has_unet(source):
        return needless("off there too" if not flag(value) else "of Stable Diffusion 1, 2 and XL")
    if not _predicts_v(source):
        return lost("of bases that predict v alone: epsilon says nothing of a picture in pure noise")
    return to("loss.zero_terminal_snr", True)


NOISE: list[Row] = [
    Row(
        "loss_weight_fn",
        ("optim.min_snr_gamma", "loss.weighting"),
        (
            "MIN_SNR_GAMMA with loss_weight_strength, else null; DEBIASED_ESTIMATION of epsilon: debiased, where "
            "timestep 0 weighs 8 % more"
        ),
        _loss_weight,
        "DEBIASED_ESTIMATION",
        unset="CONSTANT",
    ),
    *unneeded("with loss_weight_fn", "loss_weight_strength", example=5.0),
    Row(
        "min_snr_gamma",
        ("optim.min_snr_gamma",),
        "of older files",
        lambda value, source: to("optim.min_snr_gamma", real(value)) if number(value) else needless("off there too"),
        5.0,
    ),
    *without(
        "no counterpart: the squared error or pseudo-Huber (`loss.kind: huber`) is the loss here",
        "mae_strength huber_strength log_cosh_strength",
        example=0.5,
    ),
    *unneeded(
        "with those strengths; without them it is the squared error",
        "mse_strength vb_loss_strength huber_delta loss_scaler",
        example=1.0,
    ),
    Row("offset_noise_weight", ("loss.noise_offset",), "unless generalized", _offset, 0.05),
    *unneeded("with offset_noise_weight", "generalized_offset_noise"),
    *without(
        "it is in the target, too, there; `loss.input_perturbation` is in the input alone",
        "perturbation_noise_weight",
        example=0.05,
    ),
    Row(
        "rescale_noise_scheduler_to_zero_terminal_snr",
        ("loss.zero_terminal_snr",),
        "of bases that predict v",
        _zero_terminal,
        True,
        beside={"model_type": "STABLE_DIFFUSION_21"},
    ),
    *without(
        "the base's own scheduler says what its denoiser predicts",
        "force_v_prediction force_epsilon_prediction",
        example=True,
    ),
    Row(
        "min_noising_strength",
        ("loss.timesteps.min",),
        "x 1000, without a shift",
        _strength("loss.timesteps.min", 0),
        0.1,
    ),
    Row(
        "max_noising_strength",
        ("loss.timesteps.max",),
        "x 1000, without a shift",
        _strength("loss.timesteps.max", 1),
        0.9,
    ),
    Row(
        "timestep_distribution",
        tuple(f"loss.timesteps.{name}" for name in ("density", "mean", "std", "mode_scale", "alpha", "beta")),
        (
            "LOGIT_NORMAL: mean noising_bias, deviation noising_weight + 1; HEAVY_TAIL: mode, scale "
            "noising_weight; BETA: alpha noising_weight, beta noising_bias"
        ),
        _distribution,
        "LOGIT_NORMAL",
        beside={"model_type": "FLUX_DEV_1"},
        unset="UNIFORM",
    ),
    *unneeded("with timestep_distribution", "noising_weight noising_bias", example=0.5),
    Row(
        "timestep_shift",
        ("flow.shift", "loss.timesteps.bias"),
        "bias where the base is not trained by flow matching",
        _shift,
        3.0,
        beside={"model_type": "FLUX_DEV_1"},
        unset=1.0,
    ),
    Row("dynamic_timestep_shifting", ("flow.shift",), "null: the shift that the base draws with", _dynamic_shift, True),
]
