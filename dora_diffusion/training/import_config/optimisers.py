"""Optimisers of other trainers as ours, with their options."""

import re
from collections.abc import Mapping
from typing import Any

from dora_diffusion.training.import_config.records import Answer, Source, lost, needless, several, to
from dora_diffusion.training.import_config.values import flag, is_free_of_rates, number, real, text
from dora_diffusion.utils.text import shown_value

SAYS = "AdamW, AdamW8bit, Prodigy, AdamWScheduleFree, Adafactor, Lion, CAME; others have no counterpart"
SET_BY_IT = ("optim.optimizer", "optim.optimizer_options", "optim.weight_decay")
"""What an optimiser's row may set."""
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "adamw": ("betas", "eps", "amsgrad"),
    "adamw8bit": ("betas", "eps", "min_8bit_size"),
    "prodigy": (
        *("betas", "beta3", "eps", "decouple", "use_bias_correction", "safeguard_warmup", "d0", "d_coef"),
        *("growth_rate", "slice_p"),
    ),
    "schedulefree": ("betas", "eps", "r", "weight_lr_power"),
    "adafactor": ("eps", "clip_threshold", "decay_rate", "beta1", "scale_parameter"),
    "lion": ("betas",),
    "came": ("betas", "eps", "clip_threshold"),
}
"""Our optimiser -> arguments of its class that have a counterpart, as the class names them."""

_NAMES = {
    r"adamw?|(paged)?adamw|(paged)?adamw32bit": "adamw",
    r"(paged)?adamw?8(bit)?": "adamw8bit",
    r"prodigy|prodigy8bit": "prodigy",
    r"adamwschedulefree|schedulefreeadamw": "schedulefree",
    "adafactor": "adafactor",
    r"lion|(paged)?lion8bit": "lion",
    "came|came8bit": "came",
}
# What the libraries themselves do, where we do something else without a word.
_UNSAID: Mapping[str, Mapping[str, Any]] = {"prodigy": {"use_bias_correction": False, "safeguard_warmup": False}}
_WITHOUT_DECAY = ("prodigy", "lion", "came")
_LISTS = {"betas": None, "eps": ("adafactor", "came")}
_SWITCHES = ("amsgrad", "decouple", "use_bias_correction", "safeguard_warmup", "scale_parameter")


def name_of(value: Any) -> str | None:
    """`prodigyopt.Prodigy`, `SCHEDULE_FREE_ADAMW` ... -> the name here; None where there is none."""
    plain = re.sub(r"[-_]", "", str(value).rpartition(".")[2]).lower()
    return next((name for pattern, name in _NAMES.items() if re.fullmatch(pattern, plain)), None)


def optimiser(value: Any, given: Mapping[str, Any], *, decays: bool) -> Answer:
    """What becomes of an optimiser's name.

    Args:
        value: the name.
        given: the arguments of its class that the file says.
        decays: whether the file says a weight decay.
    """
    name = name_of(text(value))
    if name is None:
        says = "its learning rate is a factor" if is_free_of_rates(value) else "look at the learning rate"
        return lost(f"no counterpart: AdamW is taken; {says}")
    settings: dict[str, Any] = {} if name == "adamw" else {"optim.optimizer": name}
    if options := options_of(name, given):
        settings["optim.optimizer_options"] = options
    if name in _WITHOUT_DECAY and not decays:
        settings["optim.weight_decay"] = 0.0
    wide = name not in ("adamw", "adamw8bit") and "8bit" in str(value).lower().replace("_", "")
    return several(settings, "with a state of 32 bits" if wide else "") if settings else needless("AdamW, as here")


def options_of(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an optimiser of ours, of arguments under their class's names."""
    said = {key: _read(name, key, value) for key, value in given.items() if key in OPTIONS[name] and value is not None}
    return {**_UNSAID.get(name, {}), **said}


def _read(name: str, key: str, value: Any) -> Any:
    """An argument's value, also as text: `0.9,0.99`, `(1e-30, 1e-3)`, `True`."""
    if key in _SWITCHES:
        return flag(value)
    if key in _LISTS and name in (_LISTS[key] or (name,)):
        items = re.split(r"[,\s]+", value.strip("()[] ")) if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not items:
            raise ValueError(f"got {shown_value(value)}, expected several numbers")
        return [real(item) for item in items]
    return number(value)


def option(key: str, kind: Any, given: Mapping[str, Any]) -> Answer:
    """What becomes of one argument: all of them together are one setting.

    Args:
        key: the argument, as its class names it.
        kind: the optimiser's name in the file.
        given: all arguments that the file says.
    """
    name = name_of(kind)
    if name is None or key not in OPTIONS[name]:
        return lost(f"no option of {name or 'the optimiser'} here")
    return to("optim.optimizer_options", options_of(name, given))


def below(source: Source, prefix: str) -> dict[str, Any]:
    """What is said under `prefix`, without it."""
    entries = [entry for entry in source.entries if entry.name.startswith(prefix) and not entry.is_empty]
    return {entry.name.removeprefix(prefix): entry.value for entry in entries}
