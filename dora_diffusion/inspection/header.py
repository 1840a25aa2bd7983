"""What an adapter file is, at a glance: from its header alone, for lists of thousands."""

import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from dora_diffusion.adapters.matching import kind_in_words
from dora_diffusion.formats import format_of, place_of, read_header
from dora_diffusion.formats.bundled_words import words_among
from dora_diffusion.formats.family_detection import family_of
from dora_diffusion.formats.json_metadata import json_object
from dora_diffusion.formats.outline import Entries, file_entries, folder_entries, outline
from dora_diffusion.formats.reading import take_apart
from dora_diffusion.formats.safetensors_reader import (
    MAX_HEADER_BYTES,
    MAX_METADATA,
    MAX_TENSORS,
    checked_header,
)
from dora_diffusion.utils.text import shown, shown_path


@dataclass(frozen=True)
class Structure:
    """What the keys and shapes of a file say.

    Attributes:
        format: the name of its format.
        kind: as `kind_in_words` has it.
        family: the family it is for; empty where its layers and its metadata leave several.
        ranks: its distinct ranks, ascending.
        axis: of its magnitudes: "out", "in", "out/in"; "unclear" where only a base could tell; empty without any.
        layers: how many layers it changes.
        components: the pipeline's parts that it changes.
        words: new words that it bundles.
    """

    format: str
    kind: str
    family: str
    ranks: tuple[int, ...]
    axis: str
    layers: int
    components: tuple[str, ...]
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class DeclaredMetadata:
    """What the metadata of a file say of it: a stranger's words, on one line each and cut where they are long.

    Attributes:
        title, author: of the adapter.
        base: what it was trained on, as its trainer called it.
        triggers: words and phrases to put into a prompt.
        tags: words of its captions and of its maker, the most frequent first.
    """

    title: str = ""
    author: str = ""
    base: str = ""
    triggers: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeaderSummary:
    """An adapter file as its header has it."""

    structure: Structure
    declared: DeclaredMetadata


def summarise_header(path: str | Path, known: MutableMapping[bytes, Structure] | None = None) -> HeaderSummary:
    """What a file is, without reading a tensor.

    Args:
        path: an adapter file, or a folder of PEFT's.
        known: structures that were found before, by what they were found from; grows. Thousands of files share a few,
            and one whose keys, shapes and offsets are byte for byte another's need not be taken apart again.

    Raises:
        ValueError: one line: the file is broken, or no adapter's.
    """
    path, known = place_of(path), {} if known is None else known
    quick = None if path.is_dir() else _split_header(path)
    if quick is not None and (key := _structure_key(quick.tensors, quick.metadata)) in known:
        return _summary(known[key], quick.metadata)
    try:
        entries, metadata = folder_entries(path) if path.is_dir() else _file_entries(path, quick)
        structure = _structure(path, entries, metadata)
    except ValueError as error:
        raise ValueError(f"{shown_path(path)}: {str(error).removeprefix(f'{path}: ')}") from None
    if quick is not None and quick.metadata == metadata:
        known[key] = structure
    return _summary(structure, metadata)


def _summary(structure: Structure, metadata: Mapping[str, str]) -> HeaderSummary:
    """Words that the file itself bundles are the first that trigger it."""
    declared = declared_metadata(metadata)
    triggers = _few([*structure.words, *declared.triggers], _TRIGGERS)
    return HeaderSummary(structure, replace(declared, triggers=triggers) if structure.words else declared)


# The metadata that say how tensors are to be read, or for which family.
_TELLING = (
    *("dora_diffusion.magnitude_axis", "dora_diffusion.family", "ss_network_args", "ot_config"),
    *("lora_adapter_metadata", "ss_base_model_version", "modelspec.architecture"),
)
_METADATA_FIRST = b'{"__metadata__":'  # as safetensors itself writes it
_MOST_QUOTES = 10 * MAX_TENSORS + 4 * MAX_METADATA + 2
_TAGS, _TRIGGERS, _LONGEST, _MOST_READ = 24, 12, 80, 4000


def _file_entries(path: Path, quick: "_Quick | None" = None) -> tuple[Entries, dict[str, str]]:
    return file_entries(read_header(path) if quick is None else checked_header(quick.raw, quick.data_bytes))


class _Quick(NamedTuple):
    """A header cut in two: its metadata; the text of all the rest, with how many bytes of tensors follow. And whole."""

    metadata: dict[str, str]
    tensors: bytes
    raw: bytes
    data_bytes: int


