"""Sheets: those of one size lie as they always did, those of several in columns and rows that hold them."""

import numpy as np
from PIL import Image

from dora_diffusion.utils.image_grid import grid


def plain(width: int, height: int, shade: int) -> Image.Image:
    return Image.new("RGB", (width, height), (shade, 0, 0))


def reds(sheet: Image.Image) -> np.ndarray:
    return np.asarray(sheet)[..., 0]


def test_pictures_of_one_size_fill_it() -> None:
    sheet = grid([[plain(8, 6, 10), plain(8, 6, 20)], [plain(8, 6, 30)]])
    expected = np.full((12, 16), 255)
    expected[:6, :8], expected[:6, 8:], expected[6:, :8] = 10, 20, 30
    assert np.array_equal(reds(sheet), expected)


def test_pictures_of_several_sizes_do_not_cover_one_another() -> None:
    sheet = grid([[plain(8, 6, 10), plain(4, 12, 20)], [plain(10, 2, 30), plain(6, 4, 40)]])
    assert sheet.size == (10 + 6, 12 + 4)
    expected = np.full((16, 16), 255)
    expected[:6, :8], expected[:12, 10:14], expected[12:14, :10], expected[12:16, 10:16] = 10, 20, 30, 40
    assert np.array_equal(reds(sheet), expected)
