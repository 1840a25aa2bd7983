"""Folders of pictures to train on: which there are, their pictures and captions, and writing a caption down.

The browser names a folder and a picture by what was listed; it never sends a path.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.training.data.captions import Captions, find_captions, find_sidecar, read_metadata
from dora_diffusion.training.data.examples import find_pictures
from dora_diffusion.utils.atomic import write_atomically
from dora_diffusion.utils.images import SUFFIXES
from dora_diffusion.utils.text import shown_path
from ui.backend.checks import check_text

MAX_DEPTH = 3
MAX_FOLDERS = 500


@dataclass(frozen=True)
class Captioned:
    """A picture of a folder.

    Attributes:
        name: its path inside the folder.
        path: where it lies.
        caption: of its own; None when it has none.
    """

    name: str
    path: Path
    caption: str | None


def list_datasets(roots: Sequence[Path]) -> dict[str, Path]:
    """Every folder under the roots (`ROOT/..`, three levels deep) that holds pictures: what is shown -> the folder."""
    found: dict[str, Path] = {}
    for root in roots:
        for folder in _folders_with_pictures(root):
            inside = folder.relative_to(root).as_posix()
            name = root.name if inside == "." else f"{root.name}/{inside}"
            if name not in found and len(found) < MAX_FOLDERS:
                found[name] = folder
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _folders_with_pictures(root: Path) -> Iterator[Path]:
    for folder, inner, files in os.walk(root):
        depth = len(Path(folder).relative_to(root).parts)
        inner[:] = [] if depth >= MAX_DEPTH else sorted(name for name in inner if not name.startswith("."))
        if any(Path(name).suffix.lower() in SUFFIXES and not name.startswith(".") for name in files):
            yield Path(folder)


def find_dataset(name: object, roots: Sequence[Path]) -> Path:
    """The folder that is listed under that name.

    Raises:
        ValueError: none is.
    """
    folder = list_datasets(roots).get(name) if isinstance(name, str) else None
    if folder is None:
        places = ", ".join(str(root) for root in roots) or "no folder"
        raise ValueError(f"dataset: got {_named(name)}, expected a folder with pictures under {places}; pick one")
    return folder


def list_pictures(folder: Path) -> list[Captioned]:
    """The pictures of a folder with their captions, in natural order.

    Raises:
        ValueError: no pictures, or captions that cannot be read; the file is named.
    """
    listed = read_metadata(folder)
    return [
        Captioned(path.relative_to(folder).as_posix(), path, _caption_of(find_captions(path, listed)))
        for path in find_pictures(folder, listed)
    ]


def _caption_of(captions: Captions | None) -> str | None:
    """What is shown of a picture's captions, one below the other."""
    return None if captions is None else "\n".join(captions)


def find_picture(folder: Path, name: object) -> Captioned:
    """The folder's picture of that name.

    Raises:
        ValueError: there is none.
    """
    for picture in list_pictures(folder):
        if picture.name == name:
            return picture
    raise ValueError(f"picture: got {_named(name)}, expected one of the gallery; pick one")


def save_caption(folder: Path, name: object, caption: object) -> Path:
    """Write a picture's caption into the text file beside it, whole or not at all; returns that file.

    Raises:
        ValueError: no such picture, no text, too long a text, or a folder that may not be written to.
    """
    picture = find_picture(folder, name)
    text = " ".join(check_text("caption", caption).split())
    sidecar = find_sidecar(picture.path) or picture.path.with_suffix(".txt")
    if not text:
        raise ValueError(f"caption: got none, expected words; to use the instance prompt, remove {sidecar.name}")
    try:
        write_atomically(sidecar, f"{text}\n".encode())
    except OSError as error:
        raise ValueError(f"{shown_path(sidecar)}: cannot be written ({error.strerror})") from None
    except UnicodeEncodeError:
        raise ValueError("caption: got half of a surrogate pair, expected text") from None
    return sidecar


def _named(value: object) -> str:
    return "nothing" if value is None else repr(value)[:60]
