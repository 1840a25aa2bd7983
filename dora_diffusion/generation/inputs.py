"""Canvases and masks that pictures were drawn on, kept beside them under their hashes."""

import io
from pathlib import Path

from PIL import Image

from dora_diffusion.generation.png_metadata import check_sha256, picture_sha256
from dora_diffusion.utils.atomic import write_atomically

INPUTS = "inputs"


def kept_name(sha256: str) -> str:
    """Where a canvas or mask of that hash is kept, seen from the output folder."""
    return f"{INPUTS}/{sha256}.png"


def keep_input(output: Path, picture: Image.Image) -> str:
    """Store a canvas or mask under the hash that metadata names it by, once; returns the hash."""
    sha256 = picture_sha256(picture)
    path = output / kept_name(sha256)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        write_atomically(path, buffer.getvalue())
    return sha256


def find_input(output: Path, sha256: str) -> Image.Image | None:
    """The canvas or mask of that hash, its pixels checked against it; None when it is not there or another picture.

    Raises:
        ValueError: not the form of a hash.
    """
    checked = check_sha256(sha256)
    path = output / kept_name(str(checked))
    if not path.is_file():
        return None
    try:
        with Image.open(path, formats=["PNG"]) as opened:
            picture = opened.copy()
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return None
    return picture if picture_sha256(picture) == checked else None
