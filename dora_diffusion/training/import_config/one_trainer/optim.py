"""Options of how it is trained, and of the noise."""

import math
from typing import Any

from dora_diffusion.training.import_config.counts import samples_of_an_epoch
from dora_diffusion.training.import_config.one_trainer.network import DENOISERS
from dora_diffusion.training.import_config.one_trainer.steps import accumulation, epoch, steps_of_run
from dora_diffusion.training.import_config.optimisers import (
    OPTIONS,
    SAYS,
    SET_BY_IT,
    below,
    name_of,
    optimiser,
    option,
)
from dora_diffusion.training.import_config.records import (
    Answer,
    Row,
    Source,
    copied,
    is_off,
    lost,
    needless,
    to,
    unneeded,
    without,
)
from dora_diffusion.training.import_config.values import (
    number,
    precision,
    real,
    refuse_factor,
    schedule,
    text,
    warmup,
    whole,
)


def _epochs(value: Any, source: Source) -> Answer:
    found = max(1, int(epoch(source) * whole(value)))
    return to(
        "optim.steps",
        found,
        f"{whole(value)} x {samples_of_an_epoch(source)} pictures with repeats / batch / accumulation",
    )


def _warmup(value: Any, source: Source) -> Answer:
    count = number(value)
    steps = steps_of_run(source)
    if 0 < count <= 1:
        return warmup(count, steps, is_share=True)
    found = int(count / accumulation(source))
    if steps is not None and found > steps:
        raise ValueError(f"{found} of {steps} steps: the learning rate would never be reached")
    return warmup(found, steps, is_share=False)


def _lr_scheduler(value: Any, source: Source) -> Answer:
    found = number(source.get("learning_rate_warmup_steps", 200))
    try:
        fits = _warmup(found, source).settings
    except ValueError:
        fits = {}
    return schedule(value, found if fits else 0)


def _learning_rate(value: Any, source: Source) -> Answer:
    own = [source.get(f"{name}.learning_rate") for name in DENOISERS]
    rate = real(next((one for one in own if one is not None), value))
    refuse_factor(source.get("optimizer.optimizer", ""))
    scaler = str(source.get("learning_rate_scaler", "NONE")).upper()
    scales = {
        "BATCH": whole(source.get("batch_size", 1)),
        "GRADIENT_ACCUMULATION": accumulation(source),
        "BOTH": whole(source.get("batch_size", 1)) * accumulation(source),
    }
    factor = math.sqrt(scales.get(scaler, 1))
    return to("optim.learning_rate", rate * factor, f"x {factor:.3g} of learning_rate_scaler" if factor != 1 else "")


def _ema(value: Any, source: Source) -> Answer:
    if is_off(source.get("ema", "OFF")):
        return needless("off there too")
    decay, every = real(source.get("ema_decay", 0.999)), max(1, whole(source.get("ema_update_step_interval", 5)))
    says = "" if every == 1 else f"of one step: there it is taken every {every}"
    return to("optim.ema_decay", decay ** (1 / every) if decay > 0 else decay, says)


def _given(source: Source) -> dict[str, Any]:
    """What is said of the optimiser, as its class names it."""
    given = below(source, "optimizer.")
    name = name_of(given.get("optimizer", "ADAMW"))
    betas = [given.get(f"beta{number}") for number in ((1, 2, 3) if name == "came" else (1, 2))]
    if name != "adafactor" and all(beta is not None for beta in betas):
        given["betas"] = betas
    if name in {"adafactor", "came"} and given.get("eps") is not None and given.get("eps2") is not None:
        given["eps"] = [given["eps"], given["eps2"]]
    elif name in {"adafactor", "came"}:
        given.pop("eps", None)
    return given


def _optimiser(value: Any, source: Source) -> Answer:
    return optimiser(value, _given(source), decays=source.has("optimizer.weight_decay"))


def _option(key: str) -> Any:
    """An argument, by the name of the class's that it is a part of."""

    def convert(value: Any, source: Source) -> Answer:
        given = _given(source)
        name = name_of(given.get("optimizer", "ADAMW"))
        of = {"beta1": "beta1" if name == "adafactor" else "betas", "beta2": "betas", "eps2": "eps"}.get(key, key)
        of = "betas" if key == "beta3" and name == "came" else of
        if value is False and name is not None and of not in OPTIONS[name]:
            return needless("off there too")
        return (
            option(of, given.get("optimizer", "ADAMW"), given) if of in given else lost("it is one of several numbers")
        )

    return convert


