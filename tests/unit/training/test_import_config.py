"""Files of other trainers become ours: every row of every table, what can be got wrong, and files that are none."""

import importlib
import inspect
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from benchmarks.options_of_trainers import PAGE, page_of
from dora_diffusion.training import yaml_config
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.import_config import read_config, values, write_config
from dora_diffusion.training.import_config.convert import Imported, Line
from dora_diffusion.training.import_config.kohya.data import DATASETS
from dora_diffusion.training.import_config.optimisers import OPTIONS
from dora_diffusion.training.import_config.reading import TOOLS, read
from dora_diffusion.training.import_config.records import Row, Tool
from dora_diffusion.training.import_config.report import line_of, report
from dora_diffusion.training.known_optimisers import OPTIMISERS
from dora_diffusion.training.step.optimisers import check_optimizer

ROWS = [(tool, row) for tool in TOOLS for row in tool.rows]
IDS = [f"{tool.name} {row.name}" for tool, row in ROWS]


def with_pictures(folder: Path) -> Path:
    """A folder with pictures as kohya keeps them, `img/3_zqx robot`, and the small files that options name."""
    for name, count in (("img/3_zqx robot", 4), ("img", 1), ("reg", 2), ("plain", 5), ("class", 1)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("RGB", (8, 8)).save(folder / name / f"{number}.png")
    (folder / "prompts.txt").write_text(
        "# first\na robot --n bad, worse --d 7 --l 3.5 --s 12\na car --w 769 --h 512\na bus\n"
    )
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return with_pictures(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the tests of every row."""
    return with_pictures(tmp_path_factory.mktemp("shared"))


def imported(folder: Path, name: str, content: str | Mapping[str, Any], *, output: str = "out.yaml") -> Imported:
    """A file of the folder, read; mappings are written as JSON."""
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_config(path, output=folder / output)


def line(found: Imported, key: str) -> Line:
    """The line of a key."""
    (one,) = [one for one in found.lines if one.entry.key == key]
    return one


# every row


def put(data: dict[str, Any], name: str, value: Any) -> None:
    """`datasets[].x` or `cloud.*` into nested data."""
    at: Any = data
    *sections, last = name.split(".")
    for section in sections:
        is_list = section.endswith("[]")
        at = at.setdefault(section.removesuffix("[]"), [{}] if is_list else {})
        at = at[0] if is_list else at
    at["anything" if last == "*" else last] = value


def file_of(tool: Tool, row: Row) -> tuple[str, str]:
    """The name and text of a file that says a row's example, and what it needs beside it."""
    values = {**row.beside, row.name: row.example}
    if tool.name == "diffusers":
        return "run.sh", "accelerate launch train_dreambooth_lora.py " + " ".join(
            f"--{key}" if value is True else f'--{key}="{value}"' for key, value in values.items() if key != "script"
        )
    if tool.name == "kohya sd-scripts":
        return "file.json", json.dumps(_kohya(values))
    data: dict[str, Any] = {}
    if tool.name == "OneTrainer":
        data = {"training_method": "LORA"}
        for key, value in values.items():
            put(data, key, value)
        if data.get("concepts"):
            data["concepts"][0].setdefault("path", "plain")
        if "samples" in data:
            data["samples"][0]["prompt"] = "a robot"
        return "file.json", json.dumps(data)
    process: dict[str, Any] = {}
    data = {"job": "extension", "config": {"name": "x", "process": [process]}}
    for key, value in values.items():
        top = key.partition(".")[0]
        if key == "config.process[]":
            data["config"]["process"].append({})
        elif top in ("config", "meta", "job"):
            put(data, key, value)
        else:
            put(process, key, value)
    return "file.yaml", yaml.safe_dump(data)


def _kohya(values: Mapping[str, Any]) -> dict[str, Any]:
    of_datasets = {row.name for row in DATASETS}
    data: dict[str, Any] = {"pretrained_model_name_or_path": "runwayml/stable-diffusion-v1-5"}
    for key, value in values.items():
        section, dot, name = key.partition(".")
        if dot:
            data.setdefault(section, []).append(f"{name.replace('*', 'anything')}={value}")
        elif key in of_datasets:
            data.setdefault("datasets", [{"subsets": [{"image_dir": "plain"}]}])[0]["subsets"][0][key] = value
        else:
            data[key] = value
    return data


def has_field(key: str) -> bool:
    """Whether this version's TrainConfig has a key."""
    section, _, name = key.rpartition(".")
    model = yaml_config.sections_of(TrainConfig).get(section, TrainConfig if not section else None)
    return model is not None and name in model.model_fields


@pytest.mark.parametrize(("tool", "row"), ROWS, ids=IDS)
def test_a_file_with_any_option_imports_and_says_what_became_of_it(shared: Path, tool: Tool, row: Row) -> None:
    name, text = file_of(tool, row)
    found = imported(shared, name, text)
    wanted = row.name.replace("*", "anything")
    lines = [one for one in found.lines if one.entry.name == wanted and one.entry.is_said]
    assert len(lines) == (0 if row.name == "script" else 1) or row.name == "script"
    answer = lines[0].answer
    assert found.tool is tool and answer.kind != "unknown"
    if row.ours and all(map(has_field, row.ours)):
        assert answer.kind == "taken", line_of(lines[0])
    if answer.kind == "taken":
        ours = {re.sub(r"\[\d+\]", "[]", key) for key in answer.settings}
        alone = {"data.captions.dropout": "data.concepts[].caption_dropout"}  # of one folder that is no concept
        assert ours <= set(row.ours) or {alone.get(key, key) for key in ours} <= set(row.ours)
    elif not row.ours:
        assert answer.kind in ("lost", "needless")
    else:
        assert answer.kind == "lost" and not all(map(has_field, row.ours)), line_of(lines[0])


@pytest.mark.parametrize(
    "value",
    [[], {"a": 1}, [1], [[]], "x", True, -1, 1e999, 10**400, 0],
    ids=lambda value: repr(value)[:9],
)
@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_whatever_a_value_is_its_conversion_raises_nothing_but_one_line(shared: Path, tool: Tool, value: Any) -> None:
    for row in tool.rows:
        name, text = file_of(tool, replace(row, example=value))
        (shared / name).write_text(text)
        try:
            _, data = read(shared / name)
            source = tool.read(data, shared / name)
            for entry in source.entries:
                found = tool.row(entry.name)
                if found is not None and not entry.is_empty:
                    found.convert(entry.value, source.seen_from(entry))
        except (ValueError, OverflowError) as error:
            assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("value", [[], {"a": 1}, [[]], True, -1, 10**400], ids=lambda value: repr(value)[:9])
@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_odd_values_end_in_a_report_or_in_one_line(shared: Path, tool: Tool, value: Any) -> None:
    for row in [row for row in tool.rows if row.ours][::4]:
        name, text = file_of(tool, replace(row, example=value))
        try:
            assert report(imported(shared, name, text))
        except ValueError as error:
            assert len(str(error).splitlines()) == 1 and name in str(error)


def test_names_of_options_are_there_once() -> None:
    for tool in TOOLS:
        names = [row.name for row in tool.rows]
        assert sorted(set(names)) == sorted(names)


def test_every_key_of_ours_in_the_tables_is_one_or_will_be() -> None:
    coming = {
        *("data.buckets", "data.upscale", "data.concepts[].resolution", "data.cache_dir", "data.cache_variants"),
        *("data.mask_outside", "prior.mode", "prior.caption", "adapter.start", "base.adapters"),
    }
    assert {key for _, row in ROWS for key in row.ours if not has_field(key)} <= coming


def test_the_guide_has_these_tables() -> None:
    """If not: python -m benchmarks.options_of_trainers."""
    assert page_of(PAGE.read_text()) == PAGE.read_text()
    for _, row in ROWS:
        assert f"`{row.name}`" in PAGE.read_text()


# kohya

KOHYA = """
[model_arguments]
pretrained_model_name_or_path = "runwayml/stable-diffusion-v1-5"

[dataset_arguments]
train_data_dir = "img"
resolution = "1024,768"
enable_bucket = true

[training_arguments]
output_dir = "out"
output_name = "robot"
max_train_epochs = 10
train_batch_size = 2
gradient_accumulation_steps = 2
network_module = "lycoris.kohya"
network_dim = 16
network_alpha = 8
network_args = ["algo=lora", "dora_wd=True", "conv_dim=8", "conv_alpha=4"]
unet_lr = 1e-4
text_encoder_lr = [5e-5, 0]
lr_scheduler = "cosine"
lr_warmup_steps = 0.1
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.1", "betas=0.9,0.99"]
noise_offset = 0.05
color_aug = false
mixed_precision = "bf16"
sample_prompts = "prompts.txt"
sample_every_n_epochs = 2
save_every_n_steps = 100
save_last_n_steps = 300
wandb_api_key = "hunter2"
frobnicate = 3
"""


def test_a_training_toml_of_kohya(folder: Path) -> None:
    found = imported(folder, "robot.toml", KOHYA)
    settings = found.settings
    assert settings["optim.steps"] == 10 * math.ceil(math.ceil(4 * 3 / 2) / 2)
    assert settings["optim.warmup_steps"] == 3
    assert settings["preview.every"] == 2 * 3
    assert settings["checkpoint.every"] == 100 and settings["checkpoint.keep"] == 3
    assert settings["data.instance_dir"] == "img"
    assert settings["data.resolution"] == 888  # the side of a square of 1024 x 768
    assert settings["data.buckets"] is True and settings["data.upscale"] is True
    assert settings["output_dir"] == "out/robot"
    assert settings["adapter.rank"] == 16 and settings["adapter.alpha"] == 8
    assert settings["adapter.use_dora"] is True and settings["adapter.target_modules"] == "all"
    assert list(settings["adapter.rank_pattern"].values()) == [8]
    assert settings["adapter.train_text_encoder"] == ["text_encoder"]
    assert settings["optim.text_encoder_learning_rate"] == {"text_encoder": 5e-5}
    assert settings["optim.weight_decay"] == 0.1 and settings["optim.min_snr_gamma"] is None
    assert settings["preview.prompts"] == [
        {"prompt": "a robot", "negative": "bad, worse", "seed": 7, "guidance_scale": 3.5, "steps": 12},
        {"prompt": "a car", "size": [768, 512]},
        "a bus",
    ]
    assert settings["loss.noise_offset"] == 0.05
    assert line(found, "training_arguments.color_aug").answer.kind == "needless"
    assert line(found, "training_arguments.frobnicate").answer.kind == "unknown"
    said = report(found)
    assert "hunter2" not in said and "frobnicate: 3 -> not known here" in said
    assert found.missing == {}


def test_what_kohya_leaves_unsaid_is_as_kohya_does_it(folder: Path) -> None:
    settings = imported(folder, "a.toml", 'pretrained_model_name_or_path = "a/b"\ntrain_data_dir = "img"\n').settings
    assert settings["adapter.rank"] == 4 and settings["adapter.alpha"] == 1
    assert settings["adapter.use_dora"] is False and settings["adapter.train_text_encoder"] is True
    assert settings["optim.steps"] == 1600 and settings["optim.learning_rate"] == 2e-6
    assert settings["optim.lr_scheduler"] == "constant" and settings["optim.min_snr_gamma"] is None


DATASET = """
[general]
caption_extension = ".txt"
num_repeats = 2
shuffle_caption = true

[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = "plain"
  class_tokens = "zqx robot"
  num_repeats = 10
  caption_dropout_rate = 0.1

  [[datasets.subsets]]
  image_dir = 'C:\\pictures\\reg'
  class_tokens = "robot"
  is_reg = true
  keep_tokens = 1
"""


def test_a_dataset_toml_of_kohya_says_nothing_of_training(folder: Path) -> None:
    found = imported(folder, "data.toml", DATASET)
    assert found.data()["data"]["concepts"] == [
        {"dir": "plain", "prompt": "zqx robot", "repeats": 10, "caption_dropout": 0.1},
        {"dir": "C:\\pictures\\reg", "prompt": "robot", "role": "class", "repeats": 2},
    ]
    assert found.settings["data.captions.shuffle"] is True
    assert found.settings["data.captions.keep_tokens"] == 2  # that of the folder that is learnt
    assert line(found, "datasets[0].subsets[1].keep_tokens").answer.kind == "lost"
    assert found.settings["data.resolution"] == 512
    assert found.settings["optim.batch_size"] == 2  # half of it is the class's there
    assert "adapter.rank" not in found.settings and "optim.steps" not in found.settings
    assert found.missing == {"data.concepts[1].dir": "C:\\pictures\\reg"}


@pytest.mark.parametrize(("batch", "size", "steps"), [(4, 2, 100), (1, 1, 50), (3, 3, 50)])
def test_class_pictures_stand_beside_a_batch_here(folder: Path, batch: int, size: int, steps: int) -> None:
    """Either way as many pictures of the subject are seen: batch x steps / 2."""
    text = 'pretrained_model_name_or_path = "a/b"\ndataset_config = "data.toml"\nmax_train_steps = 100\n' + (
        f"train_batch_size = {batch}\n"
    )
    (folder / "data.toml").write_text(DATASET.replace("batch_size = 4", ""))
    settings = imported(folder, "a.toml", text).settings
    assert (settings["optim.batch_size"], settings["optim.steps"]) == (size, steps)
    assert size * steps == batch * 100 / 2


def test_epochs_of_kohya_count_the_pictures_and_their_class(folder: Path) -> None:
    text = 'pretrained_model_name_or_path = "a/b"\ndataset_config = "data.toml"\nmax_train_epochs = 3\n'
    (folder / "data.toml").write_text(DATASET)
    found = imported(folder, "a.toml", text)
    assert found.settings["optim.steps"] == 3 * math.ceil(5 * 10 * 2 / 4)
    assert line(found, "dataset_config").answer.kind == "needless"


def test_masks_are_no_pictures_of_an_epoch(folder: Path) -> None:
    Image.new("L", (8, 8)).save(folder / "plain" / "0-masklabel.png")
    (folder / "data.toml").write_text(DATASET[: DATASET.index("  [[datasets.subsets]]\n  image_dir = 'C:")])
    text = 'pretrained_model_name_or_path = "a/b"\ndataset_config = "data.toml"\nmax_train_epochs = 1\n'
    assert imported(folder, "a.toml", text).settings["optim.steps"] == math.ceil(5 * 10 / 4)


def test_each_dataset_may_have_a_size_of_its_own(folder: Path) -> None:
    """As sd-scripts' own example has it: the same pictures at two sizes."""
    text = DATASET + "\n[[datasets]]\nresolution = [768, 768]\n  [[datasets.subsets]]\n  image_dir = 'plain'\n"
    concepts = imported(folder, "data.toml", text).data()["data"]["concepts"]
    assert [concept["resolution"] for concept in concepts] == [512, 512, 768]


def test_epochs_of_pictures_that_are_not_here_are_yours_to_set(folder: Path) -> None:
    found = imported(folder, "a.json", {"train_data_dir": "/not/here", "max_train_epochs": 3, "lr_warmup_steps": 0.1})
    assert "optim.steps" not in found.settings
    answer = line(found, "max_train_epochs").answer
    assert answer.kind == "lost" and "/not/here" in answer.says
    assert line(found, "lr_warmup_steps").answer.kind == "lost"
    assert found.missing == {"data.instance_dir": "/not/here"}


@pytest.mark.parametrize("name", ["DAdaptAdam", "prodigyplus.ProdigyPlusScheduleFree"])
def test_a_factor_is_no_learning_rate(folder: Path, name: str) -> None:
    found = imported(folder, "a.json", {"network_dim": 8, "optimizer_type": name, "learning_rate": 1.0, "unet_lr": 1.0})
    assert "optim.learning_rate" not in found.settings
    assert line(found, "optimizer_type").answer.kind == "lost" and line(found, "unet_lr").answer.kind == "lost"


OF_PRODIGY = {
    **{"optimizer_type": "prodigyopt.Prodigy", "network_dim": 8, "unet_lr": 0.5, "scale_weight_norms": 1},
    "optimizer_args": ["d_coef=2", "betas=0.9,0.99", "decouple=True", "use_bias_correction=True", "foo=1"],
}


def test_prodigy_of_kohya_does_what_it_did_there(folder: Path) -> None:
    """What its arguments leave unsaid is as its class has it, not as we would."""
    found = imported(folder, "a.json", OF_PRODIGY | {"text_encoder_lr": 0.5, "lr_scheduler": "cosine"})
    settings = found.settings
    assert settings["optim.optimizer"] == "prodigy" and settings["optim.learning_rate"] == 0.5
    assert settings["optim.optimizer_options"] == {
        **{"use_bias_correction": True, "safeguard_warmup": False, "d_coef": 2, "betas": [0.9, 0.99], "decouple": True},
    }
    assert settings["optim.weight_decay"] == 0 and settings["optim.max_weight_norm"] == 1
    assert settings["adapter.train_text_encoder"] is True
    assert "optim.text_encoder_learning_rate" not in settings
    assert line(found, "optimizer_args.foo").answer.kind == "lost"
    assert line(found, "optimizer_args.d_coef").answer.kind == "taken"
    config = TrainConfig.model_validate(found.data() | {"data": {"instance_dir": folder / "plain"}})
    check_optimizer(config.optim)


def test_a_schedule_beside_schedule_free_is_left_out_and_its_own_warm_up_is_taken(folder: Path) -> None:
    data = {"network_dim": 8, "optimizer_type": "AdamWScheduleFree", "max_train_steps": 100, "lr_scheduler": "cosine"}
    found = imported(folder, "a.json", data | {"optimizer_args": ["warmup_steps=10", "weight_decay=0.01"]})
    assert found.settings["optim.optimizer"] == "schedulefree" and found.settings["optim.warmup_steps"] == 10
    assert found.settings["optim.weight_decay"] == 0.01
    assert "optim.lr_scheduler" not in found.settings
    answer = line(found, "lr_scheduler").answer
    assert answer.kind == "lost" and "whose rate stays; expected null" in answer.says


def test_adafactor_of_kohya_has_no_rate_unless_relative_step_is_off(folder: Path) -> None:
    data = {"network_dim": 8, "optimizer_type": "AdaFactor", "unet_lr": 1e-4}
    assert "optim.learning_rate" not in imported(folder, "a.json", data).settings
    off = imported(folder, "a.json", data | {"optimizer_args": ["relative_step=False", "scale_parameter=False"]})
    assert off.settings["optim.optimizer"] == "adafactor" and off.settings["optim.learning_rate"] == 1e-4
    assert off.settings["optim.optimizer_options"] == {"scale_parameter": False}


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        *((name, None) for name in ("AdamW", "ADAM", "PagedAdamW32bit")),
        *((name, "adamw8bit") for name in ("AdamW8bit", "adam8bit", "adamw8", "ADAMW_8BIT", "PagedAdamW8bit")),
        *((name, "prodigy") for name in ("prodigy", "PRODIGY", "prodigyopt.Prodigy", "prodigy8bit")),
        *((name, "schedulefree") for name in ("AdamWScheduleFree", "SCHEDULE_FREE_ADAMW")),
        *((name, "adafactor") for name in ("AdaFactor", "ADAFACTOR", "adafactor")),
        *((name, "lion") for name in ("Lion", "LION_8BIT", "PagedLion8bit", "lion")),
        *((name, "came") for name in ("CAME", "came_pytorch.CAME", "CAME_8BIT")),
    ],
)
def test_names_of_optimisers_and_options_that_their_classes_take(folder: Path, name: str, ours: str | None) -> None:
    found = imported(folder, "a.json", {"network_dim": 8, "optimizer_type": name})
    assert found.settings.get("optim.optimizer") == ours
    kind = OPTIMISERS[ours or "adamw"]
    if kind.package != "bitsandbytes":
        known = inspect.signature(getattr(importlib.import_module(kind.module), kind.class_name).__init__).parameters
        assert set(OPTIONS[kind.name]) <= set(known) - set(kind.fixed)
    assert set(OPTIONS) == set(OPTIMISERS)


