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
    """Pictures side by side, a row each, with optional labels over the columns.

    Those of other sizes lie in columns as wide as the widest of each, in rows as high as the highest.
    """
    columns = [max(row[x].width for row in rows if x < len(row)) for x in range(max(map(len, rows)))]
    heights = [max(picture.height for picture in row) for row in rows]
    top = label_row(labels, columns[0]) if labels else None
    offset = top.height if top else 0
    sheet = Image.new("RGB", (sum(columns), sum(heights) + offset), "white")
    if top:
        sheet.paste(top, (0, 0))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (sum(columns[:x]), offset + sum(heights[:y])))
    return sheet
