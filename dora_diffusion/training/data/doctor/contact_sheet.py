"""A sheet of what will be trained: each whole picture with the frame that is kept of it, by size.

What is cut off is dark, what a mask leaves out is red.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dora_diffusion.training.data.buckets import kept_share
from dora_diffusion.training.data.doctor.findings import DoctorReport
from dora_diffusion.training.data.doctor.report import by_size
from dora_diffusion.training.data.examples import Example
from dora_diffusion.training.data.masks import read_mask
from dora_diffusion.utils.atomic import atomic_file
from dora_diffusion.utils.image_grid import grid
from dora_diffusion.utils.images import frame_of, read_image
from dora_diffusion.utils.text import shown

CELLS = 200
COLUMNS = 8
_CELL, _EDGE = 176, 4
_LINE = 15
_HEAD = 26
_WHITE, _DARK, _FRAME, _OUTSIDE = (255, 255, 255), 0.3, (255, 196, 0), (220, 38, 38)
_FONT = 11
# Behind the words, by turns from size to size.
_SHADES = ((255, 255, 255), (226, 232, 240))


def write_contact_sheet(report: DoctorReport, path: Path, *, with_masks: bool = False) -> int:
    """Write the sheet as a PNG: as many pictures as there is room for, of every size some.

    Args:
        report: of an examination that knew at which sizes pictures are trained.
        path: of the PNG.
        with_masks: whether masks count.

    Returns:
        How many pictures are left out.

    Raises:
        ValueError: no picture has a size.
    """
    if not report.sized:
        raise ValueError(f"{path}: nothing to draw; expected pictures, and a base or a resolution to train them at")
    sheet, left_out = contact_sheet(report.sized, sizes_of=report.sizes_of, cells=CELLS, with_masks=with_masks)
    with atomic_file(path) as file:
        sheet.save(file, format="PNG")
    return left_out


def contact_sheet(
    sized: Sequence[Example], *, sizes_of: str, cells: int, with_masks: bool = False
) -> tuple[Image.Image, int]:
    """The sheet, and how many pictures are left out.

    Args:
        sized: pictures with the sizes that they are trained at; some.
        sizes_of: what says the sizes, in words.
        cells: how many pictures there is room for.
        with_masks: whether masks count.
    """
    buckets = list(by_size(sized).values())
    shares = _shares([len(inside) for inside in buckets], cells)
    chosen = [
        (example, _SHADES[number % 2])
        for number, (inside, share) in enumerate(zip(buckets, shares, strict=True))
        for example in inside[:share]
    ]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        drawn = list(pool.map(lambda one: _cell(*one, with_masks=with_masks), chosen))
    left_out = len(sized) - len(drawn)
    rest = f"; {len(drawn)} shown, {left_out} left out" if left_out else ""
    head = _strip(f"{len(sized)} trained by {sizes_of}, in {len(buckets)} sizes{rest}")
    body = grid([drawn[at : at + COLUMNS] for at in range(0, len(drawn), COLUMNS)])
    sheet = Image.new("RGB", (max(head.width, body.width), head.height + body.height), _WHITE)
    sheet.paste(head, (0, 0))
    sheet.paste(body, (0, head.height))
    return sheet, left_out


def _shares(counts: Sequence[int], room: int) -> list[int]:
    """How many of each are shown: all, or in turn one of each until there is no more room."""
    shares = [0] * len(counts)
    while room and shares != list(counts):
        for index, count in enumerate(counts):
            if room and shares[index] < count:
                shares[index], room = shares[index] + 1, room - 1
    return shares


def _strip(text: str) -> Image.Image:
    """A line over all."""
    strip = Image.new("RGB", (COLUMNS * _CELL, _HEAD), _SHADES[1])
    _write(ImageDraw.Draw(strip), (_EDGE, 6), text, COLUMNS * _CELL)
    return strip


def _cell(example: Example, shade: tuple[int, int, int], *, with_masks: bool) -> Image.Image:
    """A picture with its frame, size, share that is cut off, name and the first words of its caption."""
    picture = read_image(example.path)
    inner = _CELL - 2 * _EDGE
    scale = min(inner / picture.width, inner / picture.height)
    small = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    pixels: NDArray[np.floating[Any]] = np.asarray(picture.resize(small, Image.Resampling.BOX)).astype(np.float32)
    mask = None
    if with_masks:
        with suppress(ValueError):  # a bad mask, which the report names
            mask = read_mask(example.path, example.mask, picture.size)
    if mask is not None:
        outside = 1 - np.asarray(mask.resize(small, Image.Resampling.BOX)).astype(np.float32)[..., None] / 255
        pixels = pixels * (1 - 0.6 * outside) + outside * np.array(_OUTSIDE, np.float32) * 0.6
    box = _kept(example, picture.size, small)
    kept = np.zeros((*pixels.shape[:2], 1), bool)
    kept[box[1] : box[3], box[0] : box[2]] = True
    shown_picture = Image.fromarray(np.where(kept, pixels, pixels * _DARK).round().astype(np.uint8))
    ImageDraw.Draw(shown_picture).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=_FRAME)
    cell = Image.new("RGB", (_CELL, _CELL + 2 * _LINE + 2), _WHITE)
    cell.paste(shown_picture, ((_CELL - small[0]) // 2, (_CELL - small[1]) // 2))
    draw = ImageDraw.Draw(cell)
    draw.rectangle((0, _CELL, _CELL - 1, cell.height - 1), fill=shade)
    lost = 100 * (1 - float(kept_share(example.original, example.size)))
    told = f"{example.size[0]}x{example.size[1]}, {lost:.0f} % cut: {example.path.name}"
    _write(draw, (_EDGE, _CELL), told, inner)
    _write(draw, (_EDGE, _CELL + _LINE), example.caption, inner)
    return cell


def _kept(example: Example, original: tuple[int, int], small: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom, in pixels of a small copy, of what training keeps of a picture from its centre."""
    _, _, top, left, height, width = frame_of(original, size=example.size, offset=None)
    scale = max(width / original[0], height / original[1])  # of the picture as it is fitted
    across, down = small[0] / (original[0] * scale), small[1] / (original[1] * scale)
    right, bottom = min(small[0], round((left + width) * across)), min(small[1], round((top + height) * down))
    return round(left * across), round(top * down), max(1, right), max(1, bottom)


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int) -> None:
    """As much of a text as there is room for; the font has no signs beyond Latin-1."""
    font = ImageFont.load_default(_FONT)
    line = shown(text, 200).encode("latin-1", "replace").decode("latin-1")
    while line and draw.textlength(line, font=font) > width:
        line = line[:-1]
    draw.text(place, line, fill=(17, 24, 39), font=font)