@pytest.mark.parametrize(
    "name", ["RAdamScheduleFree", "SGDNesterov", "DAdaptLion", "PRODIGY_PLUS_SCHEDULE_FREE", "LION_ADV", "automagic"]
)
def test_an_optimiser_that_is_not_here_is_said(folder: Path, name: str) -> None:
    found = imported(folder, "a.json", {"network_dim": 8, "optimizer_type": name})
    assert line(found, "optimizer_type").answer.kind == "lost" and "optim.optimizer" not in found.settings


def test_the_average_of_one_trainer_is_that_of_one_step(folder: Path) -> None:
    data = {"training_method": "LORA", "ema": "GPU", "ema_decay": 0.9, "ema_update_step_interval": 5}
    assert imported(folder, "a.json", data).settings["optim.ema_decay"] ** 5 == pytest.approx(0.9)
    assert "optim.ema_decay" not in imported(folder, "a.json", data | {"ema": "OFF"}).settings


def test_an_optimiser_of_one_trainer_with_every_key_of_its_file(folder: Path) -> None:
    """Its files name all arguments of all optimisers, most of them null."""
    optimiser = {
        **{"optimizer": "CAME", "beta1": 0.9, "beta2": 0.999, "beta3": 0.9995, "eps": 1e-30, "eps2": 1e-16},
        **{"amsgrad": False, "d0": None, "weight_decay": 0.02, "decouple": None, "nesterov": False},
    }
    found = imported(folder, "a.json", {"training_method": "LORA", "optimizer": optimiser, "learning_rate": 1e-4})
    assert found.settings["optim.optimizer"] == "came" and found.settings["optim.weight_decay"] == 0.02
    options = {"betas": [0.9, 0.999, 0.9995], "eps": [1e-30, 1e-16]}
    assert found.settings["optim.optimizer_options"] == options
    lost = [
        one.entry.key for one in found.lines if one.answer.kind == "lost" and one.entry.key.startswith("optimizer.")
    ]
    assert lost == []
    config = TrainConfig.model_validate(found.data() | {"data": {"instance_dir": folder / "plain"}})
    check_optimizer(config.optim)


