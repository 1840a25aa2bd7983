"""Options of the loss, the noise and the timesteps."""

from typing import Any

from dora_diffusion.training.import_config.records import (
    Answer,
    Row,
    Source,
    is_off,
    lost,
    needless,
    several,
    to,
    without,
)
from dora_diffusion.training.import_config.values import flag, real, text, whole

_BALANCED = "balanced"


def _gamma(value: Any, source: Source) -> Answer:
    return to("optim.min_snr_gamma", None if is_off(value) else real(value))


def _is_flow(source: Source) -> bool:
    return "flow" in str(source.get("train.noise_scheduler", "ddpm")).lower()


def _type(source: Source) -> str:
    is_linear = flag(source.get("train.linear_timesteps", False))
    return "linear" if is_linear else str(source.get("train.timestep_type", "sigmoid")).lower()


def _balance(source: Source) -> str:
    return str(source.get("train.content_or_style", _BALANCED)).lower()


def _with_density(density: str, settings: dict[str, Any], source: Source, says: str = "") -> Answer:
    """Settings, and the density unless content_or_style says it."""
    chosen = {} if _balance(source) != _BALANCED and density == "uniform" else {"loss.timesteps.density": density}
    return several({**chosen, **settings}, says)


def _timestep_type(value: Any, source: Source) -> Answer:
    if not _is_flow(source):
        return needless("of flow matching alone")
    if flag(source.get("train.linear_timesteps", False)):
        return needless("linear_timesteps decides")
    kind = text(value).lower()
    if kind == "sigmoid":
        return _with_density("logit_normal", {"flow.shift": 1.0}, source)
    if kind in {"linear", "weighted"}:
        return _with_density(
            "uniform", {"flow.shift": 1.0}, source, "without its weights" if kind == "weighted" else ""
        )
    if kind in {"shift", "flux_shift", "lumina2_shift"}:
        return _with_density("uniform", {}, source, "with the shift that the base draws with")
    raise ValueError(f"got {kind}, expected sigmoid, linear or shift")


def _linear(value: Any, source: Source) -> Answer:
    if not flag(value):
        return needless("off there too")
    return _with_density("uniform", {"flow.shift": 1.0}, source, "without its weights")


def _content_or_style(value: Any, source: Source) -> Answer:
    """A cube of what is uniform, from the noisy end or the other: beta densities."""
    kind = text(value).lower()
    if kind == _BALANCED:
        return needless("as here")
    if kind not in {"content", "style"}:
        raise ValueError(f"got {kind}, expected balanced, content or style")
    if _is_flow(source) and _type(source) == "sigmoid":
        return lost("with timestep_type sigmoid there is no such density here: `loss.timesteps.bias` leans")
    third = {"loss.timesteps.alpha": 1 / 3} if kind == "style" else {"loss.timesteps.beta": 1 / 3}
    return several({"loss.timesteps.density": "beta", **third})


def _bound(ours: str, none: tuple[int, ...]) -> Any:
    """They count from the noisiest of 1000."""

    def convert(value: Any, source: Source) -> Answer:
        if whole(value) in none:
            return needless("as here")
        if _is_flow(source) and _type(source) != "linear":
            return lost("a part of a table there that is not even; `loss.timesteps` squeezes a density")
        return to(ours, 1000 - whole(value))

    return convert


def _offset(value: Any, source: Source) -> Answer:
    return needless("off there too") if is_off(value) else to("loss.noise_offset", abs(real(value)))


def _shift(value: Any, source: Source) -> Answer:
    if is_off(value):
        return needless("off there too")
    if not is_off(source.get("train.noise_offset", 0)):
        return lost("beside noise_offset, which is the same")
    return to("loss.noise_offset", real(value))


def _loss_type(value: Any, source: Source) -> Answer:
    kind = text(value).lower()
    if kind == "mse":
        return to("loss.kind", "mse")
    if kind != "pseudo_huber":
        raise ValueError(f"got {kind}, expected mse or pseudo_huber")
    huber = {"loss.kind": "huber", "loss.huber_c": 0.01, "loss.huber_schedule": "constant"}
    return several(huber, "theirs is 50 times as long: look at max_grad_norm")


NOISE: list[Row] = [
    Row("train.min_snr_gamma", ("optim.min_snr_gamma",), "not given = null", _gamma, 5.0, unset=0),
    *without("set `optim.min_snr_gamma`", "train.snr_gamma train.learnable_snr_gos", example=5.0),
    Row(
        "train.timestep_type",
        ("loss.timesteps.density", "flow.shift"),
        "sigmoid: logit_normal, shift 1; linear: uniform, shift 1; shift: uniform, the base's own",
        _timestep_type,
        "sigmoid",
        beside={"train.noise_scheduler": "flowmatch"},
        unset="sigmoid",
    ),
    Row(
        "train.linear_timesteps",
        ("loss.timesteps.density", "flow.shift"),
        "uniform, shift 1, without its weights",
        _linear,
        True,
    ),
    *without("set `loss.timesteps.density: uniform`", "train.linear_timesteps2", example=True),
    Row(
        "train.content_or_style",
        ("loss.timesteps.density", "loss.timesteps.alpha", "loss.timesteps.beta"),
        "content: beta, with beta 1/3; style: with alpha 1/3; not with timestep_type sigmoid",
        _content_or_style,
        "style",
    ),
    *without("one density for all: `loss.timesteps`", "train.content_or_style_reg", off=(_BALANCED,), example="style"),
    Row(
        "train.min_denoising_steps",
        ("loss.timesteps.max",),
        "1000 less it; of flow matching with linear timesteps alone",
        _bound("loss.timesteps.max", (0,)),
        100,
    ),
    Row(
        "train.max_denoising_steps",
        ("loss.timesteps.min",),
        "1000 less it; of flow matching with linear timesteps alone",
        _bound("loss.timesteps.min", (999, 1000)),
        500,
    ),
    Row("train.noise_offset", ("loss.noise_offset",), "", _offset, 0.05),
    Row("train.random_noise_shift", ("loss.noise_offset",), "the same formula", _shift, 0.05),
    *without(
        "no counterpart: `loss.noise_offset` and `loss.input_perturbation` are all that is done to noise",
        (
            "train.random_noise_multiplier train.force_consistent_noise train.blended_blur_noise "
            "train.dynamic_noise_offset"
        ),
        example=0.05,
    ),
    Row(
        "train.loss_type",
        ("loss.kind", "loss.huber_c", "loss.huber_schedule"),
        "pseudo_huber: huber_c 0.01, constant, where it is 50 times as long; others have no counterpart",
        _loss_type,
        "pseudo_huber",
    ),
    *without(
        "no counterpart: the target is what the base predicts",
        "train.loss_target",
        off=("noise",),
        example="source",
    ),
]
