"""What other tools read in an adapter's file: ModelSpec and kohya's ss_*, true and the same whenever it is written."""

import hashlib
import json
from pathlib import Path

import pytest
from safetensors import safe_open

from dora_diffusion.families import FAMILIES, family_named
from dora_diffusion.formats import load_adapter, save_adapter
from dora_diffusion.formats.family_detection import told_families
from dora_diffusion.inspection.header import declared_metadata
from dora_diffusion.training.base.trainable import TrainablePipeline, prepare_trainable
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.concepts import Split
from dora_diffusion.training.data.examples import Example
from dora_diffusion.training.run.metadata import (
    TAGS_AT_MOST,
    adapter_metadata,
    named_for_tools,
    tag_frequency,
    tool_metadata,
    trigger_words,
)
from tests.families.pipelines import PIPELINES
from tests.pocket_random import random_pocket_pipeline


def config_of(folder: Path, **sections) -> TrainConfig:
    (folder / "images").mkdir(exist_ok=True)
    data = {"instance_dir": folder / "images", **sections.pop("data", {})}
    return TrainConfig.model_validate({"output_dir": folder / "run", "data": data, **sections})


def examples_of(folder: Path) -> Split:
    robots = [Example(folder / "10_robot" / f"{n}.png", f"zqx robot, red, {n}", repeats=10) for n in range(3)]
    others = [Example(folder / "cars" / "1.png", "a car, red", ("a car, blue",))]
    return Split([*robots, *others], robots[:1], (Example(folder / "class" / "0.png", "a robot"),))


def trained(folder: Path, config: TrainConfig) -> TrainablePipeline:
    return prepare_trainable(random_pocket_pipeline(), config)


def test_kohyas_words_say_what_was_trained(tmp_path) -> None:
    config = config_of(
        tmp_path,
        model=str(tmp_path / "my-base"),
        data={"resolution": [32, 64], "flip": True, "captions": {"keep_tokens": 1, "tag_dropout": 0.5}},
        adapter={"rank": 4, "alpha": 2, "train_text_encoder": True},
        optim={"steps": 9, "batch_size": 2, "gradient_accumulation": 3, "learning_rate": 2e-4, "seed": 7},
    )
    found = tool_metadata(config, random_pocket_pipeline(), examples_of(tmp_path), step=5)
    expected = {
        "ss_sd_model_name": "my-base",
        "ss_v2": "False",
        "ss_network_dim": "4",
        "ss_network_alpha": "2",
        "ss_resolution": "(64, 64)",
        "ss_num_train_images": "31",
        "ss_num_reg_images": "1",
        "ss_num_validation_images": "1",
        "ss_learning_rate": "0.0002",
        "ss_unet_lr": "0.0002",
        "ss_text_encoder_lr": "0.0002",
        "ss_batch_size_per_device": "2",
        "ss_gradient_accumulation_steps": "3",
        "ss_max_train_steps": "9",
        "ss_steps": "5",
        "ss_flip_aug": "True",
        "ss_keep_tokens": "1",
        "ss_caption_tag_dropout_rate": "0.5",
        "ss_seed": "7",
    }
    assert {key: found[key] for key in expected} == expected
    assert json.loads(found["ss_dataset_dirs"]) == {
        "10_robot": {"n_repeats": 10, "img_count": 3},
        "cars": {"n_repeats": 1, "img_count": 1},
    }
    frequency = json.loads(found["ss_tag_frequency"])
    assert frequency["cars"] == {"a car": 2, "red": 1, "blue": 1}
    assert frequency["10_robot"] == {"zqx robot": 3, "red": 3, "0": 1, "1": 1, "2": 1}
    assert str(tmp_path) not in json.dumps(found)


def test_no_folder_holds_more_than_its_most_frequent_tags(tmp_path) -> None:
    examples = [Example(tmp_path / "a" / f"{n}.png", f"tag {n}, common") for n in range(TAGS_AT_MOST + 5)]
    counts = tag_frequency(examples, ",")["a"]
    assert len(counts) == TAGS_AT_MOST and counts["common"] == TAGS_AT_MOST + 5


def test_the_text_encoders_own_rates_are_told_and_those_of_what_is_not_trained_are_not(tmp_path) -> None:
    rates = {"text_encoder_learning_rate": {"text_encoder": 1e-5}}
    config = config_of(tmp_path, adapter={"train_text_encoder": True, "train_unet": False}, optim=rates)
    found = tool_metadata(config, random_pocket_pipeline(), examples_of(tmp_path), step=1)
    assert json.loads(found["ss_text_encoder_lr"]) == {"text_encoder": 1e-5}
    assert "ss_unet_lr" not in found
    alone = tool_metadata(config_of(tmp_path), random_pocket_pipeline(), examples_of(tmp_path), step=1)
    assert "ss_text_encoder_lr" not in alone