def test_optimisers_of_diffusers(folder: Path) -> None:
    command = "accelerate launch train_dreambooth_lora_flux.py --rank=4 --learning_rate=1.0 "
    found = imported(folder, "run.sh", command + "--optimizer=prodigy --adam_beta2=0.99")
    assert found.settings["optim.optimizer"] == "prodigy" and found.settings["optim.learning_rate"] == 1.0
    options = found.settings["optim.optimizer_options"]
    assert options["betas"] == [0.9, 0.99] and options["safeguard_warmup"] is True
    assert imported(folder, "run.sh", command + "--use_8bit_adam").settings["optim.optimizer"] == "adamw8bit"


def test_the_file_that_its_gui_saves(folder: Path) -> None:
    data = {
        **{"LoRA_type": "Standard", "conv_dim": 16, "conv_alpha": 8, "network_dim": 32, "network_alpha": 16},
        **{"train_data_dir": "img", "epoch": 10, "max_train_steps": 0, "train_batch_size": 4, "lr_warmup": 10},
        **{"optimizer": "AdamW8bit", "optimizer_args": "weight_decay=0.05", "unet_lr": 1e-4, "text_encoder_lr": 0},
        **{"max_resolution": "512,512", "seed": "", "keep_tokens": "0", "lr_scheduler": "cosine", "clip_skip": "1"},
    }
    found = imported(folder, "gui.json", data)
    settings = found.settings
    assert settings["optim.steps"] == 10 * 3 and settings["optim.warmup_steps"] == 3
    assert settings["adapter.target_modules"] == "all-linear" and "adapter.rank_pattern" not in settings
    assert settings["adapter.train_text_encoder"] is False
    assert settings["optim.weight_decay"] == 0.05 and "optim.seed" not in settings
    assert found.tool.name == "kohya sd-scripts"


