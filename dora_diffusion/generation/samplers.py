"""Samplers by name: how each is made from a pipeline's own scheduler, and which suit its kind of prediction.

A scheduler holds the state of a run, so every run gets one of its own, made from the config of the pipeline's.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

DEFAULT = "default"


@dataclass(frozen=True)
class Recipe:
    """A scheduler of diffusers: its class, and what is changed in the config it is made from."""

    scheduler: str
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampler:
    """A way to walk from noise to a picture.

    Attributes:
        title: what A1111 and its kin call it.
        diffusion: for models that predict epsilon, v or the clean picture; None where there is none.
        flow: for models that predict a flow's velocity; None where there is none.
    """

    title: str
    diffusion: Recipe | None = None
    flow: Recipe | None = None


_KARRAS = {"use_karras_sigmas": True}
_SDE = {"algorithm_type": "sde-dpmsolver++"}

SAMPLERS: Mapping[str, Sampler] = {
    DEFAULT: Sampler("model default"),
    "euler": Sampler("Euler", Recipe("EulerDiscreteScheduler"), Recipe("FlowMatchEulerDiscreteScheduler")),
    # no stochastic flow: diffusers' takes its noise from the global state, so a seed would not draw the same twice
    "euler a": Sampler("Euler a", Recipe("EulerAncestralDiscreteScheduler")),
    "euler karras": Sampler(
        "Euler Karras",
        Recipe("EulerDiscreteScheduler", _KARRAS),
        Recipe("FlowMatchEulerDiscreteScheduler", _KARRAS),
    ),
    "heun": Sampler("Heun", Recipe("HeunDiscreteScheduler")),
    "ddim": Sampler("DDIM", Recipe("DDIMScheduler")),
    "ddpm": Sampler("DDPM", Recipe("DDPMScheduler")),
    "pndm": Sampler("PLMS", Recipe("PNDMScheduler", {"skip_prk_steps": True})),
    "dpm++ 2m": Sampler("DPM++ 2M", Recipe("DPMSolverMultistepScheduler")),
    "dpm++ 2m karras": Sampler("DPM++ 2M Karras", Recipe("DPMSolverMultistepScheduler", _KARRAS)),
    "dpm++ 2m sde": Sampler("DPM++ 2M SDE", Recipe("DPMSolverMultistepScheduler", _SDE)),
    "dpm++ 2m sde karras": Sampler("DPM++ 2M SDE Karras", Recipe("DPMSolverMultistepScheduler", {**_SDE, **_KARRAS})),
    "unipc": Sampler("UniPC", Recipe("UniPCMultistepScheduler")),
    "lcm": Sampler("LCM", Recipe("LCMScheduler")),
}


def sampler_names(pipe: Any) -> tuple[str, ...]:
    """The samplers that suit a pipeline's kind of prediction, "default" first."""
    return tuple(name for name, sampler in SAMPLERS.items() if name == DEFAULT or _recipe(pipe.scheduler, sampler))


def sampler_of_title(title: str) -> str | None:
    """The name of the sampler that A1111 calls so, whatever the case; None when it is none of ours."""
    titles = {sampler.title.lower(): name for name, sampler in SAMPLERS.items()}
    return titles.get(title.strip().lower())


@contextmanager
def sampling(pipe: Any, name: str) -> Iterator[Any]:
    """Give the pipeline a new scheduler for a run, and its own back after, whatever happens.

    Args:
        pipe: a diffusers pipeline.
        name: of `SAMPLERS`.

    Raises:
        ValueError: an unknown name, or one that does not suit what the model predicts.
    """
    own = pipe.scheduler
    pipe.scheduler = made_from(own, name)
    try:
        yield pipe.scheduler
    finally:
        pipe.scheduler = own


def made_from(scheduler: Any, name: str) -> Any:
    """A new scheduler with the config of the given one; ValueErrors as `sampling`."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is unknown: expected one of {', '.join(SAMPLERS)}")
    if name == DEFAULT:
        return type(scheduler).from_config(scheduler.config)
    recipe = _recipe(scheduler, SAMPLERS[name])
    if recipe is None:
        suited = [name for name, sampler in SAMPLERS.items() if name == DEFAULT or _recipe(scheduler, sampler)]
        raise ValueError(
            f"sampler {name!r} does not suit a model that predicts {'a flow' if _is_flow(scheduler) else 'noise'}: "
            f"expected one of {', '.join(suited)}"
        )
    import diffusers

    wanted = getattr(diffusers, recipe.scheduler)
    known = inspect.signature(wanted.__init__).parameters
    # of the config only what the new scheduler knows: the rest is another's and would be reported as a mistake
    config = {key: value for key, value in _both_shifts(scheduler.config).items() if key in known}
    return wanted(**{**config, **recipe.changes})


def _recipe(scheduler: Any, sampler: Sampler) -> Recipe | None:
    return sampler.flow if _is_flow(scheduler) else sampler.diffusion


def _is_flow(scheduler: Any) -> bool:
    is_match = type(scheduler).__name__.startswith("FlowMatch")
    return is_match or scheduler.config.get("prediction_type") == "flow_prediction"


def _both_shifts(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with the shift towards noise under both names that diffusers has for it."""
    shift = config.get("shift", config.get("flow_shift"))
    return config if shift is None else {**config, "shift": shift, "flow_shift": shift}
