"""An adapter's family: for every published model and every tiny one, by every preset; a doubt is no guess."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.full_size.models import pipeline_of
from benchmarks.full_size.published import PUBLISHED
from dora_diffusion import families
from dora_diffusion.families import family_of_pipeline
from dora_diffusion.formats.family_detection import FAMILIES, family_of
from dora_diffusion.layers.targets import target_paths
from dora_diffusion.state import AdapterState, FactoredState, Module, ModuleState
from tests.families.pipelines import PIPELINES

PRESETS = ("attention", "all-linear", "all")
SIZES = [model.name for model in PUBLISHED]
# Both are of one shape: the conditions on size that Alpha has more are no part of a preset.
TWINS = {"pixart-alpha", "pixart-sigma"}


@cache
def full_size(name: str) -> Any:
    return pipeline_of(next(model for model in PUBLISHED if model.name == name))


@cache
def tiny(name: str) -> Any:
    return PIPELINES[name].build()


def pair(layer: nn.Module) -> Module:
    """A LoRA of rank 2 without numbers."""
    weight = layer.weight.to("meta")
    if weight.dim() == 4:
        return ModuleState(weight.new_empty(2, *weight.shape[1:]), weight.new_empty(weight.shape[0], 2, 1, 1), 2.0)
    return ModuleState(weight.new_empty(2, weight.shape[1]), weight.new_empty(weight.shape[0], 2), 2.0)


def adapter(pipe: Any, preset: str, components: tuple[str, ...]) -> AdapterState:
    """An adapter of a preset's layers."""
    modules = {}
    for component in components:
        model = getattr(pipe, component)
        layers = dict(model.named_modules())
        for path in target_paths(model, preset):
            modules[f"{component}.{path}"] = pair(layers[path])
    return AdapterState(modules)


def test_every_family_is_known() -> None:
    assert {family.name: {part.name for part in family.components} for family in families.FAMILIES} == {
        name: set(parts) for name, parts in FAMILIES.items()
    }


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", SIZES)
def test_a_published_model_is_told_by_its_layers(name: str, preset: str) -> None:
    pipe = full_size(name)
    family = family_of_pipeline(pipe)
    state = adapter(pipe, preset, (family.denoiser.name,))
    # without its feed-forward layers, the small Sana is a PixArt of another name
    is_in_doubt = family.name in TWINS or (name == "Sana 0.6B" and preset == "attention")
    assert family_of(state) == (None if is_in_doubt else family.name)
    declared = AdapterState(state.modules, {"dora_diffusion.family": family.name})
    assert family_of(declared) == family.name


@pytest.mark.parametrize("name", SIZES)
def test_every_layer_of_a_published_model_at_once_tells_it(name: str) -> None:
    family = family_of_pipeline(full_size(name))
    for components in ([family.denoiser], family.components):
        modules = {}
        for part in components:
            for path, layer in getattr(full_size(name), part.name).named_modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    modules[f"{part.name}.{path}"] = pair(layer)
        # pixart-alpha's layers for sizes are adapted here
        assert family_of(AdapterState(modules)) == (None if family.name == "pixart-sigma" else family.name)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", PIPELINES)
def test_a_tiny_model_is_told_by_names_or_not_at_all(name: str, preset: str) -> None:
    pipe = tiny(name)
    family = family_of_pipeline(pipe)
    parts = tuple(part.name for part in family.components if getattr(pipe, part.name, None) is not None)
    for components in (parts[:1], parts):
        state = adapter(pipe, preset, components)
        assert family_of(state) in (family.name, None)
        assert family_of(AdapterState(state.modules, {"dora_diffusion.family": family.name})) == family.name


TOLD_BY_NAMES = {
    **{"sd1": "all", "sdxl": "attention", "flux-dev": "attention", "auraflow": "attention", "lumina2": "attention"},
    **{"sana": "all-linear", "qwen-image": "all-linear", "hunyuan-dit-1.2": "attention", "z-image": "attention"},
}


@pytest.mark.parametrize("name", TOLD_BY_NAMES)
def test_names_alone_tell_many_tiny_models(name: str) -> None:
    family = family_of_pipeline(tiny(name))
    assert family_of(adapter(tiny(name), TOLD_BY_NAMES[name], (family.denoiser.name,))) == family.name