def test_flux_of_kohya_is_a_transformer_beside_a_base(folder: Path) -> None:
    data = {
        **{"network_module": "networks.lora_flux", "pretrained_model_name_or_path": "flux1-dev.safetensors"},
        **{"ae": "ae.safetensors", "timestep_sampling": "shift", "discrete_flow_shift": 3.1582, "sigmoid_scale": 1.5},
    }
    found = imported(folder, "flux.json", data)
    settings = found.settings
    assert settings["model"] == "black-forest-labs/FLUX.1-dev"
    assert settings["base.transformer"] == "flux1-dev.safetensors" and settings["base.vae"] == "ae.safetensors"
    assert (settings["loss.timesteps.density"], settings["flow.shift"], settings["loss.timesteps.std"]) == (
        "logit_normal",
        3.1582,
        1.5,
    )
    assert settings["adapter.train_text_encoder"] == ["text_encoder"]
    assert {"base.transformer", "base.vae"} <= set(found.missing)


def test_flux_of_kohya_draws_timesteps_evenly_where_nothing_is_said(folder: Path) -> None:
    settings = imported(folder, "flux.json", {"network_module": "networks.lora_flux"}).settings
    assert settings["loss.timesteps.density"] == "uniform" and settings["flow.shift"] == 3.0


FLUX = {"network_module": "networks.lora_flux"}
SD3 = {"network_module": "networks.lora_sd3"}
HUBER = {"loss_type": "huber", "huber_c": 0.2}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            {"noise_offset": 0.05, "noise_offset_random_strength": True},
            {"noise_offset": 0.05, "noise_offset_random": True},
        ),
        ({"noise_offset": 0.05, "noise_offset_type": "Multires", "noise_offset_random_strength": True}, {}),
        ({**FLUX, "noise_offset": 0.05, "min_timestep": 100, "zero_terminal_snr": True}, {}),
        ({"min_timestep": 100, "max_timestep": 500}, {"timesteps.min": 100, "timesteps.max": 500}),
        ({"min_timestep": 0, "max_timestep": 1000}, {}),
        ({"min_timestep": 500, "max_timestep": 500}, {"timesteps.max": 500}),  # ours has none between
        ({**SD3, "max_timestep": 500, "ip_noise_gamma": 0.1}, {"timesteps.max": 500, "timesteps.density": "uniform"}),
        (
            {**HUBER, "huber_schedule": "constant", "huber_scale": 2},
            {"kind": "huber", "huber_c": 0.4, "huber_schedule": "constant"},
        ),
        ({**HUBER, "huber_scale": 2}, {"kind": "huber", "huber_c": 0.2}),
        ({**HUBER, "loss_type": "smooth_l1"}, {}),
        ({**HUBER, "loss_type": "l2"}, {"kind": "mse"}),
        ({"debiased_estimation_loss": True}, {"weighting": "debiased"}),
        ({"debiased_estimation_loss": True, "v_parameterization": True}, {}),
        ({"debiased_estimation_loss": True, "min_snr_gamma": 5}, {}),
        ({"zero_terminal_snr": True, "v_parameterization": True}, {"zero_terminal_snr": True}),
        ({"zero_terminal_snr": True}, {}),
    ],
)
def test_losses_and_noise_of_kohya(folder: Path, data: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = imported(folder, "a.json", {"network_dim": 4, "ip_noise_gamma": 0.1, **data}).settings
    found = {key.removeprefix("loss."): value for key, value in settings.items() if key.startswith("loss.")}
    if data.get("network_module") == "networks.lora_flux":
        expected = {**expected, "timesteps.density": "uniform"}
    perturbed = {} if "sd3" in str(data) else {"input_perturbation": 0.1}
    assert found == {**perturbed, **expected}


# ai-toolkit

JOB = """
job: extension
config:
  name: my_first_lora
  process:
    - type: sd_trainer
      training_folder: output
      device: cuda:0
      trigger_word: zqx
      network: {type: lora, linear: 16, linear_alpha: 16}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4, push_to_hub: false}
      datasets:
        - folder_path: plain
          caption_ext: txt
          caption_dropout_rate: 0.05
          default_caption: a photo of [trigger]
          shuffle_tokens: false
          resolution: [512, 768]
          cache_latents_to_disk: true
          mask_path: masks
          mask_min_value: 0.1
      train:
        batch_size: 1
        steps: 2000
        gradient_accumulation_steps: 4
        train_unet: true
        train_text_encoder: false
        noise_scheduler: flowmatch
        optimizer: adamw8bit
        lr: 1e-4
        ema_config: {use_ema: true, ema_decay: 0.99}
        dtype: bf16
      model: {name_or_path: black-forest-labs/FLUX.1-dev, is_flux: true, quantize: true}
      sample:
        sample_every: 250
        prompts: ["[trigger] holding a sign"]
        neg: ""
        seed: 42
        guidance_scale: 4
        sample_steps: 20
meta: {name: "[name]", version: "1.0"}
"""


def test_a_job_of_ai_toolkit(folder: Path) -> None:
    found = imported(folder, "job.yaml", JOB)
    settings = found.settings
    assert settings["optim.steps"] == 500 and settings["optim.gradient_accumulation"] == 4
    assert settings["checkpoint.every"] == math.ceil(250 / 4) and settings["checkpoint.keep"] == 4
    assert settings["optim.learning_rate"] == 1e-4 and settings["optim.mixed_precision"] == "bf16"
    assert settings["device"] == "cuda:0"
    assert settings["optim.gradient_checkpointing"] is True
    assert settings["data.trigger"] == "zqx" and settings["data.concepts[0].prompt"] == "a photo of {}"
    assert settings["data.concepts[0].caption_dropout"] == 0.05
    assert settings["preview.prompts"] == ["zqx holding a sign"]
    assert settings["data.resolution"] == [512, 768] and settings["data.cache_dir"] == "cache"
    assert settings["data.mask_outside"] == 0.1
    assert (settings["loss.timesteps.density"], settings["flow.shift"]) == ("logit_normal", 1.0)
    assert settings["adapter.use_dora"] is False and settings["adapter.target_modules"] == "all-linear"
    assert settings["output_dir"] == "output/my_first_lora"
    assert settings["optim.optimizer"] == "adamw8bit" and settings["optim.ema_decay"] == 0.99
    assert line(found, "model.quantize").answer.kind == "lost"
    assert line(found, "save.push_to_hub").answer.kind == "needless"


def test_accumulation_that_ai_toolkit_counts_as_one_step_divides_nothing(folder: Path) -> None:
    text = JOB.replace("gradient_accumulation_steps: 4", "gradient_accumulation: 4")
    settings = imported(folder, "job.yaml", text).settings
    assert settings["optim.steps"] == 2000 and settings["optim.gradient_accumulation"] == 4


def test_every_other_step_of_ai_toolkit_is_the_class_s(folder: Path) -> None:
    text = JOB.replace("mask_min_value: 0.1", "mask_min_value: 0.1\n        - {folder_path: reg, is_reg: true}")
    settings = imported(folder, "job.yaml", text.replace("steps: 4", "steps: 1")).settings
    assert settings["optim.steps"] == 1000
    assert settings["data.concepts[1].role"] == "class"


def test_dora_of_ai_toolkit(folder: Path) -> None:
    text = JOB.replace("type: lora, linear: 16, linear_alpha: 16", "type: dora, rank: 8, alpha: 4")
    settings = imported(folder, "job.yaml", text).settings
    assert settings["adapter.use_dora"] is True
    assert settings["adapter.rank"] == 8 and settings["adapter.alpha"] == 4


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("noise_scheduler: ddpm, content_or_style: style", {"density": "beta", "alpha": 1 / 3}),
        ("noise_scheduler: ddpm, content_or_style: content", {"density": "beta", "beta": 1 / 3}),
        ("timestep_type: linear, content_or_style: content", {"density": "beta", "beta": 1 / 3}),
        ("timestep_type: sigmoid, content_or_style: content", {"density": "logit_normal"}),
        ("timestep_type: shift, content_or_style: balanced", {"density": "uniform"}),
        ("timestep_type: linear, min_denoising_steps: 100", {"density": "uniform", "max": 900}),
        ("noise_scheduler: ddpm, max_denoising_steps: 400", {"min": 600}),
        ("timestep_type: shift, max_denoising_steps: 400", {"density": "uniform"}),
    ],
)
def test_timesteps_of_ai_toolkit(folder: Path, train: str, expected: dict[str, Any]) -> None:
    process = f"{{datasets: [{{folder_path: plain}}], train: {{noise_scheduler: flowmatch, {train}}}}}"
    if "ddpm" in train:
        process = process.replace("noise_scheduler: flowmatch, ", "")
    found = imported(folder, "job.yaml", f"job: extension\nconfig: {{name: x, process: [{process}]}}\n").settings
    assert {key: value for key, value in found.items() if key.startswith("loss.timesteps.")} == {
        f"loss.timesteps.{key}": value for key, value in expected.items()
    }


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("noise_offset: 0.05", {"noise_offset": 0.05}),
        ("random_noise_shift: 0.05", {"noise_offset": 0.05}),
        ("noise_offset: 0.05, random_noise_shift: 0.1", {"noise_offset": 0.05}),
        ("loss_type: pseudo_huber", {"kind": "huber", "huber_c": 0.01, "huber_schedule": "constant"}),
        ("loss_type: wavelet", {}),
    ],
)
def test_losses_and_noise_of_ai_toolkit(folder: Path, train: str, expected: dict[str, Any]) -> None:
    process = f"{{datasets: [{{folder_path: plain}}], train: {{{train}}}}}"
    found = imported(folder, "job.yaml", f"job: extension\nconfig: {{name: x, process: [{process}]}}\n").settings
    assert {key: value for key, value in found.items() if key.startswith("loss.")} == {
        f"loss.{key}": value for key, value in expected.items()
    }


