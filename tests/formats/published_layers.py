"""The layers of the published models, with their real sizes, and adapters on them whose numbers take no room."""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn

from benchmarks.full_size.models import pipeline_of
from benchmarks.full_size.published import PUBLISHED
from dora_diffusion.families import family_of_pipeline
from dora_diffusion.state import ModuleState

MODELS = {model.name: model for model in PUBLISHED}
Shapes = Mapping[str, tuple[int, ...]]


@cache
def layers_of(name: str) -> tuple[str, dict[str, tuple[int, ...]]]:
    """A published model's family, and its layers with the shapes of their weights."""
    pipe = pipeline_of(MODELS[name])
    family = family_of_pipeline(pipe)
    shapes = {}
    for part in family.components:
        for path, layer in getattr(pipe, part.name).named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                shapes[f"{part.name}.{path.removeprefix('text_model.')}"] = tuple(layer.weight.shape)
    return family.name, shapes


def blank(*shape: int) -> Tensor:
    """Numbers that take no room."""
    return torch.zeros(()).expand(shape)


def pair(shape: tuple[int, ...], *, is_dora: bool = False) -> ModuleState:
    """Of rank 1, on a weight of this shape."""
    out, *rest = shape
    magnitude = blank(out) if is_dora else None
    return ModuleState(blank(1, *rest), blank(out, 1, *[1] * (len(rest) - 1)), 1.0, magnitude)
