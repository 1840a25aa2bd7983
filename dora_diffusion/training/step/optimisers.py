"""The optimiser over what is trained, with each part's own rate and decay, and what is done after each of its steps."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from dora_diffusion.functional.weight_norms import factor_to_norm
from dora_diffusion.layers.injection import Injection
from dora_diffusion.layers.targets import by_pattern
from dora_diffusion.training.base.trainable import TrainablePipeline, own_setting
from dora_diffusion.training.config import OptimConfig, WordsConfig
from dora_diffusion.training.known_optimisers import Optimiser
from dora_diffusion.utils.text import shown_value

Groups = list[dict[str, Any]]

_OWN = ("self", "params", "lr", "weight_decay")  # which keys of their own say
_IN_EXTRA = {"bitsandbytes": "quantised"}


def build_optimizer(trainable: TrainablePipeline, optim: OptimConfig, words: WordsConfig) -> Any:
    """The optimiser of `optim.optimizer` over what is trained; one that averages is left ready to train.

    Raises:
        ValueError: its library is missing, an option is not one of its class, or a pattern names no layer.
    """
    optimizer = _made(parameter_groups(trainable, optim, words), optim)
    if optim.kind.averages:
        optimizer.train()
    return optimizer


def check_optimizer(optim: OptimConfig) -> None:
    """Raise what `build_optimizer` would about library and options, before anything is loaded."""
    _made([{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}], optim)


def parameter_groups(trainable: TrainablePipeline, optim: OptimConfig, words: WordsConfig) -> Groups:
    """Each component's A, B and m, by the factor that `optim.lr_pattern` gives its layers; then new words.

    B has LoRA+'s ratio, magnitudes a multiplier and no weight decay.
    """
    groups: Groups = []
    factors = _factors(trainable, optim)
    for name, injection in trainable.injections.items():
        is_text = name != trainable.family.denoiser.name
        own = own_setting(optim.text_encoder_learning_rate if is_text else None, name, optim.rate)
        for factor in dict.fromkeys(factors[name].values()):
            paths = [path for path, found in factors[name].items() if found == factor]
            groups += _groups_of(injection, paths, own * factor, optim)
    if trainable.words is not None:
        until = max(1, round(words.share * optim.steps))
        rate = optim.words_rate
        groups.append({"params": trainable.words.parameters(), "lr": rate, "weight_decay": 0.0, "until": until})
    return groups


def _factors(trainable: TrainablePipeline, optim: OptimConfig) -> dict[str, dict[str, float]]:
    """Component -> layer -> factor of its rate."""
    every = [f"{name}.{path}" for name, injection in trainable.injections.items() for path in injection.matched]
    found = by_pattern("optim.lr_pattern", optim.lr_pattern, every, 1.0)
    return {
        name: {path: found[f"{name}.{path}"] for path in injection.matched}
        for name, injection in trainable.injections.items()
    }


def _groups_of(injection: Injection, paths: list[str], rate: float, optim: OptimConfig) -> Groups:
    """Some layers of a component."""
    named = injection.named_parameters()
    decay, kinds = optim.decay, ("down", "up", "magnitude")
    downs, ups, magnitudes = (
        [named[f"{path}.{kind}"] for path in paths if f"{path}.{kind}" in named] for kind in kinds
    )
    trained = [magnitude for magnitude in magnitudes if magnitude.requires_grad]
    groups: Groups = [
        {"params": downs, "lr": rate, "weight_decay": decay},
        {"params": ups, "lr": rate * optim.loraplus_lr_ratio, "weight_decay": decay},
    ]
    if trained:
        groups.append({"params": trained, "lr": rate * optim.magnitude_lr_multiplier, "weight_decay": 0.0})
    return groups


def _made(groups: Groups, optim: OptimConfig) -> Any:
    kind, options = optim.kind, optim.options
    made = _class_of(kind)
    _check_options(kind, made, optim.optimizer_options)
    try:
        return made(groups, lr=optim.rate, **options)
    except (ValueError, TypeError, AssertionError) as error:
        said = " ".join(str(error).split()) or "it takes other values"
        raise ValueError(f"optim.optimizer_options: {made.__name__} refuses {options}: {said}") from None


def _class_of(kind: Optimiser) -> Any:
    try:
        module = importlib.import_module(kind.module)
    except ImportError as error:
        extra = _IN_EXTRA.get(kind.package, "optimisers")
        raise ValueError(
            f"optim.optimizer: {kind.name!r} needs the package {kind.package} ({error}); pip install {kind.package}, "
            f"or pip install 'dora-diffusion[{extra}]'"
        ) from None
    return getattr(module, kind.class_name)


def _check_options(kind: Optimiser, made: Any, given: Mapping[str, Any]) -> None:
    """A ValueError for an option that is no argument of the class, that another key says, or of another kind."""
    known = {
        name: one.default
        for name, one in inspect.signature(made.__init__).parameters.items()
        if name not in (*_OWN, *kind.fixed)
    }
    for name, value in given.items():
        key = f"optim.optimizer_options.{name}"
        if name not in known:
            raise ValueError(
                f"{key}: no option of {kind.name} ({made.__name__}) that can be set; expected {', '.join(known)}"
            )
        if not _is_alike(value, known[name]):
            raise ValueError(
                f"{key}: got {shown_value(value)}, expected the kind of its default, {shown_value(known[name])}"
            )


def _is_alike(value: Any, default: Any) -> bool:
    """Whether a value is of a default's kind; null stands for a number, true or false as well."""
    if isinstance(default, (tuple, list)):
        return isinstance(value, list) and len(value) == len(default)
    if isinstance(default, bool):
        return isinstance(value, bool)
    if default is None:
        return not isinstance(value, list)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def limit_weight_norms(optimizer: Optimizer, trainable: TrainablePipeline, limit: float | None) -> None:
    """From now on let every step of the optimiser end with each layer's update cut to a Frobenius norm.

    A and B share the factor evenly, as kohya's `scale_weight_norms` has it; magnitudes and new words stay.
    """
    if limit is None:
        return
    pairs = [
        (named[f"{path}.down"], named[f"{path}.up"], injection.scale(path))
        for injection in trainable.injections.values()
        for named in (injection.named_parameters(),)
        for path in injection.matched
    ]

    @torch.no_grad()
    def cut(*_: Any) -> None:
        for down, up, scale in pairs:
            factor = factor_to_norm(down, up, scale, limit)
            down.mul_(factor)
            up.mul_(factor)

    optimizer.register_step_post_hook(cut)