def test_samples_of_ai_toolkit_keep_what_each_says(folder: Path) -> None:
    job = yaml.safe_load(JOB)
    sample = job["config"]["process"][0]["sample"]
    sample |= {"neg": "blurry", "width": 1024, "height": 512, "samples": [{"prompt": "[trigger] x", "seed": 3}]}
    del sample["prompts"]
    job["config"]["process"][0]["logging"] = {"use_wandb": True, "project_name": "robots", "log_every": 10}
    found = imported(folder, "job.yaml", yaml.safe_dump(job))
    assert found.settings["preview.prompts"] == [
        {"prompt": "zqx x", "negative": "blurry", "size": [1024, 512], "seed": 3}
    ]
    assert found.settings["logging.trackers"] == ["tensorboard", "wandb"]
    assert found.settings["logging.project"] == "robots"


# OneTrainer

PRESET = {
    **{"training_method": "LORA", "model_type": "FLUX_DEV_1", "base_model_name": "black-forest-labs/FLUX.1-dev"},
    **{
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "epochs": 20,
        "learning_rate": 3e-4,
        "resolution": "512, 768",
    },
    **{
        "learning_rate_warmup_steps": 20,
        "train_dtype": "BFLOAT_16",
        "output_model_destination": "models/robot.safetensors",
    },
    **{"transformer": {"train": True, "weight_dtype": "NFLOAT_4"}, "text_encoder": {"train": False}},
    **{"text_encoder_2": {"train": True, "learning_rate": 1e-5}, "lora_decompose": True, "lora_rank": 8},
    **{"timestep_distribution": "LOGIT_NORMAL", "noising_bias": 0.5, "noising_weight": 0.25},
    **{"dynamic_timestep_shifting": True, "optimizer": {"optimizer": "ADAMW_8BIT", "weight_decay": 0.01}},
    **{"secrets": {"huggingface_token": "hunter2"}, "learning_rate_scaler": "BOTH", "ema": "OFF"},
    **{"masked_training": True, "unmasked_weight": 0.05},
}
CONCEPTS = [
    {
        "path": "plain",
        "balancing": 3.0,
        "loss_weight": 0.5,
        "text": {"prompt_source": "filename", "tag_delimiter": ";"},
    },
    {"path": "x", "enabled": False},
    {"path": "reg", "type": "VALIDATION", "image": {"enable_random_flip": True}},
]