@pytest.mark.parametrize("name", SIZES)
def test_every_single_layer_is_of_its_own_family_or_of_none(name: str) -> None:
    pipe = full_size(name)
    family = family_of_pipeline(pipe)
    for part in family.components:
        model = getattr(pipe, part.name)
        layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
        some = [path for number, path in enumerate(layers) if number < 60 or number % 37 == 0]
        for path in some:
            state = AdapterState({f"{part.name}.{path.removeprefix('text_model.')}": pair(layers[path])})
            assert family_of(state) in (family.name, None), path
            assert family_of(AdapterState(state.modules, {"dora_diffusion.family": family.name})) == family.name, path


def clip(component: str, width: int, **metadata: str) -> AdapterState:
    down, up = torch.zeros(2, width), torch.zeros(width, 2)
    state = {f"{component}.encoder.layers.11.self_attn.q_proj": ModuleState(down, up, 2.0)}
    return AdapterState(state, metadata)


def test_text_encoders_alone() -> None:
    assert family_of(clip("text_encoder", 1024)) == "sd2"
    assert family_of(clip("text_encoder", 768)) is None
    assert family_of(clip("text_encoder_2", 1280)) is None
    assert family_of(clip("text_encoder", 768, ss_base_model_version="sd_v1")) == "sd1"
    assert family_of(clip("text_encoder_2", 1280, ss_base_model_version="sdxl_base_v1-0")) == "sdxl"


