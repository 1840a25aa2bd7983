"""The picture to start from, without a browser: what is kept comes back bit for bit, and nothing else is taken."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed: pip install dora-diffusion[ui]")

from dora_diffusion.generation.img2img import Canvas  # noqa: E402  (after the skip above)
from dora_diffusion.generation.inputs import keep_input  # noqa: E402
from ui.generate.canvas import MAX_CHARACTERS, CanvasReader, canvas_value, has_picture  # noqa: E402
from ui.generate.painter import png_url  # noqa: E402

DOT = Image.new("L", (8, 6))
DOT.paste(255, (2, 2, 4, 4))


def _sent(picture: object, mask: object = "") -> str:
    return json.dumps({"picture": picture, "mask": mask})


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture of noise, which was uploaded."""
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def reader(photo: Path, tmp_path: Path) -> CanvasReader:
    """Knows that picture."""
    return CanvasReader(tmp_path / "out", lambda: {str(photo)})


@pytest.mark.parametrize("size", [(200, 120), (7, 311), (1, 1), (2500, 3)])
def test_what_is_kept_comes_back_bit_for_bit(reader: CanvasReader, size: tuple[int, int]) -> None:
    levels = np.random.default_rng(1).integers(0, 256, size[::-1], dtype=np.uint8)
    canvas = Canvas(Image.linear_gradient("L").convert("RGB"), Image.fromarray(levels))
    for picture in (canvas.image, canvas.mask):
        assert picture is not None
        keep_input(reader.output, picture)
    again = reader.read(canvas_value(canvas))
    assert again is not None and again.mask is not None
    assert (again.image.mode, again.mask.mode, again.mask.size) == ("RGB", "L", size)
    np.testing.assert_array_equal(np.asarray(again.image), np.asarray(canvas.image))
    np.testing.assert_array_equal(np.asarray(again.mask), levels)


def test_a_kept_mask_may_be_black_and_paint_may_not(reader: CanvasReader, photo: Path) -> None:
    black = Image.new("L", (4, 4))
    kept = reader.read(_sent(str(photo), f"kept:{keep_input(reader.output, black)}"))
    assert kept is not None and kept.mask is not None and kept.mask.tobytes() == black.tobytes()
    erased = reader.read(_sent(str(photo), png_url(black)))
    assert erased is not None and erased.mask is None


def test_an_upload_and_paint_are_read(reader: CanvasReader, photo: Path) -> None:
    canvas = reader.read(_sent(str(photo), png_url(DOT.convert("RGBA"))))
    assert canvas is not None and canvas.mask is not None
    with Image.open(photo) as picture:
        assert canvas.image.tobytes() == picture.tobytes()
    assert (canvas.mask.mode, canvas.mask.tobytes()) == ("L", DOT.tobytes())
    assert has_picture(_sent(str(photo)))
    for nothing in (None, "", _sent("")):
        assert reader.read(nothing) is None and not has_picture(nothing)


def test_an_upload_is_taken_as_the_page_shows_it(tmp_path: Path) -> None:
    turned, clear = tmp_path / "turned.jpg", tmp_path / "clear.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(turned, exif=exif)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(clear)
    reader = CanvasReader(tmp_path, lambda: {str(turned), str(clear)})
    upright, white = reader.read(_sent(str(turned))), reader.read(_sent(str(clear)))
    assert upright is not None and upright.image.size == (4, 8)
    assert white is not None and white.image.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        (5, "picture: got 5"),
        ({"picture": "/etc/passwd"}, "picture: got {'picture"),
        ("[" * 100_000, "picture: got '"),
        ("x" * (MAX_CHARACTERS + 1), "picture: got 2097153 characters"),
        ('{"picture": ""}', "expected the names of a picture and a mask"),
        (_sent(5), "expected the names of a picture and a mask"),
        (_sent("", png_url(DOT)), "mask: there is no picture to draw in"),
        (_sent("/etc/passwd"), "expected one that was uploaded"),
        (_sent("https://example.org/a.png"), "expected one that was uploaded"),
        (_sent("line\nbreak"), "expected one that was uploaded"),
        (_sent("kept:../../secret"), "a hash is no SHA-256"),
        (_sent(f"kept:{'ab' * 32}"), "is not in .* any more; put it in again"),
    ],
)
def test_what_the_page_never_sends_is_one_line(reader: CanvasReader, sent: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=rf"\A[^\n]*{complaint}[^\n]*\Z"):
        reader.read(sent)


@pytest.mark.parametrize(
    "mask",
    ["/etc/passwd", "kept:x", f"kept:{'ab' * 32}", png_url(Image.new("L", (2049, 1))), "data:image/png;base64,AAAA"],
)
def test_masks_that_are_none_are_one_line(reader: CanvasReader, photo: Path, mask: str) -> None:
    with pytest.raises(ValueError, match=r"\Amask: [^\n]*\Z"):
        reader.read(_sent(str(photo), mask))


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(b"no picture")])
def test_uploads_that_cannot_be_read_are_one_line(
    reader: CanvasReader, photo: Path, spoil: Callable[[Path], object]
) -> None:
    spoil(photo)
    with pytest.raises(ValueError, match=r"\Apicture: not a picture that can be read [^\n]*\Z"):
        reader.read(_sent(str(photo)))