def test_a_configuration_of_one_trainer(folder: Path) -> None:
    found = imported(folder, "config.json", {**PRESET, "concepts": CONCEPTS})
    settings = found.settings
    assert settings["optim.steps"] == int(5 * 3 // 2 / 2 * 20)
    assert settings["optim.warmup_steps"] == 10
    assert settings["optim.lr_scheduler"] == "constant_with_warmup"
    assert settings["optim.learning_rate"] == pytest.approx(3e-4 * math.sqrt(4))
    assert settings["adapter.train_text_encoder"] == ["text_encoder_2"]
    assert settings["optim.text_encoder_learning_rate"] == {"text_encoder_2": 1e-5}
    assert settings["adapter.use_dora"] is True and settings["adapter.alpha"] == 1
    assert settings["adapter.target_modules"] == "all"
    assert (settings["loss.timesteps.mean"], settings["loss.timesteps.std"], settings["flow.shift"]) == (
        0.5,
        1.25,
        None,
    )
    assert settings["output_dir"] == "runs/robot"
    assert found.data()["data"]["concepts"] == [
        {"dir": "plain", "repeats": 3, "weight": 0.5},
        {"dir": "reg", "role": "validation"},
    ]
    assert settings["data.captions.from_file_name"] is True and settings["data.captions.separator"] == ";"
    assert settings["data.flip"] is True and settings["data.upscale"] is True
    assert settings["data.resolution"] == [512, 768] and settings["data.mask_outside"] == 0.05
    assert "hunter2" not in report(found)


XL = {"training_method": "LORA", "model_type": "STABLE_DIFFUSION_XL_10_BASE", "concepts": [{"path": "plain"}]}
V = {"model_type": "STABLE_DIFFUSION_21"}
BETA = {"timestep_distribution": "BETA", "noising_weight": 0.8, "noising_bias": 1.0}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"loss_weight_fn": "DEBIASED_ESTIMATION"}, {"weighting": "debiased"}),
        ({**V, "loss_weight_fn": "DEBIASED_ESTIMATION"}, {}),
        ({"offset_noise_weight": 0.05, "perturbation_noise_weight": 0.1}, {"noise_offset": 0.05}),
        ({"offset_noise_weight": 0.05, "generalized_offset_noise": True}, {}),
        ({**V, "rescale_noise_scheduler_to_zero_terminal_snr": True}, {"zero_terminal_snr": True}),
        ({"rescale_noise_scheduler_to_zero_terminal_snr": True}, {}),
        ({"min_noising_strength": 0.1, "max_noising_strength": 0.9}, {"timesteps.min": 100, "timesteps.max": 900}),
        ({"min_noising_strength": 0.1, "timestep_shift": 3.0}, {"timesteps.bias": 3.0}),
        (BETA, {"timesteps.density": "beta", "timesteps.alpha": 0.8, "timesteps.beta": 1.0}),
        (
            {"timestep_distribution": "HEAVY_TAIL", "noising_weight": 0.5},
            {"timesteps.density": "mode", "timesteps.mode_scale": 0.5},
        ),
        ({"timestep_distribution": "COS_MAP"}, {}),
        ({"timestep_distribution": "UNIFORM"}, {}),
    ],
)
def test_losses_and_noise_of_one_trainer(folder: Path, data: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = imported(folder, "config.json", {**XL, **data}).settings
    assert {key: value for key, value in settings.items() if key.startswith("loss.")} == {
        f"loss.{key}": value for key, value in expected.items()
    }
    assert settings.get("flow.shift") is None


def test_samples_of_one_trainer_keep_what_each_says(folder: Path) -> None:
    first = {"prompt": "a", "negative_prompt": "", "width": 512, "height": 768, "seed": 42, "random_seed": True}
    second = {"prompt": "b", "negative_prompt": "c", "seed": 7, "diffusion_steps": 9, "cfg_scale": 2.5}
    off = {"prompt": "d", "enabled": False}
    found = imported(folder, "config.json", {**PRESET, "concepts": CONCEPTS, "samples": [first, second, off]})
    assert found.settings["preview.prompts"] == [
        {"prompt": "a", "size": [512, 768]},
        {"prompt": "b", "negative": "c", "seed": 7, "steps": 9, "guidance_scale": 2.5},
    ]


def test_concepts_of_one_trainer_may_lie_in_a_file_of_their_own(folder: Path) -> None:
    (folder / "concepts.json").write_text(json.dumps(CONCEPTS))
    found = imported(folder, "config.json", {**PRESET, "concept_file_name": "concepts.json"})
    assert found.settings["data.concepts[0].dir"] == "plain"


def test_a_preset_without_concepts_asks_for_a_folder(folder: Path) -> None:
    found = imported(folder, "preset.json", PRESET)
    assert found.settings["data.instance_dir"] == "pictures" and "data.instance_dir" in found.missing
    assert "optim.steps" not in found.settings
    assert "put yours there" in report(found)


@pytest.mark.parametrize(
    ("concept", "repeats"),
    [({"balancing": 2.0}, 2), ({"balancing": 15.0, "balancing_strategy": "SAMPLES"}, 3), ({"balancing": 0.5}, None)],
)
def test_balancing_of_one_trainer(folder: Path, concept: dict[str, Any], repeats: int | None) -> None:
    found = imported(folder, "config.json", {**PRESET, "concepts": [{"path": "plain", **concept}]})
    assert found.settings.get("data.concepts[0].repeats") == repeats


# diffusers

COMMAND = """
export MODEL_NAME="stabilityai/stable-diffusion-xl-base-1.0"
accelerate launch train_dreambooth_lora_sdxl.py \\
  --pretrained_model_name_or_path=$MODEL_NAME \\
  --instance_data_dir="plain" --output_dir=lora --instance_prompt="a photo of sks dog" \\
  --train_batch_size=1 --gradient_accumulation_steps=4 --learning_rate=1e-4 --scale_lr \\
  --lr_scheduler="cosine" --lr_warmup_steps=20 --num_train_epochs=100 --use_dora \\
  --with_prior_preservation --class_data_dir=class --class_prompt="a photo of a dog" --num_class_images=50 \\
  --validation_prompt="a sks dog" --hub_token=hunter2 --mixed_precision="fp16"
"""


def test_a_command_of_diffusers(folder: Path) -> None:
    found = imported(folder, "run.sh", COMMAND)
    settings = found.settings
    assert settings["model"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert settings["optim.steps"] == 100 * 2 and settings["optim.learning_rate"] == pytest.approx(4e-4)
    assert settings["data.resolution"] == 1024 and settings["data.crop"] == "random"
    assert settings["adapter.use_dora"] is True and settings["adapter.alpha"] == settings["adapter.rank"] == 4
    assert settings["adapter.target_modules"] == "attention" and settings["data.buckets"] is False
    assert settings["prior.class_prompt"] == "a photo of a dog" and settings["prior.class_images"] == 50
    assert settings["preview.prompts"] == ["a sks dog"] and settings["optim.weight_decay"] == 1e-4
    assert "hunter2" not in report(found)


# what is written


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("robot.toml", KOHYA),
        ("data.toml", DATASET),
        ("job.yaml", JOB),
        ("config.json", json.dumps({**PRESET, "concepts": CONCEPTS[:1]})),
        ("run.sh", COMMAND),
    ],
)
def test_what_is_written_is_a_configuration_where_the_folders_are(folder: Path, name: str, content: str) -> None:
    content = content.replace("C:\\pictures\\reg", "reg")
    (folder / "deep").mkdir()
    for output in ("out.yaml", "deep/out.yaml"):
        found = imported(folder, name, content, output=output)
        write_config(found, folder / output, source=folder / name)
        config = TrainConfig.from_yaml(folder / output)
        folders = [config.data.instance_dir, *(concept.dir for concept in config.data.concepts)]
        assert all(one is None or one.is_dir() and one.is_relative_to(folder) for one in folders)
        assert found.missing == {}


