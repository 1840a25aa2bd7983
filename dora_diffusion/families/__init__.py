"""The registry of model families. Adding one: a file with a `Family` record, an entry here, a tiny-pipeline test."""

from typing import Any

from torch import nn

from dora_diffusion.families.record import Component, Family
from dora_diffusion.families.stable_diffusion import STABLE_DIFFUSION

__all__ = ["FAMILIES", "Component", "Family", "component_of_model", "family_of_pipeline"]

FAMILIES: tuple[Family, ...] = (STABLE_DIFFUSION,)


def family_of_pipeline(pipe: Any) -> Family:
    """The family of a diffusers pipeline, by its class; a ValueError names what is known."""
    name = type(pipe).__name__
    for family in FAMILIES:
        if name in family.pipeline_classes:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.pipeline_classes)
    raise ValueError(f"{name} belongs to no family known here; expected one of {known}")


def component_of_model(model: nn.Module) -> Component | None:
    """The component a bare model can be, by its class, or None."""
    name = type(model).__name__
    components = (component for family in FAMILIES for component in family.components)
    return next((component for component in components if name in component.model_classes), None)
