"""Reading pictures that strangers made: right pixels, or one line that names the file."""

import contextlib
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features

from dora_diffusion.utils.text import shown_path

Crop = Literal["center", "random"]
Made = TypeVar("Made")

# Only these decoders ever see a user's file; the others that Pillow has are old, rarely fuzzed, or call programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM") + (("AVIF",) if features.check("avif") else ())

_SUFFIXES_BY_FORMAT = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
}

SUFFIXES = frozenset(suffix for name in FORMATS for suffix in _SUFFIXES_BY_FORMAT[name])

# What EXIF may say of a place or a person.
_PERSONAL = (ExifTags.Base.GPSInfo, ExifTags.Base.Artist, ExifTags.Base.XPAuthor)

_WHITE = (255, 255, 255, 255)


class UnreadablePicture(ValueError):
    """A file that is no picture here, or none any more."""


class _Warnings:
    """Python's warnings are of the process, while pictures are read by several threads: the first in sets how strict
    they are, the last out sets them back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._before = contextlib.ExitStack()

    @contextlib.contextmanager
    def strict(self) -> Iterator[None]:
        """What would change pixels is an error."""
        with self._lock:
            if not self._readers:
                self._before.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore", UserWarning)  # odd metadata that changes no pixel
                warnings.filterwarnings("error", "Corrupt EXIF")  # which may have held the orientation
                warnings.simplefilter("error", Image.DecompressionBombWarning)
            self._readers += 1
        try:
            yield
        finally:
            with self._lock:
                self._readers -= 1
                if not self._readers:
                    self._before.close()


_WARNINGS = _Warnings()


@dataclass(frozen=True)
class Described:
    """A picture, and what its file says beside it.

    Attributes:
        picture: as `read_image` gives it.
        has_alpha: some of it may be clear.
        is_turned: its EXIF orientation was applied.
        is_personal: its EXIF names a place or a person.
        is_cmyk: its samples are CMYK.
        has_profile: it has a colour profile other than sRGB.
    """

    picture: Image.Image
    has_alpha: bool
    is_turned: bool
    is_personal: bool
    is_cmyk: bool
    has_profile: bool


def read_image(path: str | Path) -> Image.Image:
    """Read a picture as RGB, 8 bits a channel, upright.

    EXIF orientation is applied, transparency laid on white, 16-bit grey scaled to 8 bits, and the first frame taken of
    an animation. Colour profiles are not applied.

    Raises:
        UnreadablePicture: one line naming the file, when it is missing, empty, cut short, no picture of `FORMATS`,
            larger than `PIL.Image.MAX_IMAGE_PIXELS`, or of 32-bit or float samples, whose range no one knows.
    """
    return _read(Path(path), _upright_rgb)


def describe_image(path: str | Path) -> Described:
    """A picture and what its file says beside it, decoded once.

    Raises:
        ValueError: as `read_image`.
    """
    return _read(Path(path), _described)


def read_alpha(path: str | Path) -> Image.Image | None:
    """A picture's alpha channel as 8-bit grey, upright; None where it has none.

    Raises:
        ValueError: as `read_image`.
    """
    return _read(Path(path), _alpha)


def _read(path: Path, convert: Callable[[Image.Image], Made]) -> Made:
    """What `convert` makes of a picture as it is stored; every failure in one line."""
    try:
        if path.stat().st_size == 0:
            raise ValueError("an empty file (0 bytes)")
        with _WARNINGS.strict(), Image.open(path, formats=FORMATS) as picture:
            return convert(picture)
    except UnidentifiedImageError:
        raise UnreadablePicture(
            f"{shown_path(path)}: not a picture, or damaged; expected one of {', '.join(FORMATS)}"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        most = Image.MAX_IMAGE_PIXELS
        raise UnreadablePicture(
            f"{shown_path(path)}: too large, expected at most {most} pixels; make it smaller"
        ) from None
    except FileNotFoundError:
        raise UnreadablePicture(f"{shown_path(path)}: no such file") from None
    except Exception as error:  # decoders meet damage with anything: SyntaxError, struct.error, IndexError ...
        reason = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
        raise UnreadablePicture(f"{shown_path(path)}: cannot be read as a picture ({reason}); save it anew") from None


def _upright_rgb(stored: Image.Image) -> Image.Image:
    return _to_rgb(ImageOps.exif_transpose(stored), stored.format)


def _described(stored: Image.Image) -> Described:
    picture = _upright_rgb(stored)
    exif, profile = stored.getexif(), stored.info.get("icc_profile") or b""
    return Described(
        picture,
        stored.has_transparency_data,
        exif.get(ExifTags.Base.Orientation, 1) in range(2, 9),
        any(tag in exif for tag in _PERSONAL),
        stored.mode == "CMYK",
        bool(profile) and b"sRGB" not in profile.replace(b"\0", b""),  # its name is in UTF-16 in some
    )


def _to_rgb(picture: Image.Image, file_format: str | None) -> Image.Image:
    if picture.mode.startswith("I;16") or (picture.mode == "I" and file_format == "PPM"):
        return _from_grey16(picture)
    if picture.mode in ("I", "F"):
        raise ValueError(f"32-bit samples (mode {picture.mode}), expected 8 or 16 bits")
    if picture.has_transparency_data:
        clear = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, _WHITE), clear).convert("RGB")
    return picture.convert("RGB")


def _alpha(stored: Image.Image) -> Image.Image | None:
    picture = ImageOps.exif_transpose(stored)
    return picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None


def _from_grey16(picture: Image.Image) -> Image.Image:
    """0..65535 -> 0..255; `convert` would clip everything above 255 to white."""
    grey = np.asarray(picture).astype(np.uint32)
    scaled = ((grey + 128) // 257).astype(np.uint8)
    if "transparency" in picture.info:  # PNG: the one grey that is clear
        scaled[grey == picture.info["transparency"]] = 255
    return Image.fromarray(scaled).convert("RGB")


def list_images(folder: str | Path) -> list[Path]:
    """The pictures that lie in a folder itself, by suffix, in natural order (2.png before 10.png); hidden ones are not.

    Raises:
        ValueError: no such folder, or no picture in it.
    """
    files = list_files(folder)
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not pictures:
        found = f"{len(files)} other files, {shown_path(files[0].name)} first" if files else "no files"
        raise ValueError(f"{shown_path(folder)}: got {found}, expected pictures ({' '.join(sorted(SUFFIXES))})")
    return pictures


def list_files(folder: str | Path) -> list[Path]:
    """The files that lie in a folder itself, in natural order, hidden ones left out.

    Raises:
        ValueError: no such folder, or it may not be read.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"{shown_path(folder)}: no such folder, expected a folder of pictures")
    try:
        entries = list(Path(folder).iterdir())
    except OSError as error:
        raise ValueError(f"{shown_path(folder)}: cannot be read ({error.strerror})") from None
    return sorted((path for path in entries if path.is_file() and not path.name.startswith(".")), key=natural_order)