def test_paths_stay_as_they_are_and_bases_in_files_are_told_from_hub_ids(folder: Path) -> None:
    data = {"pretrained_model_name_or_path": "sd/model.safetensors", "train_data_dir": "/data/img", "network_dim": 8}
    here = imported(folder, "a.json", data)
    assert here.settings["model"] == "./sd/model.safetensors" and here.settings["data.instance_dir"] == "/data/img"
    there = imported(folder, "a.json", data, output="deep/out.yaml")
    assert there.settings["model"] == "../sd/model.safetensors"


def test_what_trainconfig_refuses_is_left_out_with_its_reason(folder: Path) -> None:
    data = {"network_dim": 0, "max_train_steps": 10, "lr_scheduler": "cosine", "lr_warmup_steps": 500}
    found = imported(folder, "a.json", data)
    assert "adapter.rank" not in found.settings and "optim.warmup_steps" not in found.settings
    assert "greater than or equal to 1" in line(found, "network_dim").answer.says
    assert "optim.steps" in line(found, "lr_warmup_steps").answer.says


def test_a_mistake_of_a_key_that_is_missing_takes_out_what_asks_for_it(folder: Path) -> None:
    """`prior.class_dir` without a prompt is refused by the name of the one or of the other."""
    text = COMMAND.replace('--class_prompt="a photo of a dog"', "")
    settings = imported(folder, "run.sh", text).settings
    assert "prior.class_dir" not in settings and settings["prior.class_images"] == 50


