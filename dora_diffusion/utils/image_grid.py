"""Sheets of pictures: rows and columns with labels."""

from collections.abc import Sequence

from PIL import Image, ImageDraw


def label_row(texts: Sequence[str], width: int, height: int = 18) -> Image.Image:
    """A white strip with one short text over each column of `width` pixels."""
    strip = Image.new("RGB", (width * len(texts), height), "white")
    draw = ImageDraw.Draw(strip)
    for column, text in enumerate(texts):
        draw.text((column * width + 4, 3), text[: max(1, width // 6 - 1)], fill="black")
    return strip


def grid(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str] = ()) -> Image.Image:
    """Pictures of one size side by side, a row each, with optional labels over the columns."""
    width, height = rows[0][0].size
    top = label_row(labels, width) if labels else None
    offset = top.height if top else 0
    sheet = Image.new("RGB", (width * max(map(len, rows)), height * len(rows) + offset), "white")
    if top:
        sheet.paste(top, (0, 0))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * width, offset + y * height))
    return sheet