def natural_order(path: Path) -> tuple[list[str | int], str]:
    """Sort key by which img2 comes before img10; names that differ in case alone keep one order."""
    parts = re.split(r"(\d+)", str(path).casefold())  # text and digits by turns, so like meets like
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], str(path)


def fit(
    picture: Image.Image, *, size: tuple[int, int], crop: Crop = "center", offset: tuple[float, float] | None = None
) -> Image.Image:
    """Scale a picture to cover `size` and cut off what lies over, in one Lanczos resampling.

    Args:
        picture: of any size.
        size: (width, height) in pixels.
        crop: which part stays; "center" takes no offset, "random" needs one.
        offset: (x, y), each 0..1, of what is cut off how much is cut left and above.

    Raises:
        ValueError: crop and offset do not go together.
    """
    if (crop == "random") != (offset is not None):
        raise ValueError(f"offset: got {offset} with crop={crop!r}, expected one with 'random' only")
    scale = _cover(picture.size, size)
    width, height = min(picture.width, size[0] / scale), min(picture.height, size[1] / scale)
    x, y = offset or (0.5, 0.5)
    left, top = (picture.width - width) * x, (picture.height - height) * y
    # The minimum guards against a last bit of rounding, which Pillow refuses.
    box = (left, top, min(picture.width, left + width), min(picture.height, top + height))
    return picture.resize(size, Image.Resampling.LANCZOS, box=box)


def _cover(original: tuple[int, int], size: tuple[int, int]) -> float:
    """How much a picture is scaled so that it covers `size`."""
    return max(size[0] / original[0], size[1] / original[1])


def frame_of(
    original: tuple[int, int], *, size: tuple[int, int], offset: tuple[float, float] | None
) -> tuple[float, ...]:
    """Where a fitted picture comes from, as SDXL is told it (micro-conditioning, arXiv 2307.01952, 2.2).

    Args:
        original: (width, height) of the picture.
        size: (width, height) it was fitted to.
        offset: as `fit` was given.

    Returns:
        Original height and width, top and left of the crop in pixels of the scaled picture, height and width.
    """
    scale, (x, y) = _cover(original, size), offset or (0.5, 0.5)
    left, top = (round((side * scale - target) * at) for side, target, at in zip(original, size, (x, y), strict=True))
    return (original[1], original[0], max(0, top), max(0, left), size[1], size[0])