# files that are none


BAD = {
    "a list": ("a.json", "[1, 2]", "got a list, expected a training or dataset TOML"),
    "nothing": ("a.yaml", "", "got nothing, expected"),
    "damaged TOML": ("a.toml", "a = = 3", "not valid TOML"),
    "damaged JSON": ("a.json", '{"a": ', "not valid JSON"),
    "damaged YAML": ("a.yaml", "a: [", "not valid YAML"),
    "no trainer's": ("a.toml", 'colour = "red"', "its keys (colour) are no trainer's"),
    "ours": ("a.yaml", "output_dir: runs\ndata: {instance_dir: img}", "a configuration of dora-diffusion already"),
    "bytes": ("a.toml", "\udcff", "not UTF-8 text"),
    "processes that are none": ("a.yaml", "job: x\nconfig: {process: 3}", "config.process: expected a list"),
    "datasets that are none": (
        "a.yaml",
        "job: x\nconfig: {process: [{datasets: {a: 1}}]}",
        "config.process[0].datasets: expected a list of datasets",
    ),
    "a section that is none": (
        "a.yaml",
        "job: x\nconfig: {process: [{train: 3}]}",
        "train: expected `key: value` lines",
    ),
    "subsets that are none": ("a.toml", "[[datasets]]\nsubsets = 3", "datasets[0].subsets: expected a list of tables"),
    "concepts that are none": (
        "a.json",
        '{"training_method": "LORA", "concepts": {"a": 1}}',
        "concepts: expected a list",
    ),
    "keys that are no text": ("a.yaml", "1: 2", "keys that are no text"),
    "quotes": ("a.sh", "python train_dreambooth_lora.py --rank '8", "the command cannot be read"),
    "deep": ("a.json", "[" * 100_000, "not valid JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_no_configuration_is_one_line(tmp_path: Path, case: str) -> None:
    name, content, said = BAD[case]
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        read_config(tmp_path / name, output=tmp_path / "out.yaml")
    assert len(str(caught.value).splitlines()) == 1 and name in str(caught.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_config(tmp_path / "none.toml", output=tmp_path / "out.yaml")


@pytest.mark.parametrize(("name", "expected"), [("cuda", "cuda"), ("CPU", "cpu"), ("cuda:1", "cuda:1")])
def test_devices_are_called_alike(name: str, expected: str) -> None:
    assert values.device(name) == expected


def test_a_device_that_is_not_ours_is_said() -> None:
    with pytest.raises(ValueError, match="got npu, expected cpu, cuda, cuda:N, xpu or mps"):
        values.device("npu")
