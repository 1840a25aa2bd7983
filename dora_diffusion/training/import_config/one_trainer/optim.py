"""Options of how it is trained, and of the noise."""

import math
from typing import Any

from dora_diffusion.training.import_config.counts import samples_of_an_epoch
from dora_diffusion.training.import_config.one_trainer.network import DENOISERS
from dora_diffusion.training.import_config.one_trainer.steps import accumulation, epoch, steps_of_run
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
    is_free_of_rates,
    kind_of_optimiser,
    number,
    precision,
    real,
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
    kind = source.get("optimizer.optimizer", "")
    if is_free_of_rates(kind):
        raise ValueError(f"with {kind} it is a factor and no rate, which AdamW could not be given")
    scaler = str(source.get("learning_rate_scaler", "NONE")).upper()
    scales = {
        "BATCH": whole(source.get("batch_size", 1)),
        "GRADIENT_ACCUMULATION": accumulation(source),
        "BOTH": whole(source.get("batch_size", 1)) * accumulation(source),
    }
    factor = math.sqrt(scales.get(scaler, 1))
    return to("optim.learning_rate", rate * factor, f"x {factor:.3g} of learning_rate_scaler" if factor != 1 else "")


def _ema(value: Any, source: Source) -> Answer:
    return needless("off there too") if is_off(value) else lost("no counterpart yet: EMA")


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
    Row(
        "optimizer.optimizer",
        (),
        "AdamW, also for its 8-bit kinds; others have no counterpart yet",
        kind_of_optimiser,
        "PRODIGY",
    ),
    copied(
        "optimizer.weight_decay",
        "optim.weight_decay",
        0.05,
        read=real,
        says="of the low-rank pair; magnitudes never decay",
    ),
    *unneeded("AdamW as torch has it", "optimizer.* optimizer_defaults", example=0.9),
    copied("train_dtype", "optim.mixed_precision", "BFLOAT_16", unset="FLOAT_16", read=precision),
    Row("gradient_checkpointing", ("optim.gradient_checkpointing",), "", _checkpointing, "ON"),
    Row("ema", (), "no counterpart yet", _ema, "CPU"),
    *unneeded("with ema", "ema_decay ema_update_step_interval non_ema_sampling", example=0.999),
    *without("no counterpart yet", "compile", example=True),
]
