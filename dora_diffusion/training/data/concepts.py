"""Where pictures come from: folders, kohya's folders with repeats, concepts; and which of them are only measured."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dora_diffusion.training.data.examples import Example, find_examples
from dora_diffusion.training.data.order import hash_of
from dora_diffusion.utils.images import SUFFIXES, list_files, natural_order, read_image
from dora_diffusion.utils.text import shown_path

if TYPE_CHECKING:  # the doctor reads captions and pictures with what is here, and needs no pydantic
    from dora_diffusion.training.config import DataConfig

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
    sources = {role: _of_concepts(data, role) for role in ("instance", "class", "validation")}
    learnt = [*(_of_folder(data, data.instance_dir) if data.instance_dir is not None else ()), *sources["instance"]]
    held_out = sources["validation"]
    if data.validation_dir is not None:
        held_out = [*_of_folder(data, data.validation_dir), *held_out]
    parted = split_validation(learnt, share=data.validation_share, seed=seed)
    split = Split(learnt, held_out) if held_out else parted
    return Split(opened(split.train), opened(split.validation), tuple(opened(sources["class"])))


def opened(examples: Sequence[Example]) -> list[Example]:
    """Examples that know how large their pictures are; every picture is decoded, several at a time.

    Raises:
        ValueError: a picture that cannot be read, the first of them.
    """
    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(lambda example: read_image(example.path).size, examples))
    return [replace(example, original=size) for example, size in zip(examples, sizes, strict=True)]


def _of_folder(data: "DataConfig", folder: Path) -> list[Example]:
    """The pictures of a folder and of its subfolders with repeats."""
    repeated = repeated_folders(folder)
    found: list[Example] = []
    if not repeated or any(path.suffix.lower() in SUFFIXES for path in list_files(folder)):
        found = _found(data, folder, data.instance_prompt, data.trigger)
    for inner in repeated:
        examples = _found(data, inner.path, data.instance_prompt or inner.prompt, data.trigger)
        found += [replace(example, repeats=inner.repeats) for example in examples]
    return found


def _of_concepts(data: "DataConfig", role: str) -> list[Example]:
    return [
        replace(
            example,
            repeats=concept.repeats,
            weight=concept.weight,
            dropout=concept.caption_dropout,
            resolutions=concept.resolutions,
        )
        for concept in data.concepts
        if concept.role == role
        for example in _found(
            data, concept.dir, concept.prompt or data.instance_prompt, concept.trigger or data.trigger
        )
    ]


def _found(data: "DataConfig", folder: Path, prompt: str | None, trigger: str | None) -> list[Example]:
    by_name = data.captions.from_file_name
    return find_examples(folder, instance_prompt=prompt, trigger=trigger, from_file_name=by_name)


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
