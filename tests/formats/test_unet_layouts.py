"""The original names of Stable Diffusion's UNets and text encoders: every layer both ways, judged by diffusers."""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_open_clip_checkpoint
from torch import Tensor, nn

from benchmarks.full_size.models import model_of
from benchmarks.full_size.published import PUBLISHED
from dora_diffusion.formats.flat_names import flatten
from dora_diffusion.formats.layouts import LAYOUTS, Fusion, Layout
from dora_diffusion.formats.layouts.clip import CLIP, OPEN_CLIP_G, OPEN_CLIP_H, TRANSPOSED, tensor_name
from dora_diffusion.formats.layouts.unet import LDM, SGM

UNETS = {"SD 1.5": LDM, "SD 2.1": LDM, "SDXL base": SGM}
ENCODERS = {"SD 2.1": OPEN_CLIP_H, "SDXL base": OPEN_CLIP_G}


@cache
def model(name: str, component: str) -> nn.Module:
    return model_of(next(published for published in PUBLISHED if published.name == name).parts[component])


def layers(module: nn.Module) -> dict[str, list[str]]:
    """Path of a layer, without `text_model.` -> its parameters."""
    found: dict[str, list[str]] = {}
    for name, _ in module.named_parameters():
        path, _, parameter = name.removeprefix("text_model.").rpartition(".")
        found.setdefault(path, []).append(parameter)
    return found


def known(found: Fusion | None) -> Fusion:
    assert found is not None
    return found


@pytest.mark.parametrize(("name", "component", "layout"), [(n, "unet", lay) for n, lay in UNETS.items()])
def test_every_layer_of_the_unet_has_one_name_and_comes_back(name: str, component: str, layout: Layout) -> None:
    paths = layers(model(name, component))
    originals = {path: known(layout.of_path(path)) for path in paths}
    assert len({fusion.original for fusion in originals.values()}) == len(paths)
    for path, fusion in originals.items():
        assert fusion.paths == (path,) and layout.of_original(fusion.original) == fusion


@pytest.mark.parametrize("name", UNETS)
def test_diffusers_reads_a_checkpoint_of_these_names(name: str) -> None:
    unet = model(name, "unet")
    # tags instead of weights: the converter only moves them
    tags = {key: torch.tensor(float(number)) for number, key in enumerate(unet.state_dict())}
    checkpoint = {}
    for key, tag in tags.items():
        path, _, parameter = key.rpartition(".")
        checkpoint[f"model.diffusion_model.{known(UNETS[name].of_path(path)).original}.{parameter}"] = tag
    read = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    assert read.keys() == tags.keys()
    assert all(read[key] is tag for key, tag in tags.items())


