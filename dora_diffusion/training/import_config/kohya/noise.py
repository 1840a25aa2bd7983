"""Options of the loss, and of the noise that is not that of flow matching alone."""

from typing import Any

from dora_diffusion.training.import_config.kohya.steps import is_flow, network
from dora_diffusion.training.import_config.records import (
    Answer,
    Row,
    Source,
    is_off,
    lost,
    needless,
    to,
    unneeded,
    without,
)
from dora_diffusion.training.import_config.values import flag, loss_kind, number, of_huber, real, text, whole

_NOT_OF_FLOWS = "not used there for bases of flow matching"


def _gamma(value: Any, source: Source) -> Answer:
    return to("optim.min_snr_gamma", None if is_off(value) else real(value))


def _huber_c(value: Any, source: Source) -> Answer:
    """In the constant schedule huber_scale is a factor of it."""
    if str(source.get("loss_type", "l2")).lower() != "huber":
        return needless("with loss_type huber")
    is_constant = str(source.get("huber_schedule", "snr")).lower() == "constant"
    scale = real(source.get("huber_scale", 1.0)) if is_constant else 1.0
    return to("loss.huber_c", real(value) * scale, f"x huber_scale {scale:g}" if scale != 1 else "")


def _huber_scale(value: Any, source: Source) -> Answer:
    schedule = str(source.get("huber_schedule", "snr")).lower()
    if str(source.get("loss_type", "l2")).lower() != "huber" or number(value) == 1 or schedule == "snr":
        return needless("1, or not used")
    if schedule == "constant" and source.has("huber_c"):
        return needless("in huber_c")
    return lost("a factor of huber_c, which has none here with that schedule")


def _debiased(value: Any, source: Source) -> Answer:
    if not flag(value):
        return needless("off there too")
    if is_flow(source):
        return needless(_NOT_OF_FLOWS)
    if flag(source.get("v_parameterization", False)):
        return lost("of v it is 1 / (SNR + 1) there, here what it is of epsilon: `loss.weighting: debiased`")
    if not is_off(source.get("min_snr_gamma", 0)):
        return lost("beside min_snr_gamma, and one of them is all there is here")
    return to("loss.weighting", "debiased")


def _zero_terminal(value: Any, source: Source) -> Answer:
    if not flag(value):
        return needless("off there too")
    if is_flow(source):
        return needless(_NOT_OF_FLOWS)
    if not flag(source.get("v_parameterization", False)):
        return lost("of bases that predict v alone: epsilon says nothing of a picture in pure noise")
    return to("loss.zero_terminal_snr", True)


def _is_multires(source: Source) -> bool:
    return str(source.get("noise_offset_type", "original")).lower() == "multires"


def _offset(value: Any, source: Source) -> Answer:
    if is_flow(source) or _is_multires(source) or is_off(value):
        return needless(_NOT_OF_FLOWS if is_flow(source) else "off there too")
    return to("loss.noise_offset", real(value))


def _random_offset(value: Any, source: Source) -> Answer:
    has_offset = not is_off(source.get("noise_offset", 0)) and not is_flow(source) and not _is_multires(source)
    if not flag(value) or not has_offset:
        return needless("without noise_offset" if flag(value) else "off there too")
    return to("loss.noise_offset_random", True, "for each picture; there for each batch")


def _perturbation(value: Any, source: Source) -> Answer:
    if is_off(value) or network(source) == "sd3":
        return needless("not used there for Stable Diffusion 3" if not is_off(value) else "off there too")
    return to("loss.input_perturbation", real(value))


def _timestep(name: str, limit: int) -> Any:
    def convert(value: Any, source: Source) -> Answer:
        if whole(value) == limit:
            return needless("as here")
        if is_flow(source) and network(source) != "sd3":
            return needless(_NOT_OF_FLOWS)
        return to(f"loss.timesteps.{name}", whole(value))

    return convert


LOSS: list[Row] = [
    Row("min_snr_gamma", ("optim.min_snr_gamma",), "not given = null", _gamma, 5, unset=0),
    Row(
        "debiased_estimation_loss",
        ("loss.weighting",),
        "`debiased`, of bases that predict epsilon; timestep 0 weighs 8 % more there",
        _debiased,
        True,
    ),
    Row("loss_type", ("loss.kind",), "l2: mse; huber; l1 and smooth_l1 have no counterpart", loss_kind, "huber"),
    of_huber("huber_schedule", "loss.huber_schedule", text, "exponential"),
    Row(
        "huber_c",
        ("loss.huber_c",),
        "with loss_type huber; x huber_scale in the constant schedule",
        _huber_c,
        0.2,
        beside={"loss_type": "huber"},
    ),
    Row(
        "huber_scale",
        (),
        "in huber_c",
        _huber_scale,
        2.0,
        beside={"loss_type": "huber", "huber_schedule": "exponential"},
    ),
    Row(
        "zero_terminal_snr",
        ("loss.zero_terminal_snr",),
        "with v_parameterization",
        _zero_terminal,
        True,
        beside={"v_parameterization": True},
    ),
    Row("noise_offset", ("loss.noise_offset",), "not of bases of flow matching", _offset, 0.05),
    Row(
        "noise_offset_random_strength",
        ("loss.noise_offset_random",),
        "for each picture; there for each batch",
        _random_offset,
        True,
        beside={"noise_offset": 0.05},
    ),
    Row("ip_noise_gamma", ("loss.input_perturbation",), "not of Stable Diffusion 3", _perturbation, 0.1),
    *without("no counterpart: `loss.input_perturbation` is of one strength", "ip_noise_gamma_random_strength"),
    *unneeded("with noise_offset", "noise_offset_type", example="Original"),
    *without(
        "no counterpart: `loss.noise_offset` is all that is done to noise",
        "adaptive_noise_scale multires_noise_iterations perlin_noise",
        example=6,
    ),
    *unneeded("with multires_noise_iterations", "multires_noise_discount", example=0.3),
    *without("no counterpart: `loss.weighting`", "v_pred_like_loss scale_v_pred_loss_like_noise_pred", example=True),
    Row(
        "min_timestep",
        ("loss.timesteps.min",),
        "of flow matching Stable Diffusion 3 alone",
        _timestep("min", 0),
        100,
    ),
    Row(
        "max_timestep",
        ("loss.timesteps.max",),
        "of flow matching Stable Diffusion 3 alone",
        _timestep("max", 1000),
        500,
    ),
]
