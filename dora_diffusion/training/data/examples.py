"""Examples (a picture and its caption), their pixels, and which of them a step sees."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from dora_diffusion.training.data.captions import METADATA, find_captions, read_metadata, with_trigger, words_of_file
from dora_diffusion.utils.images import (
    SUFFIXES,
    Crop,
    fit,
    frame_of,
    list_files,
    list_images,
    natural_order,
    read_image,
)
from dora_diffusion.utils.text import shown_path

if TYPE_CHECKING:  # the doctor reads captions and pictures with what is here, and needs no torch
    from torch import Tensor

    from dora_diffusion.training.config import DataConfig

_NAMED_AT_MOST = 3
_KOHYA = re.compile(r"(\d+)_(.+)")
_MOST_REPEATS = 10_000


@dataclass(frozen=True)
class Example:
    """One picture to learn.

    Attributes:
        path: the picture's file.
        caption: what it shows.
        others: further captions of its own; each step takes one of all.
        repeats: how often an epoch shows it.
        weight: of its loss.
        dropout: share of its samples with an empty caption; None for the run's.
    """

    path: Path
    caption: str
    others: tuple[str, ...] = ()
    repeats: int = 1
    weight: float = 1.0
    dropout: float | None = None

    @property
    def captions(self) -> tuple[str, ...]:
        """All of them."""
        return (self.caption, *self.others)


def find_examples(
    folder: str | Path, *, instance_prompt: str | None, trigger: str | None = None, from_file_name: bool = False
) -> list[Example]:
    """Every picture of a folder with its captions, in natural order.

    A caption is, by precedence: the text file of the picture's name, the folder's metadata (both: `find_captions`;
    metadata may also name pictures in subfolders), the file's name where that is asked for, `instance_prompt`.

    Args:
        folder: where they lie.
        instance_prompt: caption of those without one of their own.
        trigger: what stands for {} in captions.
        from_file_name: what a file's name says is a caption.

    Raises:
        ValueError: one line: no pictures, a bad line of metadata, or pictures without a caption, or with an empty one.
    """
    listed = read_metadata(folder)
    own = {path: find_captions(path, listed) for path in find_pictures(folder, listed)}
    captions = {
        path: _or_else(found, path, instance_prompt, from_file_name=from_file_name) for path, found in own.items()
    }
    lacking = [path for path, found in captions.items() if not found]
    if lacking:
        names = ", ".join(shown_path(path.relative_to(folder)) for path in lacking[:_NAMED_AT_MOST])
        more = " ..." if len(lacking) > _NAMED_AT_MOST else ""
        raise ValueError(
            f"{shown_path(folder)}: {len(lacking)} of {len(captions)} pictures have no caption, or an empty one "
            f"({names}{more}); expected a .txt file beside each, a line in {METADATA}, or an instance prompt"
        )
    examples = []
    for path, found in captions.items():
        first, *others = with_trigger(found, trigger, shown_path(path))
        examples.append(Example(path, first, tuple(others)))
    return examples


def _or_else(
    own: tuple[str, ...] | None, path: Path, instance_prompt: str | None, *, from_file_name: bool
) -> tuple[str, ...]:
    """Captions of a picture that may have none of its own."""
    if own is not None:
        return own
    said = words_of_file(path) if from_file_name else ""
    return tuple(filter(None, (said or instance_prompt,)))


def find_pictures(folder: str | Path, listed: Iterable[Path]) -> list[Path]:
    """The pictures of a folder and those that its metadata names in subfolders, in natural order."""
    nested = [path for path in listed if path.parent != Path(folder)]
    direct = list_images(folder) if not nested else [p for p in list_files(folder) if p.suffix.lower() in SUFFIXES]
    return sorted([*direct, *nested], key=natural_order)


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


class Sample(NamedTuple):
    """A picture's pixels for training, fp32 (3, height, width) in [-1, 1], and its frame, fp32 (6,); see `frame_of`."""

    pixels: "Tensor"
    frame: "Tensor"


