"""Examples: pictures with their captions, as a folder holds them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.training.data.captions import METADATA, find_captions, read_metadata, with_trigger, words_of_file
from dora_diffusion.training.data.masks import find_masks, is_mask
from dora_diffusion.utils.images import SUFFIXES, list_files, list_images, natural_order
from dora_diffusion.utils.text import shown_path

_NAMED_AT_MOST = 3


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
        resolutions: that its concept asks for; () for the run's.
        original: (width, height) of the picture; (0, 0) until it was opened.
        size: (width, height) that it is trained at; (0, 0) until it has a bucket.
        mask: file that says which part of it counts; None = all, or what its alpha channel says.
    """

    path: Path
    caption: str
    others: tuple[str, ...] = ()
    repeats: int = 1
    weight: float = 1.0
    dropout: float | None = None
    resolutions: tuple[int, ...] = ()
    original: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)
    mask: Path | None = None

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
        ValueError: one line: no pictures, a bad line of metadata, pictures without a caption, or with an empty one, or
            a mask of no picture.
    """
    listed = read_metadata(folder)
    files = find_pictures(folder, listed)
    masks = find_masks(files)
    if masks.orphans:
        name = shown_path(masks.orphans[0])
        raise ValueError(f"{name}: by its name a mask, but there is no picture that it is of; rename it or take it out")
    own = {path: find_captions(path, listed) for path in files if not is_mask(path)}
    captions = {
        path: or_else(found, path, instance_prompt, from_file_name=from_file_name) for path, found in own.items()
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
        examples.append(Example(path, first, tuple(others), mask=masks.of.get(path)))
    return examples


def or_else(
    own: tuple[str, ...] | None, path: Path, instance_prompt: str | None, *, from_file_name: bool
) -> tuple[str, ...]:
    """Captions of a picture that may have none of its own."""
    if own is not None:
        return own
    said = words_of_file(path) if from_file_name else ""
    return tuple(filter(None, (said or instance_prompt,)))


def find_pictures(folder: str | Path, listed: Iterable[Path]) -> list[Path]:
    """The pictures of a folder, their masks too, and those that its metadata names in subfolders, in natural order."""
    nested = [path for path in listed if path.parent != Path(folder)]
    direct = list_images(folder) if not nested else [p for p in list_files(folder) if p.suffix.lower() in SUFFIXES]
    return sorted([*direct, *nested], key=natural_order)


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
