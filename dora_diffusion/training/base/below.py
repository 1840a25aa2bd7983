"""Adapters below what is trained (`base.adapters`): folded into the base, which is then the one that is trained on.

W' = W + sum_i strength_i (W'_i - W), in fp32 and rounded once to the base's dtype. Everything that a run does with its
base, class pictures and previews too, is done with W'.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dora_diffusion.adapters.files import AdapterReader
from dora_diffusion.adapters.matching import Fitted, kind_in_words
from dora_diffusion.families import family_of_pipeline
from dora_diffusion.functional.dora import GainForm, apply_gain_form, gain_form, scale_gain_form, sum_gain_forms
from dora_diffusion.layers.base_layers import dense_weight, stored_as
from dora_diffusion.layers.fuse import check_fusable
from dora_diffusion.pipelines.base_weights import weights_of
from dora_diffusion.pipelines.modules import PipelineModules
from dora_diffusion.training.base.start import outline_of


@dataclass(frozen=True)
class Below:
    """An adapter that is part of the base.

    Attributes:
        name: of its file.
        strength: at which it is.
        sha256: of its file.
        kind: "DoRA", "LoRA" ...
        layers: how many it changes.
    """

    name: str
    strength: float
    sha256: str
    kind: str
    layers: int

    def line(self) -> str:
        """What it is, on one line."""
        return f"{self.name} at {self.strength:g}: {self.kind}, {self.layers} layers"


@torch.no_grad()
def lay_below(pipe: Any, adapters: Mapping[Path, float]) -> tuple[Below, ...]:
    """Fold adapters into a base's weights, for as long as it is in memory: file -> strength.

    Raises:
        ValueError: one line: a file cannot be read, is of another base, or the base's weights are quantised; nothing
            has changed then.
    """
    modules, laid = PipelineModules(pipe), []
    reader = AdapterReader(pipe, modules, weights_of(pipe))
    fitted: list[tuple[float, Fitted]] = []
    for file, strength in adapters.items():
        try:
            adapter, fit, sha256 = reader.read(file, file.name, strict=True)
            for path in fit.modules:
                check_fusable(path, modules.layer(path)[1])
        except ValueError as error:
            raise ValueError(f"base.adapters: {error}") from None
        fitted.append((strength, fit))
        laid.append(Below(file.name, strength, sha256 or "", kind_in_words(adapter), len(fit.modules)))
    _fold(modules, fitted)
    return tuple(laid)


def plan_below(pipe: Any, adapters: Mapping[Path, float]) -> tuple[Below, ...]:
    """What `lay_below` will do, from headers alone, with a base that may have no weights; errors likewise."""
    modules, laid = PipelineModules(pipe), []
    for file, strength in adapters.items():
        try:
            adapter = outline_of(file, family_of_pipeline(pipe).name)
            for path in adapter.modules:
                modules.layer(path)
        except ValueError as error:
            raise ValueError(f"base.adapters: {error}") from None
        laid.append(Below(file.name, strength, "", kind_in_words(adapter), len(adapter.modules)))
    return tuple(laid)


def _fold(modules: PipelineModules, fitted: Sequence[tuple[float, Fitted]]) -> None:
    for path in dict.fromkeys(path for _, fit in fitted for path in fit.modules):
        base = modules.layer(path)[1]
        weight = dense_weight(base)
        forms: list[GainForm] = []
        for strength, fit in fitted:
            if (module := fit.modules.get(path)) is not None:
                down = module.down.reshape(-1, *weight.shape[1:])
                form = gain_form(weight, down, module.up, module.scale, module.magnitude, axis=module.axis)
                forms.append(scale_gain_form(form, strength))
        base.weight.data = stored_as(base, apply_gain_form(weight, sum_gain_forms(forms)))
    for strength, fit in fitted:
        for path, vector in fit.vectors.items():
            _, owner, name = modules.parameter(path)
            parameter = getattr(owner, name)
            parameter.data = (parameter.data.float() + strength * vector).to(parameter.dtype)
