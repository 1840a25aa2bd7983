"""Bases that were distilled to draw in few steps, and what to train instead.

Training at the usual loss undoes the distillation: pictures of few steps turn soft. What tells such a base is what its
own configs say, where they say it, else its name. A new one is a record below.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Facts = Mapping[str, object]
"""`component.key` of a config -> its value; `pipeline.key` is of the pipeline itself, `scheduler.class` its class."""


@dataclass(frozen=True)
class Distilled:
    """One kind of distilled base.

    Attributes:
        name: what it is called.
        instead: what to train on.
        evidence: why these facts tell it.
        facts: all of them hold; empty where configs do not tell it.
        called: expression that is found in its name, in lower case; empty where facts alone tell it.
        architecture: its own in Stability's ModelSpec, without `/lora`; empty = that of its family.
    """

    name: str
    instead: str
    evidence: str
    facts: Facts = field(default_factory=dict)
    called: str = ""
    architecture: str = ""


_END = r"(?![a-z])"

DISTILLED = (
    Distilled(
        name="FLUX.1-schnell",
        instead="train on FLUX.1-dev, or lay a training adapter for schnell below",
        evidence="its transformer takes no guidance (dev's does) and its scheduler shifts by 1, whatever the size",
        facts={
            "transformer.class": "FluxTransformer2DModel",
            "transformer.guidance_embeds": False,
            "scheduler.use_dynamic_shifting": False,
            "scheduler.shift": 1.0,
        },
        called="flux.*schnell",
        architecture="flux-1-schnell",
    ),
    Distilled(
        name="FLUX.2 klein",
        instead="train on the klein base model of the same size",
        evidence="the pipeline's own config says is_distilled (diffusers' Flux2KleinPipeline)",
        facts={"pipeline.is_distilled": True},
    ),
    Distilled(
        name="a latent consistency model",
        instead="train on the model that it was distilled from",
        evidence="its UNet is told the guidance through time_cond_proj_dim, which only consistency models have",
        facts={"unet.time_cond_proj_dim": int},
        called=rf"(?<![a-z])lcm{_END}|latent-consistency",
    ),
    Distilled(
        name="a latent consistency model",
        instead="train on the model that it was distilled from",
        evidence="its scheduler is LCMScheduler",
        facts={"scheduler.class": "LCMScheduler"},
    ),
    Distilled(
        name="SDXL-turbo",
        instead="train on SDXL base",
        evidence="SDXL's UNet under an ancestral Euler scheduler that spaces timesteps from their end",
        facts={
            "unet.class": "UNet2DConditionModel",
            "unet.addition_embed_type": "text_time",
            "scheduler.class": "EulerAncestralDiscreteScheduler",
            "scheduler.timestep_spacing": "trailing",
        },
        called=r"sdxl[-_. ]?turbo",
    ),
    Distilled(
        name="Z-Image-Turbo",
        instead="train on Z-Image, or lay a training adapter for the turbo model below",
        evidence="by its name: its configs are those of the whole model",
        called=r"z[-_]?image[-_. ]?turbo",
    ),
    Distilled(
        name="a distilled model",
        instead="train on the undistilled model of the same family, or lay a de-distillation adapter below",
        evidence="by its name: such models keep the configs of what they were distilled from",
        called=rf"(?<![a-z])(schnell|turbo|lightning|hyper|hyper-?sd(xl)?|dmd2?|tcd|distilled){_END}",
    ),
)


def distilled_kind(pipe: Any, model: str) -> Distilled | None:
    """The kind of distilled base that a pipeline is: by its facts first, then by the name it was loaded by."""
    by_facts = (kind for kind in DISTILLED if kind.facts and all(_holds(pipe, *fact) for fact in kind.facts.items()))
    name = model.rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower()
    by_name = (kind for kind in DISTILLED if kind.called and re.search(kind.called, name))
    return next(by_facts, None) or next(by_name, None)


def _holds(pipe: Any, key: str, expected: object) -> bool:
    component, _, name = key.partition(".")
    part = pipe if component == "pipeline" else getattr(pipe, component, None)
    if part is None:
        return False
    found = type(part).__name__ if name == "class" else getattr(part, "config", {}).get(name)
    return isinstance(found, expected) if isinstance(expected, type) else found == expected
