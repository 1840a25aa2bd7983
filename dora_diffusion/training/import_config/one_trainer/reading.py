"""OneTrainer's JSON -> its keys; concepts and samples may lie in files of their own."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dora_diffusion.training.import_config.records import Entry, Folder, Source

_MOST_REPEATS = 1e9
_OUTSIDE = ("concepts", "samples", "optimizer_defaults", "additional_embeddings")


def read(data: Mapping[str, Any], path: Path) -> Source:
    """Every key of a file; concepts and samples from the files that it names, where they are here."""
    concepts = _listed(data, "concepts", "concept_file_name", path)
    used = [concept for concept in concepts if concept.get("enabled", True) is not False]
    samples = _listed(data, "samples", "sample_definition_file_name", path)
    entries = [entry for entry in _flat("", data) if entry.name.split(".")[0] not in _OUTSIDE]
    for name in ("optimizer_defaults", "additional_embeddings"):
        if data.get(name):
            entries.append(Entry(name, name, "..."))
    place = 0
    for number_there, concept in enumerate(concepts):
        if concept in used:
            entries += _of_concept(concept, number_there, place)
            place += 1
        else:
            entries.append(Entry(f"concepts[{number_there}].enabled", "concepts[].enabled", False))
    drawn = [sample for sample in samples if sample.get("enabled", True) is not False]
    if drawn:
        entries += [Entry("samples[].prompt", "samples[].prompt", drawn), *_of_sample(drawn[0])]
    return Source(path, tuple(entries), tuple(_folder(concept) for concept in used))


def _listed(data: Mapping[str, Any], key: str, file_key: str, path: Path) -> list[Mapping[str, Any]]:
    """A list of mappings, in the file or in one that it names."""
    found = data.get(key)
    if found is None and isinstance(data.get(file_key), str) and data[file_key]:
        try:
            found = json.loads((path.parent / data[file_key]).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError):
            found = None
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(item, Mapping) for item in found):
        raise ValueError(f"{key}: expected a list of {key}, each a mapping")
    return found


def _flat(prefix: str, data: Mapping[str, Any]) -> Iterator[Entry]:
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and name not in _OUTSIDE:
            yield from _flat(f"{name}.", value)
        else:
            yield Entry(name, name, value)


def _of_concept(concept: Mapping[str, Any], number_there: int, place: int) -> Iterator[Entry]:
    for entry in _flat("", {key: value for key, value in concept.items() if key != "concept_stats"}):
        yield Entry(f"concepts[{number_there}].{entry.name}", f"concepts[].{entry.name}", entry.value, (place,))


def _of_sample(sample: Mapping[str, Any]) -> Iterator[Entry]:
    """What the first sample says beside its prompt, as an example of all."""
    for key, value in sample.items():
        if key not in {"prompt", "enabled"}:
            yield Entry(f"samples[0].{key}", f"samples[].{key}", value)


def _folder(concept: Mapping[str, Any]) -> Folder:
    balancing = concept.get("balancing", concept.get("repeats", 1))
    count = balancing if isinstance(balancing, (int, float)) and 0 <= balancing < _MOST_REPEATS else 1.0
    is_learnt = concept.get("type", "STANDARD") == "STANDARD" and concept.get("validation_concept") is not True
    samples = count if concept.get("balancing_strategy") == "SAMPLES" else None
    return Folder(str(concept.get("path", "")), count, is_class=not is_learnt, samples=samples)
