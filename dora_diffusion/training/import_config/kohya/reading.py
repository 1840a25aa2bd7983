"""A file of sd-scripts or of its GUI -> its keys; what stands nearer to the pictures comes first."""

import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dora_diffusion.training.import_config.records import Entry, Folder, Source
from dora_diffusion.training.import_config.values import named_arguments

_ARGUMENTS = ("network_args", "optimizer_args", "lr_scheduler_args")


_GUI = {
    "max_resolution": "resolution",
    "epoch": "max_train_epochs",
    "optimizer": "optimizer_type",
    "lora_network_weights": "network_weights",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "sdxl_no_half_vae": "no_half_vae",
    "flux1_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "flux1_cache_text_encoder_outputs_to_disk": "cache_text_encoder_outputs_to_disk",
    **{
        name: f"network_args.{argument}"
        for name, argument in {
            **{name: name for name in ("conv_dim", "conv_alpha", "rank_dropout", "module_dropout", "train_norm")},
            **{name: name for name in ("dora_wd", "bypass_mode", "use_tucker", "use_scalar", "rank_dropout_scale")},
            **{name: name for name in ("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold")},
            **{name: name for name in ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")},
            **{name: name for name in ("decompose_both", "factor", "loraplus_lr_ratio", "train_blocks", "split_qkv")},
            "loraplus_unet_lr_ratio": "loraplus_unet_lr_ratio",
            "loraplus_text_encoder_lr_ratio": "loraplus_text_encoder_lr_ratio",
            "LyCORIS_preset": "preset",
            "use_cp": "use_tucker",
        }.items()
    },
}
"""Names that the GUI gives to sd-scripts' options."""


def read(data: Mapping[str, Any], path: Path) -> Source:
    """Every key of a file, and of the dataset file that it names."""
    found, folders = list(_training_entries(data)), []
    datasets = data if isinstance(data.get("datasets"), list) else _dataset_file(found, path)
    if datasets is not None:
        folders = list(_folders(datasets))
        found += _dataset_entries(datasets)
    reg = next((entry.value for entry in found if entry.name == "reg_data_dir" and not entry.is_empty), None)
    entries = found
    if isinstance(reg, str):
        entries = [_of_class_folder(entry, len(folders)) for entry in found]
        folders.append(Folder(reg, is_class=True))
    tree = next((entry.value for entry in found if entry.name == "train_data_dir" and not entry.is_empty), None)
    return Source(path, tuple(entries), tuple(folders), tree if isinstance(tree, str) else None)


def _training_entries(data: Mapping[str, Any]) -> Iterator[Entry]:
    """Options of the command line; sections of the file are only for its reader, as sd-scripts has it."""
    is_dataset = isinstance(data.get("datasets"), list)
    for key, value in data.items():
        if is_dataset and key in ("general", "datasets"):
            continue
        inner = value.items() if isinstance(value, Mapping) else [(key, value)]
        for name, one in inner:
            shown = f"{key}.{name}" if isinstance(value, Mapping) else name
            yield from _with_arguments(Entry(shown, _GUI.get(name, name), one))


def _with_arguments(entry: Entry) -> Iterator[Entry]:
    """`network_args = ["conv_dim=8"]` is one entry for each of its arguments."""
    if entry.name not in _ARGUMENTS or entry.is_empty or not entry.value:
        yield entry
        return
    try:
        arguments = named_arguments(entry.value)
    except ValueError:
        yield entry
        return
    for name, value in arguments.items():
        yield Entry(f"{entry.key}.{name}", f"{entry.name}.{name}", value)


def _dataset_file(entries: list[Entry], path: Path) -> Mapping[str, Any] | None:
    """The file that `dataset_config` names, if it is here and is TOML or JSON."""
    name = next((entry.value for entry in entries if entry.name == "dataset_config" and not entry.is_empty), None)
    if not isinstance(name, str):
        return None
    try:
        content = Path(path.parent / os.path.expanduser(name)).read_text(encoding="utf-8-sig")
        data = json.loads(content) if name.lower().endswith(".json") else tomllib.loads(content)
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and isinstance(data.get("datasets"), list) else None


def _dataset_entries(data: Mapping[str, Any]) -> Iterator[Entry]:
    """Subset before dataset before [general]: what is nearer to the pictures is believed."""
    number = 0
    for place, dataset in enumerate(_tables(data["datasets"], "datasets")):
        first, shown = number, f"datasets[{place}]"
        for inner, subset in enumerate(_tables(dataset.get("subsets", []), f"{shown}.subsets")):
            for key, value in subset.items():
                yield Entry(f"{shown}.subsets[{inner}].{key}", key, value, (number,))
            number += 1
        for key, value in dataset.items():
            if key != "subsets":
                yield Entry(f"{shown}.{key}", key, value, tuple(range(first, number)))
    for key, value in _table(data.get("general", {}), "general").items():
        yield Entry(f"general.{key}", key, value)


def _folders(data: Mapping[str, Any]) -> Iterator[Folder]:
    general = _table(data.get("general", {}), "general")
    for place, dataset in enumerate(_tables(data["datasets"], "datasets")):
        for subset in _tables(dataset.get("subsets", []), f"datasets[{place}].subsets"):
            own = {**general, **dataset, **subset}
            repeats = own.get("num_repeats", 1)
            yield Folder(
                str(own.get("image_dir", "")),
                repeats if isinstance(repeats, int) else 1,
                is_class=subset.get("is_reg") is True,
            )


def _tables(value: Any, key: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list):
        raise ValueError(f"{key}: expected a list of tables, [[{key}]]")
    return [_table(item, f"{key}[{place}]") for place, item in enumerate(value)]


def _table(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{key}: expected a table of `key = value` lines")
    return value


def _of_class_folder(entry: Entry, number: int) -> Entry:
    """`reg_data_dir` speaks of the folder that comes after the datasets'."""
    return Entry(entry.key, entry.name, entry.value, (number,)) if entry.name == "reg_data_dir" else entry
