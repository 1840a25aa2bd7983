"""A file at a glance: the header alone says what the loaded adapter does, in every format and kind."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from dora_diffusion.adapters.matching import kind_in_words
from dora_diffusion.formats import FORMATS, detect_format, load_adapter, save_adapter
from dora_diffusion.formats.family_detection import family_of
from dora_diffusion.inspection.header import DeclaredMetadata, Structure, declared_metadata, summarise_header
from dora_diffusion.state import AdapterState, ModuleState
from dora_diffusion.utils.atomic import save_tensors
from tests.formats.adapters import KINDS, adapter_of, layers_of
from tests.pocket_random import random_pocket_pipeline


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return random_pocket_pipeline()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_says_what_the_loaded_adapter_says(
    pipe: StableDiffusionPipeline, kind: str, format: str, tmp_path: Path
) -> None:
    layers = [layer for layer in layers_of(pipe, ("unet", "text_encoder"), kinds=(nn.Linear,)) if "attn" in layer[0]]
    adapter = adapter_of(layers[:12], KINDS[kind])
    path = tmp_path / ("ink" if format == "peft" else "ink.safetensors")
    try:
        save_adapter(adapter, path, format=format)
    except ValueError as error:
        pytest.skip(f"{format} cannot hold this: {str(error)[:80]}")
    loaded, seen = load_adapter(path), summarise_header(path).structure
    assert (seen.format, seen.kind) == (detect_format(path), kind_in_words(loaded))
    assert (seen.family, seen.ranks, seen.components) == (family_of(loaded) or "", loaded.ranks, loaded.components)
    assert seen.layers == len(loaded.modules)
    axes = {module.axis for module in loaded.modules.values() if module.magnitude is not None}
    assert seen.axis == "/".join(sorted(axes, reverse=True))


def test_an_axis_that_only_a_base_could_tell_is_unclear(tmp_path: Path) -> None:
    path = tmp_path / "square.safetensors"
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{name}.lora_down.weight": torch.ones(2, 8),
        f"{name}.lora_up.weight": torch.ones(8, 2),
        f"{name}.dora_scale": torch.ones(8),
    }
    save_tensors(tensors, path)
    assert summarise_header(path).structure.axis == "unclear"
    save_tensors(tensors, path, {"dora_diffusion.magnitude_axis": "in"})
    assert summarise_header(path).structure.axis == "in"


def _file(path: Path, metadata: dict[str, str], rank: int = 2) -> Path:
    modules = {
        f"unet.mid_block.attentions.0.transformer_blocks.0.{layer}": ModuleState(
            torch.ones(rank, 1280), torch.ones(1280, rank), 1.0
        )
        for layer in ("attn1.to_q", "attn1.to_k")
    }
    return save_adapter(AdapterState(modules, metadata), path)


def test_files_of_one_structure_are_taken_apart_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[bytes, Structure] = {}
    first = summarise_header(_file(tmp_path / "a.safetensors", {"ss_base_model_version": "sd_v1"}), known)
    monkeypatch.setattr("dora_diffusion.inspection.header.read_header", None)  # would fail if it were called
    other = _file(tmp_path / "b.safetensors", {"ss_base_model_version": "sd_v1", "modelspec.title": "Other"})
    again = summarise_header(other, known)
    assert again.structure is first.structure
    assert again.declared.title == "Other"
    assert len(known) == 1


def test_what_tells_the_family_or_the_shapes_is_looked_at_again(tmp_path: Path) -> None:
    known: dict[bytes, Structure] = {}
    one = summarise_header(_file(tmp_path / "a.safetensors", {"dora_diffusion.family": "sd1"}), known).structure
    two = summarise_header(_file(tmp_path / "b.safetensors", {"dora_diffusion.family": "sdxl"}), known).structure
    three = summarise_header(
        _file(tmp_path / "c.safetensors", {"dora_diffusion.family": "sd1"}, rank=3), known
    ).structure
    assert [one.family, two.family] == ["sd1", "sdxl"]
    assert (one.ranks, three.ranks) == ((2,), (3,))


def test_a_file_that_is_cut_short_is_never_known(tmp_path: Path) -> None:
    known: dict[bytes, Structure] = {}
    path = _file(tmp_path / "a.safetensors", {"x": "y"})
    summarise_header(path, known)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"a.safetensors: tensors end at byte \d+ of \d+; the file is cut short"):
        summarise_header(path, known)


def test_what_metadata_tell() -> None:
    frequency = {"10_sks dog": {"sks dog": 20, " park ": 12, "grass": 30}, "img": {"park": 9, "bad": "many"}}
    declared = declared_metadata(
        {
            "modelspec.title": "  A\ndog ",
            "modelspec.author": "<b>me</b>",
            "modelspec.tags": "animal, dog, animal",
            "modelspec.trigger_phrase": "sks dog, on grass",
            "dora_diffusion.words": "<sks>",
            "dora_diffusion.instance_prompt": "a photo of sks dog",
            "ss_tag_frequency": json.dumps(frequency),
            "ss_sd_model_name": "None",
            "ss_base_model_version": "sd_v1",
        }
    )
    assert declared == DeclaredMetadata(
        title="A dog",
        author="<b>me</b>",
        base="sd_v1",
        triggers=("sks dog", "on grass", "a photo of sks dog", "<sks>"),
        tags=("animal", "dog", "grass", "park", "sks dog"),
    )


ODD = ("", "no JSON", "[]", '{"a": 1}', '{"reg": {"x": -1}}', "[" * 100_000, "x" * 2_000_000)


@pytest.mark.parametrize("text", ODD)
def test_odd_metadata_tell_nothing(text: str) -> None:
    assert (
        declared_metadata({"ss_tag_frequency": text, "ss_dataset_dirs": text, "modelspec.tags": "," * 9000 + "late"})
        == DeclaredMetadata()
    )


def test_folders_of_kohyas_name_what_was_trained() -> None:
    declared = declared_metadata({"ss_dataset_dirs": json.dumps({"10_sks dog": {"n_repeats": 10}, "reg": {}})})
    assert declared.triggers == ("sks dog",)
