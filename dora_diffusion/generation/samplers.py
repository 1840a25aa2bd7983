"""Samplers by name: how each is made from a pipeline's own scheduler, and which suit its kind of prediction.

A scheduler holds the state of a run, so every run gets one of its own, made from the config of the pipeline's.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from types import MethodType
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
        return _exact(type(scheduler).from_config(scheduler.config))
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
    return _exact(wanted(**{**config, **recipe.changes}))


def check_steps(scheduler: Any, name: str, steps: int) -> None:
    """Refuse more steps than a scheduler has timesteps for.

    Args:
        scheduler: made by the sampler `name`.
        name: of `SAMPLERS`.
        steps: of a whole run.

    Raises:
        ValueError: one line that says how many there may be.
    """
    most = _most_steps(scheduler.config)
    if steps > most:
        kind = type(scheduler).__name__
        raise ValueError(
            f"steps must lie in 1..{most} with sampler {name!r} ({kind}) of this model, got {steps}; lower them, or "
            "take another sampler"
        )


def _most_steps(config: Mapping[str, Any]) -> int:
    distilled, trained = config.get("original_inference_steps"), int(config.get("num_train_timesteps", 1000))
    if distilled is not None:  # LCM and its kin walk over the timesteps that they were distilled at
        return int(distilled)
    # "leading" and "linspace" need one timestep more than they have steps, and "leading" moves them all by the offset
    spare = {"leading": 1 + int(config.get("steps_offset", 0)), "linspace": 1}
    return trained - spare.get(config.get("timestep_spacing", ""), 0)


def _exact(scheduler: Any) -> Any:
    """The scheduler, so that a run has the steps that were asked for, and begins at the first of them."""
    kind = type(scheduler)
    if hasattr(kind, "index_for_timestep"):
        scheduler.index_for_timestep = MethodType(_index_for_timestep, scheduler)
    if scheduler.config.get("timestep_spacing") == "trailing":
        scheduler.set_timesteps = MethodType(_without_negative(kind.set_timesteps), scheduler)
    return scheduler


def _index_for_timestep(scheduler: Any, timestep: Any, schedule_timesteps: Any = None) -> int:
    """Where a timestep is; the first of all is at 0 even where several are equal.

    Karras' steps are closest where noise is most, and some schedulers round their timesteps: 999, 999, 998 ... Asked
    where 999 is, diffusers' answer is the second, for the sake of runs that start midway; a run so lost its first step
    and, at the end, asked for one that there is not. Runs that start midway name their place (`set_begin_index`).
    """
    timesteps = scheduler.timesteps if schedule_timesteps is None else schedule_timesteps
    if timestep == timesteps[0]:
        return 0
    return int(type(scheduler).index_for_timestep(scheduler, timestep, schedule_timesteps))


def _without_negative(set_timesteps: Callable[..., None]) -> Callable[..., None]:
    """A class's `set_timesteps` without a last timestep of -1.

    "trailing" counts 1000, 1000 - 1000 / 61 ... down in floating point, and at 61 steps (103, 121 ...) arrives just
    above 0 once too often.
    """

    @wraps(set_timesteps)
    def mended(scheduler: Any, *arguments: Any, **keywords: Any) -> None:
        set_timesteps(scheduler, *arguments, **keywords)
        more = int((scheduler.timesteps < 0).sum())  # two, where the model is called twice a step
        if more == 0:
            return
        if scheduler.num_inference_steps == len(scheduler.timesteps):
            scheduler.num_inference_steps -= more
        scheduler.timesteps = scheduler.timesteps[:-more]
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is not None:
            import torch

            scheduler.sigmas = torch.cat([sigmas[: -1 - more], sigmas[-1:]])

    return mended


def _recipe(scheduler: Any, sampler: Sampler) -> Recipe | None:
    return sampler.flow if _is_flow(scheduler) else sampler.diffusion


def _is_flow(scheduler: Any) -> bool:
    is_match = type(scheduler).__name__.startswith("FlowMatch")
    return is_match or scheduler.config.get("prediction_type") == "flow_prediction"


def _both_shifts(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with the shift towards noise under both names that diffusers has for it."""
    shift = config.get("shift", config.get("flow_shift"))
    return config if shift is None else {**config, "shift": shift, "flow_shift": shift}