@pytest.mark.parametrize(
    "name", ["sd1", "sd2", "sd2-v", "sdxl", "sd3", "flux-dev", "flux-schnell", "qwen-image", "sana"]
)
def test_the_model_is_called_what_readers_call_it(tmp_path, name: str) -> None:
    pipe = PIPELINES[name].build()
    found = tool_metadata(config_of(tmp_path), pipe, examples_of(tmp_path), step=1)
    architecture, version, predicts = {
        "sd1": ("stable-diffusion-v1", "sd_v1", "epsilon"),
        "sd2": ("stable-diffusion-v2-512", "sd_v2", "epsilon"),
        "sd2-v": ("stable-diffusion-v2-768-v", "sd_v2_v", "v"),
        "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "epsilon"),
        "sd3": ("stable-diffusion-3", "sd3", None),
        "flux-dev": ("flux-1-dev", "flux1", None),
        "flux-schnell": ("flux-1-schnell", "flux1", None),
        "qwen-image": ("Qwen-Image", "qwen_image", None),
        "sana": ("sana", None, None),
    }[name]
    assert found["modelspec.architecture"] == f"{architecture}/lora"
    assert found.get("ss_base_model_version") == version
    assert found.get("modelspec.prediction_type") == predicts
    assert found["ss_v2"] == str(name.startswith("sd2"))
    assert ("ss_min_snr_gamma" in found) == (predicts is not None)


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
@pytest.mark.parametrize("predicts_v", [False, True])
def test_what_is_written_is_understood_when_it_is_read(family: str, predicts_v: bool) -> None:
    architecture, version = family_named(family).names.of(predicts_v=predicts_v)
    assert family in told_families({"modelspec.architecture": f"{architecture or family}/lora"})
    if version:
        assert told_families({"ss_base_model_version": version}) >= {family}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"instance_prompt": "a photo"}}, ("a photo",)),
        ({"data": {"instance_prompt": "a photo", "trigger": "zqx robot"}}, ("zqx robot",)),
        ({"data": {"trigger": "a zqx"}, "words": {"starts": {"zqx": "robot", "vbn": "car"}}}, ("a zqx", "vbn")),
        ({}, ()),
    ],
)
def test_what_a_prompt_calls_it_by(tmp_path, sections: dict, words: tuple[str, ...]) -> None:
    config = config_of(tmp_path, **sections)
    assert trigger_words(config) == words
    found = tool_metadata(config, random_pocket_pipeline(), examples_of(tmp_path), step=1)
    assert found.get("modelspec.trigger_phrase", "") == ", ".join(words)


@pytest.mark.parametrize("format", ["diffusers", "kohya", "lycoris", "peft"])
def test_a_file_with_it_loads_and_its_hashes_are_those_of_its_tensors(tmp_path, format: str) -> None:
    config = config_of(tmp_path, adapter={"rank": 2})
    trainable = trained(tmp_path, config)
    metadata = tool_metadata(config, trainable.pipe, examples_of(tmp_path), step=1)
    metadata |= adapter_metadata(config, trainable.family, step=1)
    adapter = trainable.adapter(metadata)
    path = save_adapter(adapter, tmp_path / ("a" if format == "peft" else "a.safetensors"), format=format)
    read = load_adapter(path)
    assert read.modules.keys() == adapter.modules.keys()
    assert read.metadata["modelspec.title"] == metadata["modelspec.title"]
    if format == "peft":  # whose tensors lie in a file for each component
        assert not any("hash" in key for key in read.metadata)
        return
    raw = path.read_bytes()
    tensors = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    with safe_open(path, "pt") as file:
        said = file.metadata()
    assert said["modelspec.hash_sha256"] == f"0x{tensors}" and said["sshs_model_hash"] == tensors
    declared = declared_metadata(said)
    assert declared.title == metadata["modelspec.title"] and "red" in declared.tags


def test_ranks_that_differ_are_dynamic(tmp_path) -> None:
    config = config_of(tmp_path, adapter={"rank": 2, "rank_pattern": {"to_q": 3}})
    trainable = trained(tmp_path, config)
    metadata = tool_metadata(config, trainable.pipe, examples_of(tmp_path), step=1)
    path = save_adapter(trainable.adapter(metadata), tmp_path / "a.safetensors")
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_network_dim"] == "Dynamic"


def test_the_file_says_nothing_of_captions_when_it_is_told_not_to(tmp_path) -> None:
    config = config_of(tmp_path, metadata="minimal")
    assert tool_metadata(config, random_pocket_pipeline(), examples_of(tmp_path), step=1) == {}
    assert named_for_tools({"dora_diffusion.steps": "1"}, "robot") == {"dora_diffusion.steps": "1"}
    full = named_for_tools({"modelspec.title": "a"}, "robot")
    assert full == {"modelspec.title": "robot", "ss_output_name": "robot"}
