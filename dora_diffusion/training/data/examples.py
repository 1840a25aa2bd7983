"""Examples (a picture and its caption), their pixels, and which of them a step sees."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

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

METADATA = "metadata.jsonl"
CAPTION_COLUMNS = ("text", "caption", "prompt")
_NAMED_AT_MOST = 3


@dataclass(frozen=True)
class Example:
    """One picture to learn.

    Attributes:
        path: the picture's file.
        caption: what it shows.
    """

    path: Path
    caption: str


def find_examples(folder: str | Path, *, instance_prompt: str | None) -> list[Example]:
    """Every picture of a folder with its caption, in natural order.

    A caption is, by precedence: the text file of the picture's name (`3.txt` beside `3.png`), the folder's
    `metadata.jsonl` (Hugging Face's imagefolder: `file_name` and `text`, `caption` or `prompt`), `instance_prompt`.
    `metadata.jsonl` may also name pictures in subfolders.

    Raises:
        ValueError: one line: no pictures, a bad line of `metadata.jsonl`, or pictures without a caption, or with an
            empty one.
    """
    listed = read_metadata(folder)
    captions = {path: find_caption(path, listed, instance_prompt) for path in find_pictures(folder, listed)}
    lacking = [path for path, caption in captions.items() if not caption]
    if lacking:
        names = ", ".join(shown_path(path.relative_to(folder)) for path in lacking[:_NAMED_AT_MOST])
        more = " ..." if len(lacking) > _NAMED_AT_MOST else ""
        raise ValueError(
            f"{shown_path(folder)}: {len(lacking)} of {len(captions)} pictures have no caption, or an empty one "
            f"({names}{more}); expected a .txt file beside each, a line in {METADATA}, or an instance prompt"
        )
    return [Example(path, caption) for path, caption in captions.items() if caption]


def find_pictures(folder: str | Path, listed: Mapping[Path, str]) -> list[Path]:
    """The pictures of a folder and those that its metadata names in subfolders, in natural order."""
    nested = [path for path in listed if path.parent != Path(folder)]
    direct = list_images(folder) if not nested else [p for p in list_files(folder) if p.suffix.lower() in SUFFIXES]
    return sorted([*direct, *nested], key=natural_order)


def find_caption(picture: Path, listed: Mapping[Path, str], instance_prompt: str | None) -> str | None:
    """A picture's caption on one line; "" when its text file or its line is empty, None when there is none at all.

    Raises:
        ValueError: the text file cannot be read as UTF-8.
    """
    sidecar = find_sidecar(picture)
    if sidecar is not None:
        return " ".join(_read_text(sidecar).split())
    return listed.get(picture, instance_prompt)


def find_sidecar(picture: Path) -> Path | None:
    """The text file of the picture's name, if there is one."""
    candidates = (picture.with_suffix(".txt"), picture.with_suffix(".TXT"))
    return next((path for path in candidates if path.is_file()), None)


def read_metadata(folder: str | Path) -> dict[Path, str]:
    """Picture -> caption, from the folder's `metadata.jsonl`; {} when there is none.

    Raises:
        ValueError: one line that names the file and its line: not JSON, no such picture, no caption, named twice.
    """
    path = Path(folder) / METADATA
    captions: dict[Path, str] = {}
    for number, line in enumerate(_read_text(path).split("\n") if path.is_file() else (), start=1):
        if line.strip():
            where = f"{shown_path(path)}:{number}"
            picture, caption = _metadata_line(line, Path(folder), where)
            if picture in captions:
                raise ValueError(
                    f"{where}: {shown_path(picture.name)} is named twice, expected one line for each picture"
                )
            captions[picture] = caption
    return captions


def _metadata_line(line: str, folder: Path, where: str) -> tuple[Path, str]:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f'{where}: not JSON, expected {{"file_name": "1.png", "text": "a dog"}}') from None
    name = row.get("file_name") if isinstance(row, dict) else None
    if not isinstance(name, str):
        raise ValueError(f"{where}: got no file_name, expected the name of a picture")
    picture = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{where}: file_name {name!r} leads out of the folder, expected a picture in it")
    if picture.suffix.lower() not in SUFFIXES or not os.path.isfile(picture):
        raise ValueError(f"{where}: file_name {name!r} is no picture in {shown_path(folder)}; mend or remove the line")
    texts = [row[column] for column in CAPTION_COLUMNS if column in row]
    if not texts or not isinstance(texts[0], str):
        got = f"got {texts[0]!r}" if texts else "got none of them"
        raise ValueError(f"{where}: {got}, expected a caption in one of {', '.join(CAPTION_COLUMNS)}")
    return picture, " ".join(texts[0].split())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown_path(path)}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"{shown_path(path)}: cannot be read ({error.strerror})") from None


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


class StepSampler:
    """Which examples a step sees: each once an epoch, shuffled anew, across batch borders.

    The answer depends on (seed, step) alone, so a resumed run needs no state of its sampler.
    """

    def __init__(self, count: int, *, batch_size: int, seed: int) -> None:
        if count < 1 or batch_size < 1:
            raise ValueError(f"got {count} examples in batches of {batch_size}, expected at least 1 of each")
        self._count = count
        self._batch_size = batch_size
        self._seed = seed

    def batch_at(self, step: int) -> list[int]:
        """The indices (each in 0..count-1) of step 0, 1, 2 ..."""
        start = step * self._batch_size
        return [self._example_at(position) for position in range(start, start + self._batch_size)]

    def _example_at(self, position: int) -> int:
        epoch, place = divmod(position, self._count)
        return _epoch_order(self._count, self._seed, epoch)[place]


@lru_cache(maxsize=8)
def _epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """0..count-1 in the order of a hash, which, unlike `random.shuffle`, no Python version will change."""
    return tuple(sorted(range(count), key=lambda index: _hash(f"{seed}/{epoch}/{index}")))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


class Split(NamedTuple):
    """Examples to train on and examples to measure, in their order."""

    train: list[Example]
    validation: list[Example]


def checked_examples(data: "DataConfig", *, seed: int) -> Split:
    """The pictures to train on and to measure, every one of them opened once: better to fail now than in an hour.

    Raises:
        ValueError: a picture that cannot be read or has no caption, named.
    """
    examples = find_examples(data.instance_dir, instance_prompt=data.instance_prompt)
    if data.validation_dir is None:
        split = split_validation(examples, share=data.validation_share, seed=seed)
    else:
        split = Split(examples, find_examples(data.validation_dir, instance_prompt=data.instance_prompt))
    for example in (*split.train, *split.validation):
        read_image(example.path)
    return split


def check_words(words: Iterable[str], examples: Sequence[Example]) -> None:
    """A ValueError when no caption holds a new word, which would never be trained, or one holds it inside another."""
    for word in words:
        alone = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
        inside = [c for c in (example.caption for example in examples) if word in alone.sub("", c).lower()]
        if inside:
            raise ValueError(
                f"words.starts: {word!r} stands inside another word of {inside[0]!r}, which it would tear apart; "
                "choose one that cannot, such as '<zqx>'"
            )
        if not any(alone.search(example.caption) for example in examples):
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
