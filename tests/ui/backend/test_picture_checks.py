"""Pictures and masks that a browser sends."""

from pathlib import Path

import pytest
from PIL import Image

from ui.backend.picture_checks import check_canvas

DOT = Image.new("L", (4, 4), 255)


def test_canvases(tmp_path: Path) -> None:
    assert check_canvas(None) is None
    canvas = check_canvas(DOT, DOT.convert("RGB"))
    assert canvas is not None and (canvas.image.mode, canvas.mask and canvas.mask.mode) == ("RGB", "L")
    with pytest.raises(ValueError, match="^mask: there is no picture to draw in; give one, or take the mask off$"):
        check_canvas(None, DOT)
    with pytest.raises(ValueError, match="^picture: got 9000 x 1 pixels, expected at most 8192 a side$"):
        check_canvas(Image.new("L", (9000, 1)))
    (tmp_path / "x.png").write_text("no picture")
    with pytest.raises(ValueError, match="^picture: not a picture that can be read"):
        check_canvas(tmp_path / "x.png")


def test_a_picture_by_path_is_upright_and_on_white(tmp_path: Path) -> None:
    turned, clear = Image.new("RGB", (40, 20), "red"), Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn, as phones write it
    turned.save(tmp_path / "turned.jpg", exif=exif)
    clear.save(tmp_path / "clear.png")
    upright, white = check_canvas(tmp_path / "turned.jpg"), check_canvas(tmp_path / "clear.png")
    assert upright is not None and upright.image.size == (20, 40)
    assert white is not None and white.image.getpixel((0, 0)) == (255, 255, 255)