def test_diffusers_reads_an_adapter_of_these_names() -> None:
    unet = model("SDXL base", "unet")
    paths = [path for path, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    tags, adapter = {path: Tensor() for path in paths}, {}
    for path in paths:
        name = f"lora_unet_{flatten(known(SGM.of_path(path)).original)}"
        adapter |= {f"{name}.lora_down.weight": tags[path], f"{name}.lora_up.weight": tags[path]}
    blocks = _maybe_map_sgm_blocks_to_diffusers(adapter, SimpleNamespace(layers_per_block=2))
    read, _ = _convert_non_diffusers_lora_to_diffusers(blocks)
    assert len(read) == 2 * len(paths)
    # the older spelling: `attn1.processor.to_q_lora.down.weight`
    spelt = {
        key.replace(".processor", "").replace("_lora.", ".lora.").replace("to_out.", "to_out.0."): key for key in read
    }
    assert all(read[spelt[f"unet.{path}.lora.down.weight"]] is tags[path] for path in paths)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_layer_of_open_clip_comes_back(name: str) -> None:
    component, layout = ENCODERS[name].component, ENCODERS[name]
    paths = set(layers(model(name, component)))
    fusions = {known(layout.of_path(path)) for path in paths}
    assert sorted(path for fusion in fusions for path in fusion.paths) == sorted(paths)
    assert all(layout.of_original(fusion.original) == fusion for fusion in fusions)
    assert len({fusion.original for fusion in fusions}) == len(fusions)


def open_clip(encoder: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """A checkpoint of OpenCLIP's names out of transformers' model."""
    tensors = {key.removeprefix("text_model."): tensor for key, tensor in encoder.state_dict().items()}
    checkpoint: dict[str, Tensor] = {}
    for path, parameters in layers(encoder).items():
        fusion = known(layout.of_path(path))
        for parameter in parameters:
            fused = torch.cat([tensors[f"{part}.{parameter}"] for part in fusion.paths])
            fused = fused.T if fusion.original in TRANSPOSED else fused
            checkpoint["conditioner." + tensor_name(fusion.original, parameter)] = fused
    return checkpoint


@pytest.mark.parametrize("name", ENCODERS)
def test_diffusers_reads_an_open_clip_checkpoint_of_these_names(name: str) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    layout = ENCODERS[name]
    big = model(name, layout.component).config
    kind = CLIPTextModelWithProjection if layout is OPEN_CLIP_G else CLIPTextModel
    torch.manual_seed(0)
    encoder = kind(
        CLIPTextConfig(
            vocab_size=30,
            hidden_size=8,
            intermediate_size=16,
            projection_dim=8,
            num_hidden_layers=big.num_hidden_layers,
            num_attention_heads=2,
            max_position_embeddings=5,
        )
    )
    read = convert_open_clip_checkpoint(encoder, open_clip(encoder, layout), prefix="conditioner.")
    want = {key.removeprefix("text_model."): tensor for key, tensor in encoder.state_dict().items()}
    got = {key.removeprefix("text_model."): tensor for key, tensor in read.items()}
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("published", [model for model in PUBLISHED if "CLIP" in model.parts["text_encoder"].kind])
def test_every_layer_of_clip_has_transformers_own_name(published) -> None:
    for layout in LAYOUTS:
        if layout.name == "clip" and published.family in layout.families:
            for path in layers(model(published.name, layout.component)):
                fusion = known(layout.of_path(path))
                assert fusion.original in (f"text_model.{path}", "text_projection") and fusion.paths == (path,)
                assert layout.of_original(fusion.original) == fusion


def test_a_component_has_one_layout() -> None:
    pairs = [(family, layout.component) for layout in LAYOUTS for family in layout.families]
    assert len(set(pairs)) == len(pairs)


NO_LAYERS: list[tuple[Callable[[str], Fusion | None], str]] = [
    (LDM.of_original, "input_blocks.1.0"),
    (LDM.of_original, "input_blocks.1.1"),
    (LDM.of_original, "input_blocks.1.0.to_q"),
    (LDM.of_original, "input_blocks.1.1.in_layers.0"),
    (LDM.of_original, "input_blocks.10.1.norm"),
    (LDM.of_original, "output_blocks.5.1.conv"),
    (LDM.of_original, "label_emb.0.0"),
    (LDM.of_path, "up_blocks.0.attentions.0.norm"),
    (LDM.of_path, "down_blocks.3.downsamplers.0.conv"),
    (LDM.of_path, "input_blocks.1.0.in_layers.0"),
    (LDM.of_path, "down_blocks.0.resnets.0"),
    (SGM.of_original, "input_blocks.1.1.norm"),
    (SGM.of_original, "output_blocks.8.1.norm"),
    (SGM.of_path, "down_blocks.1.resnets.0.conv1.0"),
    (OPEN_CLIP_H.of_original, "transformer.resblocks.23.ln_1"),
    (OPEN_CLIP_H.of_original, "text_projection"),
    (OPEN_CLIP_G.of_original, "transformer.resblocks.32.ln_1"),
    (OPEN_CLIP_G.of_original, "transformer.resblocks.01.ln_1"),
    (OPEN_CLIP_G.of_path, "encoder.layers.0.self_attn"),
    (CLIP.of_original, "encoder.layers.0.mlp.fc1"),
    (CLIP.of_original, "text_model.encoder.layers.0.mlp"),
    (CLIP.of_path, "text_model.encoder.layers.0.mlp.fc1"),
]


@pytest.mark.parametrize(("of", "name"), NO_LAYERS)
def test_what_is_no_layer_has_no_name(of: Callable[[str], Fusion | None], name: str) -> None:
    assert of(name) is None
