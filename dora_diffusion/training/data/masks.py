"""Masks: which part of a picture counts, from a file beside it or its alpha channel."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dora_diffusion.utils.images import SUFFIXES, list_files, read_alpha, read_image
from dora_diffusion.utils.text import shown_path

# `3_mask.png` and OneTrainer's `3-masklabel.png` beside `3.jpg`, or ai-toolkit's folder with files of the same names.
MASK_ENDINGS = ("_mask", "-masklabel")
MASK_FOLDER = "masks"

# Sides of a picture and of its mask may differ by this share of the longer before they are of different shapes.
_SHAPE_TOLERANCE = 0.02


@dataclass(frozen=True)
class Masks:
    """The masks among some files.

    Attributes:
        of: picture -> its mask.
        orphans: masks of no picture.
    """

    of: Mapping[Path, Path]
    orphans: tuple[Path, ...]


def find_masks(files: Sequence[Path]) -> Masks:
    """Part the pictures of one or several folders, by suffix, into those to learn and their masks.

    What ends as a mask does is one, and never a picture; the first that is found of several is taken.
    """
    pictures = [path for path in files if not is_mask(path)]
    by_stem: dict[tuple[Path, str], list[Path]] = {}
    for path in pictures:
        for stem in (path.stem, path.name):
            by_stem.setdefault((path.parent, stem.casefold()), []).append(path)
    of: dict[Path, Path] = {}
    orphans = []
    for mask in [*filter(is_mask, files), *_in_folders({path.parent for path in pictures})]:
        known = by_stem.get(_place_of_picture(mask), [])
        for path in known:
            of.setdefault(path, mask)
        if not known:
            orphans.append(mask)
    return Masks(of, tuple(orphans))


def is_mask(path: Path) -> bool:
    """Whether a file's name is that of a mask."""
    return path.stem.casefold().endswith(MASK_ENDINGS)


def _in_folders(folders: set[Path]) -> list[Path]:
    inner = [folder / MASK_FOLDER for folder in sorted(folders) if (folder / MASK_FOLDER).is_dir()]
    return [path for folder in inner for path in list_files(folder) if path.suffix.lower() in SUFFIXES]


def _place_of_picture(mask: Path) -> tuple[Path, str]:
    """The folder and the stem of the picture that a mask is of."""
    stem = mask.stem.casefold()
    if is_mask(mask):
        return mask.parent, next(stem.removesuffix(end) for end in MASK_ENDINGS if stem.endswith(end))
    return mask.parent.parent, stem


def read_mask(picture: Path, mask: Path | None, size: tuple[int, int]) -> Image.Image | None:
    """What of a picture counts, as grey of its size: 255 does, 0 does not. None = all of it.

    Args:
        picture: whose alpha channel is its mask where there is no file.
        mask: the file.
        size: (width, height) of the picture.

    Raises:
        ValueError: the file cannot be read, is of another shape than the picture, or leaves nothing.
    """
    found = read_alpha(picture) if mask is None else read_image(mask).convert("L")
    if found is None:
        return None
    where = shown_path(mask or picture)
    if abs(found.width * size[1] - found.height * size[0]) > _SHAPE_TOLERANCE * max(found.size) * max(size):
        raise ValueError(
            f"{where}: a mask of {found.width}x{found.height} pixels, expected the shape of its picture, "
            f"{size[0]}x{size[1]}"
        )
    if not found.getbbox():
        raise ValueError(f"{where}: the mask is black all over, so nothing of its picture would be learnt; mend it")
    return found if found.size == size else found.resize(size, Image.Resampling.BOX)
