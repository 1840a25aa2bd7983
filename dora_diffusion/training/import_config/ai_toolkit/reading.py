"""A job's file -> its keys."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dora_diffusion.training.import_config.records import Entry, Folder, Source


def read(data: Mapping[str, Any], path: Path) -> Source:
    """Every key of a file; of several processes the first."""
    config = data.get("config")
    processes = config.get("process") if isinstance(config, Mapping) else None
    if isinstance(processes, Mapping):
        processes = [processes]
    if not isinstance(processes, list) or not processes or not isinstance(processes[0], Mapping):
        raise ValueError("config.process: expected a list of processes, the first with network, datasets and train")
    process = processes[0]
    datasets = process.get("datasets") or []
    if not isinstance(datasets, list) or not all(isinstance(dataset, Mapping) for dataset in datasets):
        raise ValueError("config.process[0].datasets: expected a list of datasets, each with a folder_path")
    for section in ("network", "train", "model", "save", "sample"):
        if not isinstance(process.get(section) or {}, Mapping):
            raise ValueError(f"config.process[0].{section}: expected `key: value` lines")
    return Source(path, tuple(_entries(data, processes)), tuple(map(_folder, datasets)))


def _entries(data: Mapping[str, Any], processes: list[Any]) -> Iterator[Entry]:
    for key, value in data.items():
        if key != "config":
            yield from _flat(key, key, value)
    for key, value in data["config"].items():
        if key != "process":
            yield from _flat(f"config.{key}", f"config.{key}", value)
    for key, value in processes[0].items():
        if key != "datasets":
            yield from _flat(key, key, value)
    for place, dataset in enumerate(processes[0].get("datasets") or []):
        for key, value in dataset.items():
            yield Entry(f"datasets[{place}].{key}", f"datasets[].{key}", value, (place,))
    for place in range(1, len(processes)):
        yield Entry(f"config.process[{place}]", "config.process[]", "...")


def _flat(key: str, name: str, value: Any) -> Iterator[Entry]:
    if isinstance(value, Mapping) and value:
        for inner, one in value.items():
            yield from _flat(f"{key}.{inner}", f"{name}.{inner}", one)
    else:
        yield Entry(key, name, value)


def _folder(dataset: Mapping[str, Any]) -> Folder:
    repeats = dataset.get("num_repeats", 1)
    path = dataset.get("folder_path") or dataset.get("dataset_path") or ""
    return Folder(str(path), repeats if isinstance(repeats, int) else 1, is_class=dataset.get("is_reg") is True)
