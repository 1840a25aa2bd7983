"""A look at each picture: it is decoded once, and what every check needs of it is kept."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dora_diffusion.training.data.doctor.findings import Finding, reason_of
from dora_diffusion.training.data.masks import read_mask
from dora_diffusion.utils.atomic import sha256_of
from dora_diffusion.utils.images import describe_image
from dora_diffusion.utils.progress import Progress
from dora_diffusion.utils.text import shown_path

# Pictures are made so small before they are hashed: a whole multiple of the 9 x 8 and 8 x 8 that is then made of them.
_SMALL = (72, 64)
_NAMED_AT_MOST = 3


@dataclass(frozen=True)
class Look:
    """What is kept of a picture once it has been read.

    Attributes:
        path: its file.
        size: (width, height), upright.
        digest: SHA-256 of its bytes.
        bits: 64 of the difference hash, packed in 8 bytes.
        colours: (8, 8, 3) means of its parts.
        is_turned: its EXIF turns it.
        is_personal: its EXIF says where it was taken, or by whom.
        is_cmyk: its samples are CMYK.
        has_profile: it has a colour profile other than sRGB.
    """

    path: Path
    size: tuple[int, int]
    digest: str
    bits: NDArray[np.uint8]
    colours: NDArray[np.float32]
    is_turned: bool
    is_personal: bool
    is_cmyk: bool
    has_profile: bool


@dataclass(frozen=True)
class Asked:
    """A picture to look at.

    Attributes:
        path: its file.
        mask: the file of its mask.
        uses_mask: whether its mask, or alpha channel, counts.
    """

    path: Path
    mask: Path | None
    uses_mask: bool


def look_at_all(asked: Sequence[Asked], progress: Progress) -> tuple[list[Look], list[Finding]]:
    """Read pictures by several threads: what they look like, in their order, and what is wrong with them."""
    looks: list[Look] = []
    findings: list[Finding] = []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # decoding, scaling and hashing let others work
        for done, (look, faults) in enumerate(pool.map(_look, asked), start=1):
            looks += [look] if look is not None else []
            findings += faults
            progress(done, len(asked))
    return looks, findings


def _look(asked: Asked) -> tuple[Look | None, list[Finding]]:
    from imagehash import dhash

    path = asked.path
    try:
        described = describe_image(path)
    except ValueError as error:
        return None, [Finding("corrupt", path, reason_of(error, path))]
    picture = described.picture
    faults: list[Finding] = []
    if asked.uses_mask and (asked.mask is not None or described.has_alpha):
        faults += _mask_faults(path, asked.mask, picture.size)
    small = picture.resize(_SMALL, Image.Resampling.BOX, reducing_gap=2.0)  # in two steps, the first far quicker
    look = Look(
        path,
        picture.size,
        sha256_of(path),
        np.packbits(dhash(small).hash),
        np.asarray(small.resize((8, 8), Image.Resampling.BOX)).astype(np.float32),
        described.is_turned,
        described.is_personal,
        described.is_cmyk,
        described.has_profile,
    )
    return look, faults


def _mask_faults(path: Path, mask: Path | None, size: tuple[int, int]) -> Iterator[Finding]:
    try:
        read_mask(path, mask, size)
    except ValueError as error:
        where = mask or path
        yield Finding("bad-mask", where, reason_of(error, where))


def notes_of(looks: Sequence[Look]) -> list[str]:
    """What files say beside their pixels, and what is done with it."""
    turned = [look for look in looks if look.is_turned]
    personal = [look for look in looks if look.is_personal]
    cmyk = [look for look in looks if look.is_cmyk]
    profiled = [look for look in looks if look.has_profile]
    return [
        f"{_named(found)} {what}"
        for found, what in (
            (turned, "turned upright, as the EXIF orientation says"),
            (personal, "with a place or a name in EXIF; nothing of it reaches the adapter, but whoever gets the files"),
            (cmyk, "in CMYK, which is converted without a profile; save as RGB where colours matter"),
            (profiled, "with a colour profile that is not applied; save as sRGB where colours matter"),
        )
        if found
    ]


def _named(looks: Sequence[Look]) -> str:
    names = ", ".join(shown_path(look.path.name) for look in looks[:_NAMED_AT_MOST])
    more = " ..." if len(looks) > _NAMED_AT_MOST else ""
    return f"{len(looks)} {'picture' if len(looks) == 1 else 'pictures'} ({names}{more})"