def _split_header(path: Path) -> _Quick | None:
    """The header without a look at its tensors; None where it is not written as usual, and has to be read in full."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            length = int.from_bytes(file.read(8), "little") if stat.S_ISREG(status.st_mode) else 0
            raw = file.read(length) if 0 < length <= MAX_HEADER_BYTES else b""
        if len(raw) != length or not raw.startswith(_METADATA_FIRST) or raw.count(b'"') > _MOST_QUOTES:
            return None
        text = raw.decode()
        metadata, end = json.JSONDecoder().raw_decode(text, len(_METADATA_FIRST))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        return None
    tensors = b"%d%s" % (status.st_size - length, text[end:].rstrip(" ").encode())
    return _Quick(metadata, tensors, raw, status.st_size - 8 - length)


def _open_without_waiting(path: str, flags: int) -> int:
    """Not to block, should a pipe have a file's name."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _structure_key(tensors: bytes, metadata: Mapping[str, str]) -> bytes:
    said = [(key, metadata[key]) for key in _TELLING if key in metadata]
    digest = hashlib.sha256(repr(said).encode(errors="replace"))
    digest.update(tensors)
    return digest.digest()


def _structure(path: Path, entries: Entries, metadata: Mapping[str, str]) -> Structure:
    reading = take_apart({key: shape for key, (_, shape) in entries.items()}, metadata)
    adapter, is_unclear = outline(entries, metadata, reading)
    axes = sorted({module.axis for module in adapter.modules.values() if module.magnitude is not None}, reverse=True)
    return Structure(
        format="peft" if path.is_dir() else format_of(path, reading, list(entries)),
        kind=kind_in_words(adapter),
        family=family_of(adapter) or "",
        ranks=adapter.ranks,
        axis="unclear" if is_unclear else "/".join(axes),
        layers=len(adapter.modules) or len(adapter.vectors),
        components=adapter.components,
        words=words_among(entries),
    )


def declared_metadata(metadata: Mapping[str, str]) -> DeclaredMetadata:
    """What metadata say, in the words of kohya's trainers, Stability's modelspec and ours."""
    frequency = _tag_counts(metadata)
    tags = [*_split(metadata.get("modelspec.tags", "")), *(tag for tag, _ in frequency.most_common(_TAGS))]
    triggers = [
        *_split(metadata.get("modelspec.trigger_phrase", "")),
        *_split(metadata.get("dora_diffusion.instance_prompt", "")),
        *metadata.get("dora_diffusion.words", "").split(),
    ]
    return DeclaredMetadata(
        title=_first(metadata, "modelspec.title", "ss_output_name"),
        author=_first(metadata, "modelspec.author"),
        base=_first(
            metadata,
            *("dora_diffusion.base_model", "ss_sd_model_name", "modelspec.architecture", "ss_base_model_version"),
        ),
        triggers=_few(triggers, _TRIGGERS) or _few(_concepts(metadata), _TRIGGERS),
        tags=_few(tags, _TAGS),
    )


def _tag_counts(metadata: Mapping[str, str]) -> Counter[str]:
    """How often each tag stands in the captions, over all of kohya's folders."""
    counts: Counter[str] = Counter()
    for tags in _json(metadata, "ss_tag_frequency").values():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int) and 0 < count < 1 << 40:
                counts[tag.strip()] += count
    return counts


def _concepts(metadata: Mapping[str, str]) -> list[str]:
    """What kohya's folders are called: `10_sks dog` is ten repeats of `sks dog`."""
    folders = {**_json(metadata, "ss_tag_frequency"), **_json(metadata, "ss_dataset_dirs")}
    return [found[1] for folder in folders if (found := re.fullmatch(r"\d{1,4}_(\S.*)", folder[:_LONGEST]))]


def _json(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        return json_object(metadata.get(key, "{}"), key)
    except ValueError:  # another tool's note is no part of the adapter
        return {}


def _first(metadata: Mapping[str, str], *keys: str) -> str:
    texts = (_line(metadata.get(key, "")) for key in keys)
    return next((text for text in texts if text not in ("", "None")), "")


def _split(text: str) -> list[str]:
    return text[:_MOST_READ].split(",")


def _few(words: Iterable[str], limit: int) -> tuple[str, ...]:
    """The first words that differ, each on one line."""
    return tuple(dict.fromkeys(line for word in words if (line := _line(word))))[:limit]


def _line(text: str) -> str:
    return shown(" ".join(text[:_MOST_READ].split()), _LONGEST)
