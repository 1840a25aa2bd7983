"""What a picture tells of its making, ours or A1111's, and the files that it names found again, as they were."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from dora_diffusion.generation.base_use import hash_of_file
from dora_diffusion.generation.infotext import Parameters, parse_infotext
from dora_diffusion.generation.png_metadata import PictureRecord, picture_sha256, picture_texts, read_metadata
from dora_diffusion.utils.images import read_image
from dora_diffusion.utils.text import shown_path


def told_by(path: Path) -> PictureRecord | Parameters:
    """Our record where a picture has one, else A1111's text.

    Raises:
        ValueError: one line: no picture, or one that does not tell what it was made of.
    """
    record = read_metadata(path)
    if record is not None:
        return record
    texts = picture_texts(path)
    if "parameters" in texts:
        return parse_infotext(texts["parameters"])
    has = "a ComfyUI workflow, which is not read here" if "workflow" in texts or "prompt" in texts else "nothing"
    raise ValueError(f"{path.name}: tells {has}; expected the text that this app or A1111 writes into a PNG")


def find_named(name: str, picture: Path) -> Path:
    """The file that a picture names: where it says, else beside the picture or a folder above, else where it says."""
    places = (Path(name), picture.parent / name, picture.parent.parent / name)
    return next((place for place in places if place.exists()), places[0])


def check_same(path: Path, expected: str | None, found: str | None, *, flag: str) -> None:
    """A ValueError of one line when a file is not the one that a picture was drawn with.

    Args:
        path: the file.
        expected: its hash as the picture has it; None where it does not say.
        found: its hash now.
        flag: what names another.
    """
    if expected is not None and found != expected:
        raise ValueError(
            f"{shown_path(path)}: its SHA-256 is {str(found)[:12]}..., the recipe's is {expected[:12]}...; put the "
            f"right file there, or take this one by {flag}"
        )


def checked_file(path: Path, expected: str | None, *, flag: str) -> str:
    """The hash of a file that a picture names; a ValueError of one line when it is gone or another one."""
    if not path.is_file():
        raise ValueError(f"{shown_path(path)}: no such file, and the recipe needs it; name another by {flag}")
    found = hash_of_file(path)
    check_same(path, expected, found, flag=flag)
    return found


def read_picture(path: Path, *, flag: str) -> Image.Image:
    """A picture to start from, RGB; a ValueError of one line that names the option."""
    return _read(path, flag, lambda picture: picture)


def read_mask(path: Path, *, flag: str) -> Image.Image:
    """A mask, L: white where something is drawn; a ValueError of one line that names the option."""
    return _read(path, flag, lambda picture: picture.convert("L"))


def _read(path: Path, flag: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        return convert(read_image(path))
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from None


def check_picture_same(path: Path, picture: Image.Image, expected: str | None, *, flag: str) -> None:
    """As `check_same`, by the pixels, however they are stored."""
    check_same(path, expected, picture_sha256(picture), flag=flag)