def _checkpointing(value: Any, source: Source) -> Answer:
    if isinstance(value, bool):
        return to("optim.gradient_checkpointing", value)
    kind = text(value).upper()
    says = "without offloading: no counterpart yet" if kind == "CPU_OFFLOADED" else ""
    return to("optim.gradient_checkpointing", kind != "OFF", says)


OPTIM: list[Row] = [
    Row(
        "epochs",
        ("optim.steps",),
        "epochs x pictures x repeats / batch / accumulation, when the pictures are here",
        _epochs,
        2,
        beside={"concepts": [{"path": "img"}]},
        unset=100,
    ),
    copied("batch_size", "optim.batch_size", 4, read=whole),
    copied("gradient_accumulation_steps", "optim.gradient_accumulation", 2, read=whole),
    Row(
        "learning_rate",
        ("optim.learning_rate",),
        "or the denoiser's own; times the root that learning_rate_scaler asks for",
        _learning_rate,
        3e-4,
        unset=3e-6,
    ),
    *unneeded("with learning_rate", "learning_rate_scaler", example="BATCH"),
    Row(
        "learning_rate_scheduler",
        ("optim.lr_scheduler",),
        "CONSTANT is `constant_with_warmup` where there is a warm-up; restarts are left out",
        _lr_scheduler,
        "COSINE",
        unset="CONSTANT",
    ),
    Row(
        "learning_rate_warmup_steps",
        ("optim.warmup_steps",),
        "/ gradient_accumulation_steps; up to 1 it is a share of the steps",
        _warmup,
        20,
        beside={"learning_rate_scheduler": "COSINE"},
        unset=200,
    ),
    *without(
        "cosine falls to 0 once",
        "learning_rate_cycles learning_rate_min_factor custom_learning_rate_scheduler scheduler_params",
        off=(1, 1.0),
        example=3,
    ),
    copied("clip_grad_norm", "optim.max_grad_norm", 0.5, read=real),
    Row("optimizer.optimizer", SET_BY_IT, SAYS, _optimiser, "PRODIGY"),
    copied(
        "optimizer.weight_decay",
        "optim.weight_decay",
        0.05,
        read=real,
        says="of the low-rank pair; magnitudes never decay",
    ),
    *(
        Row(
            f"optimizer.{key}",
            ("optim.optimizer_options",),
            "",
            _option(key),
            example,
            beside={"optimizer.optimizer": of, **({"optimizer.beta1": 0.9} if key == "beta2" else {})}
            | ({"optimizer.beta2": 0.99} if key == "beta1" else {})
            | ({"optimizer.eps": 1e-30} if key == "eps2" else {}),
        )
        for key, example, of in (
            ("beta1", 0.9, "ADAMW"),
            ("beta2", 0.99, "ADAMW"),
            ("beta3", 0.98, "PRODIGY"),
            ("eps", 1e-6, "ADAMW"),
            ("eps2", 1e-3, "ADAFACTOR"),
            ("amsgrad", True, "ADAMW"),
            ("min_8bit_size", 4096, "ADAMW_8BIT"),
            ("decouple", True, "PRODIGY"),
            ("use_bias_correction", True, "PRODIGY"),
            ("safeguard_warmup", True, "PRODIGY"),
            ("d0", 1e-5, "PRODIGY"),
            ("d_coef", 2.0, "PRODIGY"),
            ("growth_rate", 1.02, "PRODIGY"),
            ("slice_p", 11, "PRODIGY"),
            ("r", 0.5, "SCHEDULE_FREE_ADAMW"),
            ("weight_lr_power", 1.0, "SCHEDULE_FREE_ADAMW"),
            ("clip_threshold", 1.0, "ADAFACTOR"),
            ("decay_rate", -0.8, "ADAFACTOR"),
            ("scale_parameter", False, "ADAFACTOR"),
        )
    ),
    *unneeded("as the optimiser's library has it", "optimizer.* optimizer_defaults", example=0.9),
    copied("train_dtype", "optim.mixed_precision", "BFLOAT_16", unset="FLOAT_16", read=precision),
    Row("gradient_checkpointing", ("optim.gradient_checkpointing",), "", _checkpointing, "ON"),
    Row("ema", ("optim.ema_decay",), "the root of ema_decay that makes it that of one step", _ema, "CPU"),
    Row("ema_decay", ("optim.ema_decay",), "with ema", _ema, 0.99, beside={"ema": "CPU"}),
    *unneeded("with ema", "ema_update_step_interval non_ema_sampling", example=5),
    *without("no counterpart yet", "compile", example=True),
]