def load_sample(example: Example, *, size: tuple[int, int], crop: Crop, flip: bool, rng: Random) -> Sample:
    """A picture as it is trained.

    Args:
        example: its picture is read anew.
        size: (width, height) in pixels.
        crop: which part stays where the shapes differ; "random" draws the place from `rng`.
        flip: mirror it left to right.
        rng: not touched when crop is "center".

    Raises:
        ValueError: the picture cannot be read; see `read_image`.
    """
    import torch

    offset = (rng.random(), rng.random()) if crop == "random" else None
    original = read_image(example.path)
    picture = fit(original, size=size, crop=crop, offset=offset)
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)
    if flip and offset is not None:  # mirrored, what was cut off on the right is cut off on the left
        offset = (1 - offset[0], offset[1])
    return Sample(pixels, torch.tensor(frame_of(original.size, size=size, offset=offset), dtype=torch.float32))


class Place(NamedTuple):
    """Where a sample stands: the epoch, and which of the epoch's samples it is."""

    epoch: int
    sample: int


class StepSampler:
    """Which samples a step sees: each once an epoch, shuffled anew, across batch borders.

    The answer depends on (seed, step) alone, so a resumed run needs no state of its sampler.
    """

    def __init__(self, count: int, *, batch_size: int, seed: int) -> None:
        if count < 1 or batch_size < 1:
            raise ValueError(f"got {count} examples in batches of {batch_size}, expected at least 1 of each")
        self._count = count
        self._batch_size = batch_size
        self._seed = seed

    def places_at(self, step: int) -> list[Place]:
        """The samples of step 0, 1, 2 ..., each in 0..count-1."""
        start = step * self._batch_size
        return [self._place_at(position) for position in range(start, start + self._batch_size)]

    def batch_at(self, step: int) -> list[int]:
        """Their indices."""
        return [place.sample for place in self.places_at(step)]

    def _place_at(self, position: int) -> Place:
        epoch, place = divmod(position, self._count)
        return Place(epoch, _epoch_order(self._count, self._seed, epoch)[place])


@lru_cache(maxsize=8)
def _epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """0..count-1 in the order of a hash, which, unlike `random.shuffle`, no Python version will change."""
    return tuple(sorted(range(count), key=lambda index: _hash(f"{seed}/{epoch}/{index}")))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


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
    for example in (*split.train, *split.validation, *sources["class"]):
        read_image(example.path)
    return split._replace(classes=tuple(sources["class"]))


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
        replace(example, repeats=concept.repeats, weight=concept.weight, dropout=concept.caption_dropout)
        for concept in data.concepts
        if concept.role == role
        for example in _found(
            data, concept.dir, concept.prompt or data.instance_prompt, concept.trigger or data.trigger
        )
    ]


def _found(data: "DataConfig", folder: Path, prompt: str | None, trigger: str | None) -> list[Example]:
    by_name = data.captions.from_file_name
    return find_examples(folder, instance_prompt=prompt, trigger=trigger, from_file_name=by_name)


def check_words(words: Iterable[str], examples: Sequence[Example]) -> None:
    """A ValueError when no caption holds a new word, which would never be trained, or one holds it inside another."""
    for word in words:
        alone = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
        captions = [caption for example in examples for caption in example.captions]
        inside = [caption for caption in captions if word in alone.sub("", caption).lower()]
        if inside:
            raise ValueError(
                f"words.starts: {word!r} stands inside another word of {inside[0]!r}, which it would tear apart; "
                "choose one that cannot, such as '<zqx>'"
            )
        if not any(alone.search(caption) for caption in captions):
            raise ValueError(
                f"words.starts: {word!r} stands in none of the {len(examples)} captions, "
                f"{examples[0].caption!r} first; expected captions (or data.instance_prompt) that hold it"
            )


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
    order = sorted(range(len(examples)), key=lambda index: _hash(f"{seed}/{examples[index].path.name}"))
    aside = set(order[:count])
    return Split(
        [example for index, example in enumerate(examples) if index not in aside],
        [example for index, example in enumerate(examples) if index in aside],
    )
