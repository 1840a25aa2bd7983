"""A sheet of what will be trained: each whole picture with the frame that is kept of it, by size.

What is cut off is dark, what a mask leaves out is red.
"""

import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dora_diffusion.training.data.doctor.findings import DoctorReport
from dora_diffusion.training.data.doctor.report import by_size, cut_share
from dora_diffusion.training.data.examples import Example
from dora_diffusion.training.data.masks import read_mask
from dora_diffusion.utils.atomic import write_atomically
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


def write_contact_sheet(report: DoctorReport, file: Path, *, with_masks: bool = False) -> int:
    """Write the sheet as a PNG: as many pictures as there is room for, of every size some.

    Args:
        report: of an examination that knew at which sizes pictures are trained.
        file: to write.
        with_masks: whether masks count.

    Returns:
        How many pictures are left out.

    Raises:
        ValueError: no picture has a size.
    """
    if not report.sized:
        raise ValueError(f"{file}: nothing to draw; expected pictures, and a base or a resolution to train them at")
    buckets = by_size(report.sized)
    room = _shares([len(inside) for inside in buckets.values()], CELLS)
    chosen = {size: inside[:count] for (size, inside), count in zip(buckets.items(), room, strict=True)}
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        drawn = {
            size: list(pool.map(lambda example: _cell(example, with_masks=with_masks), inside))
            for size, inside in chosen.items()
        }
    sheet = _stacked(report, drawn, {size: len(inside) for size, inside in buckets.items()})
    made = io.BytesIO()
    sheet.save(made, format="PNG")
    write_atomically(file, made.getvalue())
    return len(report.sized) - sum(room)


def _shares(counts: Sequence[int], room: int) -> list[int]:
    """How many of each are shown: all, or in turn one of each until there is no more room."""
    shares = [0] * len(counts)
    while room and shares != list(counts):
        for index, count in enumerate(counts):
            if room and shares[index] < count:
                shares[index], room = shares[index] + 1, room - 1
    return shares


def _stacked(
    report: DoctorReport, drawn: Mapping[tuple[int, int], list[Image.Image]], counts: Mapping[tuple[int, int], int]
) -> Image.Image:
    by_bucket = by_size(report.sized)
    total, cells = sum(counts.values()), sum(map(len, drawn.values()))
    more = "" if cells == total else f"; {cells} shown, {total - cells} left out"
    strips = [_strip(f"{total} trained by {report.sizes_of}{more}")]
    for size, inside in drawn.items():
        if inside:
            mean, most = cut_share(by_bucket[size])
            rest = f", {counts[size] - len(inside)} not shown" if counts[size] > len(inside) else ""
            line = f"{size[0]}x{size[1]}: {counts[size]}{rest}; cut off {mean:.1f} %, at most {most:.1f} %"
            strips += [_strip(line), grid([inside[at : at + COLUMNS] for at in range(0, len(inside), COLUMNS)])]
    sheet = Image.new("RGB", (COLUMNS * _CELL, sum(strip.height for strip in strips)), _WHITE)
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _strip(text: str) -> Image.Image:
    """A line over a size's pictures."""
    strip = Image.new("RGB", (COLUMNS * _CELL, _HEAD), (226, 232, 240))
    _write(ImageDraw.Draw(strip), (_EDGE, 6), text, COLUMNS * _CELL)
    return strip


def _cell(example: Example, *, with_masks: bool) -> Image.Image:
    """A picture with its frame, size and the first words of its caption."""
    picture = read_image(example.path)
    inner = _CELL - 2 * _EDGE
    scale = min(inner / picture.width, inner / picture.height)
    small = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    pixels = np.asarray(picture.resize(small, Image.Resampling.BOX)).astype(np.float32)
    mask = read_mask(example.path, example.mask, picture.size) if with_masks else None
    if mask is not None:
        outside = 1 - np.asarray(mask.resize(small, Image.Resampling.BOX)).astype(np.float32)[..., None] / 255
        pixels = pixels * (1 - 0.6 * outside) + 0.6 * outside * np.array(_OUTSIDE, np.float32)
    box = _kept(example, picture.size, small)
    kept = np.zeros((*pixels.shape[:2], 1), bool)
    kept[box[1] : box[3], box[0] : box[2]] = True
    shown_picture = Image.fromarray(np.where(kept, pixels, pixels * _DARK).round().astype(np.uint8))
    ImageDraw.Draw(shown_picture).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=_FRAME)
    cell = Image.new("RGB", (_CELL, _CELL + 2 * _LINE), _WHITE)
    cell.paste(shown_picture, ((_CELL - small[0]) // 2, (_CELL - small[1]) // 2))
    draw = ImageDraw.Draw(cell)
    _write(draw, (_EDGE, _CELL - 2), f"{example.size[0]}x{example.size[1]}, {example.path.name}", inner)
    _write(draw, (_EDGE, _CELL + _LINE - 3), example.caption, inner)
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