def cross(width: int, path: str = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k") -> dict[str, Module]:
    return {path: ModuleState(torch.zeros(2, width), torch.zeros(1280, 2), 2.0)}


def test_the_width_of_the_texts_tells_a_unet() -> None:
    assert [family_of(AdapterState(cross(width))) for width in (768, 1024, 2048, 100)] == ["sd1", "sd2", "sdxl", None]
    flat = {"hada_w1_a": torch.zeros(1280, 2), "hada_w1_b": torch.zeros(2, 2048)}
    flat |= {"hada_w2_a": torch.zeros(1280, 2), "hada_w2_b": torch.zeros(2, 2048)}
    (path,) = cross(0)
    assert family_of(AdapterState({path: FactoredState("loha", flat)})) == "sdxl"
    assert family_of(AdapterState({path: FactoredState("full", {"diff": torch.zeros(1280, 768)})})) == "sd1"


@pytest.mark.parametrize(
    ("width", "metadata", "family"),
    [
        (64, {"ss_base_model_version": "sd_v1"}, "sd1"),
        (64, {"ss_base_model_version": "sd_v2_v"}, "sd2"),
        (64, {"ss_base_model_version": "sd_1.5"}, "sd1"),
        (64, {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "sd2"),
        (64, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
        (64, {"modelspec.architecture": "stable-diffusion-xl-v1-refiner"}, None),
        (64, {"ot_config": '{"model_type": "STABLE_DIFFUSION_15"}'}, "sd1"),
        (64, {"ot_config": '{"model_type": "STABLE_DIFFUSION_XL_10_BASE"}'}, "sdxl"),
        (64, {"ot_config": "{"}, None),
        (64, {"ot_config": "[" * 100_000}, None),
        (64, {"modelspec.architecture": "stable-diffusion-v1", "ss_base_model_version": "sd_v2"}, None),
        (64, {"modelspec.architecture": "flux-1-dev"}, None),
        (64, {"dora_diffusion.family": "sdxl", "ss_base_model_version": "sd_v1"}, "sdxl"),
        (64, {"dora_diffusion.family": "sd4"}, None),
        (768, {"ss_base_model_version": "sdxl_base_v1-0"}, "sd1"),
    ],
)
def test_metadata_choose_among_what_the_layers_allow(width: int, metadata: dict[str, str], family: str | None) -> None:
    assert family_of(AdapterState(cross(width), metadata)) == family


CALLED = {
    "sd1": ("sd_v1", "stable-diffusion-v1/lora", "STABLE_DIFFUSION_15_INPAINTING", "sd15"),
    "sd2": ("sd_v2", "STABLE_DIFFUSION_20_BASE", "stable-diffusion-v2-512"),
    "sdxl": ("sdxl_base_v1-0", "sdxl_1.0", "stable-diffusion-xl-v1-base"),
    "sd3": ("sd3", "sd3m", "stable-diffusion-3-5-large", "STABLE_DIFFUSION_35", "stable-diffusion-v3-medium", "sd3.5"),
    "flux": ("flux1", "flux-1-dev", "FLUX_DEV_1", "Flux.1-schnell", "black-forest-labs/FLUX.1-dev", "flux"),
    "flux2": ("flux-2-dev",),
    "flux2-klein": ("flux2-klein-4b", "FLUX.2-klein-9B"),
    "qwen-image": ("QWEN", "Qwen/Qwen-Image", "qwen-image"),
    "z-image": ("Z_IMAGE", "zimage"),
    "lumina2": ("lumina-2", "lumina2", "Lumina-Image-2.0"),
    "auraflow": ("auraflow", "aura_flow"),
    "hunyuan-dit": ("hunyuan-dit", "HunyuanDiT-v1.2"),
    "sana": ("SANA",),
    "pixart-alpha": ("PIXART_ALPHA",),
    "pixart-sigma": ("PixArt-Sigma-XL-2",),
}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in CALLED.items() for name in names])
def test_names_that_tools_give_to_models(family: str, name: str) -> None:
    # an adapter of no layers fits every family
    assert family_of(AdapterState({}, {"ss_base_model_version": name})) == family


@pytest.mark.parametrize(
    "name", ["", "chroma", "HI_DREAM_FULL", "sdx", "sd12", "wan2.1", "fluxion", "flux-2", "lumina"]
)
def test_names_of_other_models_are_no_family(name: str) -> None:
    assert family_of(AdapterState({}, {"modelspec.architecture": name})) is None


@pytest.mark.parametrize(
    "path",
    [
        *(
            "unet.down_blocks.0.motion_modules.0.to_q",
            "vae.encoder.conv_in",
            "transformer.blocks.0.self_attn.q",
            "to_q",
        ),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.processor",
    ],
)
def test_layers_that_no_family_has_make_it_none(path: str) -> None:
    assert family_of(AdapterState(cross(768, path), {"modelspec.architecture": "stable-diffusion-v1"})) is None


def test_a_wide_model_of_other_sizes_is_another_model() -> None:
    # Stable Diffusion XL's refiner has a name of SDXL's for every layer, and texts 1280 wide
    path = "unet.down_blocks.1.attentions.0.transformer_blocks.3.attn2.to_k"
    assert family_of(AdapterState(cross(1280, path))) is None
    assert family_of(AdapterState(cross(40, path))) == "sdxl"
    assert family_of(AdapterState(cross(1280, path), {"dora_diffusion.family": "sdxl"})) == "sdxl"


@pytest.mark.parametrize("name", ["chroma", "CHROMA_1", "org/Kolors", "stable-diffusion-xl-v1-refiner"])
def test_a_stranger_that_looks_like_a_family_is_none(name: str) -> None:
    flux = {
        "transformer.single_transformer_blocks.0.proj_mlp": ModuleState(torch.zeros(2, 3072), torch.zeros(9, 2), 2.0)
    }
    assert family_of(AdapterState(flux)) == "flux"
    assert family_of(AdapterState(flux, {"ss_base_model_version": name})) is None


def test_biases_and_norms_count_as_layers() -> None:
    vectors = {"transformer.single_transformer_blocks.0.proj_mlp.bias": torch.zeros(1)}
    assert family_of(AdapterState({}, vectors=vectors)) == "flux"


@pytest.mark.parametrize(("name", "family"), [("pocket", "sd1"), ("pocket-dit", "sd3")])
def test_the_embedded_bases(name: str, family: str) -> None:
    import dora_diffusion

    pipe = dora_diffusion.load_pipeline(name)
    component = family_of_pipeline(pipe).denoiser.name
    for preset in PRESETS:
        assert family_of(adapter(pipe, preset, (component,))) == family
