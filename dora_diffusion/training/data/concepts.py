"""Where pictures come from: folders, kohya's folders with repeats, concepts; and which of them are only measured."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from dora_diffusion.training.data.examples import Example, find_examples
from dora_diffusion.training.data.order import hash_of
from dora_diffusion.utils.images import SUFFIXES, list_files, natural_order, read_image
from dora_diffusion.utils.text import shown_path

if TYPE_CHECKING:  # the doctor reads captions and pictures with what is here, and needs no pydantic
    from dora_diffusion.training.config import DataConfig

Role = Literal["instance", "class", "validation"]

_KOHYA = re.compile(r"(\d+)_(.+)")
_MOST_REPEATS = 10_000


@dataclass(frozen=True)
class RepeatedFolder:
    """A subfolder named as kohya's scripts name them, `10_zqx robot`.

    Attributes:
        path: of it.
        repeats: how often an epoch shows each of its pictures.
        prompt: the caption of those that have none of their own.
    """

    path: Path
    repeats: int
    prompt: str


def repeated_folders(folder: str | Path) -> list[RepeatedFolder]:
    """The subfolders that kohya's scripts would read, in natural order; a repeat of 0 leaves a folder out, as there.

    Raises:
        ValueError: repeats beyond ten thousand.
    """
    inner = sorted((path for path in Path(folder).iterdir() if path.is_dir()), key=natural_order)
    found = []
    for path in inner:
        parts = _KOHYA.fullmatch(path.name)
        if parts is None or not int(parts[1]):
            continue
        if int(parts[1]) > _MOST_REPEATS:
            raise ValueError(f"{shown_path(path)}: {parts[1]} repeats, expected at most {_MOST_REPEATS}")
        found.append(RepeatedFolder(path, int(parts[1]), " ".join(parts[2].replace("_", " ").split())))
    return found


@dataclass(frozen=True)
class Source:
    """A folder of pictures, subfolders left out, and what is said of it.

    Attributes:
        folder: where they lie.
        prompt: the caption of those that have none of their own.
        trigger: what stands for {} in captions.
        role: what they are for.
        repeats: how often an epoch shows each.
        weight: of their loss.
        dropout: share of their samples with an empty caption; None for the run's.
        resolutions: that are asked for; () for the run's.
    """

    folder: Path
    prompt: str | None
    trigger: str | None = None
    role: Role = "instance"
    repeats: int = 1
    weight: float = 1.0
    dropout: float | None = None
    resolutions: tuple[int, ...] = ()


class Split(NamedTuple):
    """Examples to train on, examples to measure, and those of the class that is to stay as it is, in their order."""

    train: list[Example]
    validation: list[Example]
    classes: tuple[Example, ...] = ()


def checked_examples(data: "DataConfig", *, seed: int) -> Split:
    """The pictures to train on and to measure, every one of them opened once: better to fail now than in an hour.

    Raises:
        ValueError: a picture that cannot be read or has no caption, named.
    """
    found: dict[str, list[Example]] = {"instance": [], "class": [], "validation": []}
    for source in sources_of(data):
        found[source.role] += examples_of(source, from_file_name=data.captions.from_file_name)
    learnt, held_out = found["instance"], found["validation"]
    parted = split_validation(learnt, share=data.validation_share, seed=seed)
    split = Split(learnt, held_out) if held_out else parted
    return Split(opened(split.train), opened(split.validation), tuple(opened(found["class"])))


def opened(examples: Sequence[Example]) -> list[Example]:
    """Examples that know how large their pictures are; every picture is decoded, several at a time.

    Raises:
        ValueError: a picture that cannot be read, the first of them.
    """
    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(lambda example: read_image(example.path).size, examples))
    return [replace(example, original=size) for example, size in zip(examples, sizes, strict=True)]


def sources_of(data: "DataConfig") -> list[Source]:
    """The folders that a config names, those of data itself before its concepts."""
    own: list[tuple[Role, Path | None]] = [("instance", data.instance_dir), ("validation", data.validation_dir)]
    found = [
        replace(source, role=role)
        for role, folder in own
        if folder is not None
        for source in sources_in(folder, data.instance_prompt, data.trigger)
    ]
    return found + [
        Source(
            concept.dir,
            concept.prompt or data.instance_prompt,
            concept.trigger or data.trigger,
            concept.role,
            repeats=concept.repeats,
            weight=concept.weight,
            dropout=concept.caption_dropout,
            resolutions=concept.resolutions,
        )
        for concept in data.concepts
    ]


def sources_in(folder: Path, prompt: str | None, trigger: str | None = None) -> list[Source]:
    """A folder, if pictures lie in it or nothing does, and its subfolders with repeats."""
    repeated = repeated_folders(folder) if folder.is_dir() else []
    has_own = not repeated or any(path.suffix.lower() in SUFFIXES for path in list_files(folder))
    return [Source(folder, prompt, trigger)] * has_own + [
        Source(inner.path, prompt or inner.prompt, trigger, repeats=inner.repeats) for inner in repeated
    ]


def examples_of(source: Source, *, from_file_name: bool) -> list[Example]:
    """The pictures of a folder.

    Raises:
        ValueError: as `find_examples`.
    """
    found = find_examples(
        source.folder, instance_prompt=source.prompt, trigger=source.trigger, from_file_name=from_file_name
    )
    return [
        replace(
            example,
            repeats=source.repeats,
            weight=source.weight,
            dropout=source.dropout,
            resolutions=source.resolutions,
        )
        for example in found
    ]


def split_validation(examples: Sequence[Example], *, share: float, seed: int) -> Split:
    """Set a share of the examples aside, chosen by a hash of their file names: the same ones in every run.

    Args:
        examples: all there are.
        share: in [0, 1); above 0 at least one example is set aside, and at least one is left.
        seed: another seed chooses others.

    Raises:
        ValueError: share is out of range, or there are too few examples to part.
    """
    if not 0 <= share < 1:
        raise ValueError(f"validation share: got {share}, expected at least 0 and below 1")
    if share == 0:
        return Split(list(examples), [])
    if len(examples) < 2:
        raise ValueError(f"validation share: got {share} of {len(examples)} picture, expected at least 2 pictures")
    count = min(max(1, round(share * len(examples))), len(examples) - 1)
    order = sorted(range(len(examples)), key=lambda index: hash_of(f"{seed}/{examples[index].path.name}"))
    aside = set(order[:count])
    return Split(
        [example for index, example in enumerate(examples) if index not in aside],
        [example for index, example in enumerate(examples) if index in aside],
    )
