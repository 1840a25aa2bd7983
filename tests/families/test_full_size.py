"""The published models at their real size, on the meta device: found, matched whole, and a step runs on shapes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from inspect import signature
from typing import Any

import diffusers
import pytest

from benchmarks.full_size.models import adapter_numbers, config_of, estimate, pipeline_of
from benchmarks.full_size.published import PUBLISHED, Part, Published
from dora_diffusion.families import FAMILIES, component_of_model, coverage, family_of_pipeline
from dora_diffusion.training.base.trainable import prepare_trainable

NAMES = [model.name for model in PUBLISHED]
# Layers of the denoiser that each preset adapts: attention, all-linear, all.
LAYERS = {
    "SD 1.5": (128, 192, 256),
    "SD 2.1": (128, 192, 256),
    "SDXL base": (560, 722, 771),
    "SD 3 medium": (191, 285, 336),
    "SD 3.5 medium": (243, 337, 388),
    "SD 3.5 large": (303, 453, 532),
    "FLUX.1 dev": (266, 418, 498),
    "FLUX.1 schnell": (266, 418, 498),
    "FLUX.2 dev": (160, 192, 199),
    "FLUX.2 Klein 4B": (80, 100, 107),
    "FLUX.2 Klein 9B": (112, 144, 151),
    "PixArt-alpha 1024": (224, 280, 284),
    "PixArt-Sigma 1024": (224, 280, 284),
    "Hunyuan-DiT 1.1": (320, 419, 463),
    "Hunyuan-DiT 1.2": (320, 419, 463),
    "Sana 0.6B": (224, 280, 312),
    "Sana 1.6B": (160, 200, 224),
    "AuraFlow 0.3": (160, 280, 323),
    "Lumina-Image 2.0": (120, 210, 241),
    "Z-Image": (136, 238, 274),
    "Qwen-Image": (480, 720, 844),
}
DEPTH = 2
DEPTHS = (
    "transformer_layers_per_block",
    "num_layers",
    "num_single_layers",
    "num_mmdit_layers",
    "num_single_dit_layers",
    "n_layers",
    "num_hidden_layers",
)


@cache
def pipeline(name: str) -> Any:
    return pipeline_of(published(name))


def published(name: str) -> Published:
    return next(model for model in PUBLISHED if model.name == name)


def shallow(model: Published) -> Published:
    """With at most DEPTH blocks of each kind in every part that is a stack of them."""
    return replace(model, parts={name: replace(part, config=_cut(part)) for name, part in model.parts.items()})


def _cut(part: Part) -> dict[str, Any]:
    known = signature(getattr(diffusers, part.kind)).parameters if part.library == "diffusers" else {}
    defaults = {name: known[name].default for name in DEPTHS if name in known}
    return _cut_depths({**defaults, **part.config})


def _cut_depths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Configs of models with several towers hold one for each."""
    cut = {name: _cut_depths(value) if isinstance(value, Mapping) else value for name, value in config.items()}
    return {**cut, **{name: _cut_depth(cut[name]) for name in DEPTHS if cut.get(name) is not None}}


def _cut_depth(depth: Any) -> Any:
    """One for each stage of a UNet, or one."""
    return [_cut_depth(each) for each in depth] if isinstance(depth, Sequence) else min(DEPTH, depth)


def test_every_family_of_published_sizes_has_its_model_and_every_model_a_family() -> None:
    parts = {family.name: family.signature.parts[family.denoiser.name] for family in FAMILIES}
    assert {model.family for model in PUBLISHED} == {name for name, part in parts.items() if part.sizes}
    assert sorted(NAMES) == sorted(LAYERS) == sorted(set(NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_a_published_model_is_found_and_matched_whole(name) -> None:
    pipe = pipeline(name)
    family = family_of_pipeline(pipe)
    assert family.name == published(name).family
    assert family.native_side(pipe) == published(name).side
    for part in family.components:
        if (model := getattr(pipe, part.name, None)) is not None:
            found = coverage(part, model)
            assert component_of_model(model) is not None and found.unmatched == (), part.name
            assert 0 < found.matched["attention"] <= found.matched["all-linear"] <= found.matched["all"]
    found = coverage(family.denoiser, getattr(pipe, family.denoiser.name))
    assert tuple(found.matched[preset] for preset in ("attention", "all-linear", "all")) == LAYERS[name]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_the_published_number(name) -> None:
    for part, facts in published(name).parts.items():
        if facts.millions is not None:
            counted = sum(parameter.numel() for parameter in getattr(pipeline(name), part).parameters())
            assert counted / 1e6 == pytest.approx(facts.millions, rel=0.05), part


@pytest.mark.parametrize("name", NAMES)
def test_the_size_of_an_adapter_is_that_of_its_parameters(name) -> None:
    pipe = pipeline(name)
    denoiser = getattr(pipe, published(name).denoiser)
    trainable = prepare_trainable(pipe, config_of(adapter={"target_modules": "all-linear", "rank": 1}))
    trained = sum(parameter.numel() for parameter in trainable.parameters())
    assert all(parameter.is_meta for parameter in trainable.parameters())
    trainable.eject()
    assert trained == adapter_numbers(denoiser, "all-linear", 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_runs_on_the_shapes(name) -> None:
    """Of a few blocks of every kind, at their real width: `make full-size` takes the step of the whole depth."""
    found = estimate(shallow(published(name)), config_of())
    assert found.moments["a step of 1"] > found.gradients > 0
    assert found.total > sum(found.present.values()) > 0


def test_depth_is_all_that_a_shallow_model_lacks() -> None:
    whole, cut = (
        pipeline_of(model).transformer for model in (published("FLUX.2 dev"), shallow(published("FLUX.2 dev")))
    )
    assert len(cut.single_transformer_blocks) == DEPTH < len(whole.single_transformer_blocks)
    shapes = {name: parameter.shape for name, parameter in whole.named_parameters()}
    assert all(shapes[name] == parameter.shape for name, parameter in cut.named_parameters())
