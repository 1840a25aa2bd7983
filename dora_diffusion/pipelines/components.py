"""The models of a pipeline, by what they are: any diffusers pipeline's, a modular one's, one's own, or a bare model.

A pipeline's class says how it draws; layers only ask for its modules. So nothing here looks at the pipeline's class.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from dora_diffusion.families import component_of_model, family_of_pipeline
from dora_diffusion.functional.schedules import TIME_NAMES

COMPONENT = re.compile(
    r"(prior_)?(unet|transformer|prior|controlnet|text_encoder|text_conditioner|connectors)(_\d+|_ref)?"
)
"""What pipelines call the models that adapters change."""


class BareModel:
    """A model by itself, as a pipeline of one component."""

    def __init__(self, model: nn.Module) -> None:
        self.components = {name_of_model(model): model}


def as_pipeline(pipe: Any) -> Any:
    """The pipeline itself; a model becomes one of a single part, unless it is a pipeline's models under their names."""
    if not isinstance(pipe, nn.Module):
        return pipe
    holds_models = any(COMPONENT.fullmatch(name) for name, _ in pipe.named_children())
    is_model = _is_timed(pipe) or component_of_model(_unwrapped(pipe)) is not None
    return pipe if holds_models and not is_model else BareModel(_unwrapped(pipe))


def is_pipeline(thing: Any) -> bool:
    """Whether something holds models as a pipeline does, or is one; a function that gives weights does not."""
    return isinstance(thing, nn.Module) or bool(models_of(thing))


def name_of_pipeline(pipe: Any) -> str:
    """Its family where it has one, else its class."""
    if isinstance(pipe, BareModel):
        return type(next(iter(pipe.components.values()))).__name__
    try:
        return family_of_pipeline(pipe).name
    except ValueError:
        return type(pipe).__name__


def models_of(pipe: Any) -> dict[str, nn.Module]:
    """Every model of a pipeline by its name there, out of the wrappers that torch.compile puts around them."""
    found = ((name, model_of(pipe, name)) for name in _names(pipe))
    return {name: model for name, model in found if model is not None}


def model_of(pipe: Any, component: str) -> nn.Module | None:
    """A pipeline's component, out of the wrapper that torch.compile puts around it; None when it is no model."""
    return _unwrapped(live_model(pipe, component))


def live_model(pipe: Any, component: str) -> Any:
    """A component as it stands there, torch.compile's wrapper and all; None when there is none."""
    if isinstance(found := getattr(pipe, component, None), nn.Module):
        return found
    return _components(pipe).get(component)


def adaptable_models(pipe: Any) -> dict[str, nn.Module]:
    """The models that presets speak of: denoisers first, then text encoders, ControlNets and what prepares texts."""
    models = {name: model for name, model in models_of(pipe).items() if _is_adaptable(name, model)}
    first = [name for name, model in models.items() if is_denoiser(name, model)]
    return {name: models[name] for name in dict.fromkeys((*first, *models))}


def denoisers_of(pipe: Any) -> tuple[str, ...]:
    """The components that predict noise: `unet`, `transformer`, and a second one where there is one."""
    return tuple(name for name, model in models_of(pipe).items() if is_denoiser(name, model))


def timed_of(pipe: Any) -> tuple[str, ...]:
    """The components that are told the time of a step: denoisers, and ControlNets beside them."""
    return tuple(name for name, model in models_of(pipe).items() if _is_timed(model))


def is_denoiser(name: str, model: nn.Module) -> bool:
    """Whether a model predicts noise: it is told the time, and is no ControlNet, which only helps one."""
    helps = name.startswith("controlnet") or type(model).__name__.startswith(("ControlNet", "MultiControlNet"))
    return _is_timed(model) and not helps


def name_of_model(model: nn.Module) -> str:
    """What pipelines call a model of this class."""
    known = component_of_model(model)
    if known is not None:
        return known.name
    kind = type(model).__name__.lower()
    if "controlnet" in kind and not kind.startswith("unet"):
        return "controlnet"
    if "unet" in kind:
        return "unet"
    return "transformer" if _is_timed(model) or not hasattr(model, "get_input_embeddings") else "text_encoder"


def _is_adaptable(name: str, model: nn.Module) -> bool:
    return COMPONENT.fullmatch(name) is not None or component_of_model(model) is not None or _is_timed(model)


def _is_timed(model: nn.Module) -> bool:
    try:
        return any(name in TIME_NAMES for name in inspect.signature(type(model).forward).parameters)
    except (TypeError, ValueError):
        return False


def _unwrapped(model: Any) -> Any:
    model = getattr(model, "_orig_mod", model)
    return model if isinstance(model, nn.Module) else None


def _names(pipe: Any) -> Iterator[str]:
    if isinstance(pipe, nn.Module):
        yield from (name for name, _ in pipe.named_children())
    else:
        yield from _components(pipe)


def _components(pipe: Any) -> Mapping[str, Any]:
    """A pipeline's parts: its own attributes, which are what it draws with, and what else it calls its components."""
    try:
        said = getattr(pipe, "components", None)
    except ValueError:  # diffusers' of a subclass whose __init__ takes other arguments
        said = None
    own = {name: value for name, value in getattr(pipe, "__dict__", {}).items() if not name.startswith("_")}
    return {**(said if isinstance(said, Mapping) else {}), **own}
