"""read_image on pictures of every kind, good and bad: right pixels, or one line that names the file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dora_diffusion.utils.images import FORMATS, fit, frame_of, list_images, read_image

Transpose = Image.Transpose

# EXIF orientation -> how an upright picture is turned for storing, so that the tag turns it back.
TURNED = {
    1: None,
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_90,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_270,
}

# Format -> what it needs to keep pixels (nearly) as they are, and how far they may be off.
EXACT: dict[str, tuple[str, dict[str, Any], int]] = {
    "PNG": (".png", {}, 0),
    "TIFF": (".tif", {}, 0),
    "WEBP": (".webp", {"lossless": True}, 0),
    "JPEG": (".jpg", {"quality": 100, "subsampling": 0}, 4),
    "AVIF": (".avif", {"quality": 100, "subsampling": "4:4:4"}, 2),
}


def upright() -> NDArray[np.uint8]:
    """(40, 60, 3): three different patches, so that no turn or mirroring looks like another."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:10] = (250, 30, 40)
    pixels[10:, :20] = (20, 200, 60)
    pixels[30:, 40:] = (10, 40, 240)
    return pixels


def pixels_of(path: Path) -> NDArray[np.uint8]:
    picture = read_image(path)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def error_of(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_image(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", [name for name in EXACT if name in FORMATS])
@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation(tmp_path: Path, name: str, orientation: int) -> None:
    suffix, options, tolerance = EXACT[name]
    turn = TURNED[orientation]
    stored = Image.fromarray(upright())
    stored = stored if turn is None else stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned{suffix}"
    stored.save(path, exif=exif, **options)
    pixels = pixels_of(path)
    assert pixels.shape == (40, 60, 3)
    assert np.abs(pixels.astype(int) - upright()).max() <= tolerance


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    grey = np.linspace(0, 65535, 2400).reshape(40, 60).astype(np.uint16)
    path = tmp_path / f"grey{suffix}"
    if suffix == ".pgm":
        path.write_bytes(b"P5 60 40 65535\n" + grey.astype(">u2").tobytes())
    else:
        Image.fromarray(grey).save(path)
    expected = np.round(grey / 257).astype(np.uint8)
    np.testing.assert_array_equal(pixels_of(path), np.stack([expected] * 3, axis=-1))


def test_16_bit_grey_with_orientation_and_a_clear_grey(tmp_path: Path) -> None:
    grey = np.arange(6, dtype=np.uint16).reshape(2, 3) * 10000
    exif = Image.Exif()
    exif[0x0112] = 3
    path = tmp_path / "grey.png"
    Image.fromarray(grey[::-1, ::-1].copy()).save(path, exif=exif, transparency=10000)
    np.testing.assert_array_equal(pixels_of(path)[..., 0], [[0, 255, 78], [117, 156, 195]])


def test_alpha_is_laid_on_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (3, 1))
    picture.putdata([(255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 51)])
    picture.save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(pixels_of(tmp_path / "alpha.png"), [[[255, 0, 0], [255] * 3, [204] * 3]])


@pytest.mark.parametrize("mode", ["LA", "L", "RGB", "P"])
def test_other_kinds_of_transparency_are_laid_on_white(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "clear.png"
    if mode == "LA":
        picture = Image.new("LA", (2, 1))
        picture.putdata([(10, 0), (10, 255)])
        picture.save(path)
        dark = 10
    else:
        picture = Image.new("RGB", (2, 1))
        picture.putdata([(200, 200, 200), (0, 0, 0)])
        picture = picture.convert(mode)
        picture.save(path, transparency=picture.getpixel((0, 0)))
        dark = 0
    np.testing.assert_array_equal(pixels_of(path), [[[255] * 3, [dark] * 3]])


def test_palette_with_several_alphas(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putdata([0, 1])
    picture.save(tmp_path / "palette.png", transparency=bytes([0, 255]))
    np.testing.assert_array_equal(pixels_of(tmp_path / "palette.png"), [[[255, 255, 255], [0, 0, 255]]])


@pytest.mark.parametrize("suffix", [".tif", ".jpg"])
def test_cmyk(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"print{suffix}"
    options: dict[str, Any] = {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {}
    Image.fromarray(upright()).convert("CMYK").save(path, **options)
    with Image.open(path) as stored:
        assert stored.mode == "CMYK"
    assert np.abs(pixels_of(path).astype(int) - upright()).mean() < 1


def test_one_bit_and_grey(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(tmp_path / "one.png")
    Image.fromarray(np.array([[7, 250]], np.uint8)).save(tmp_path / "grey.bmp")
    np.testing.assert_array_equal(pixels_of(tmp_path / "one.png"), [[[0] * 3, [255] * 3]])
    np.testing.assert_array_equal(pixels_of(tmp_path / "grey.bmp"), [[[7] * 3, [250] * 3]])


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_the_first_frame_of_several(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    path = tmp_path / f"moving{suffix}"
    options: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as stored:
        assert getattr(stored, "n_frames", 1) == 3
    np.testing.assert_array_equal(pixels_of(path), np.full((8, 8, 3), (255, 0, 0)))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".gif", ".tif", ".ppm", ".avif"])
def test_a_truncated_file_is_an_error(tmp_path: Path, suffix: str, share: float) -> None:
    if suffix == ".avif" and "AVIF" not in FORMATS:
        pytest.skip("this Pillow reads no AVIF")
    path = tmp_path / f"cut{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    assert pixels_of(path).shape == (60, 80, 3)  # whole, it reads
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    error_of(path)


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    assert error_of(tmp_path / "empty.png") == "cannot be read as a picture (an empty file (0 bytes)); save it anew"
    (tmp_path / "text.png").write_text("a photo of a dog")
    assert error_of(tmp_path / "text.png").startswith("not a picture, or damaged; expected one of PNG, JPEG, ")
    assert error_of(tmp_path / "gone.png") == "no such file"
    (tmp_path / "folder.png").mkdir()
    assert "Is a directory" in error_of(tmp_path / "folder.png")


def test_a_format_outside_the_list_is_not_decoded(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png", format="TGA")
    with Image.open(tmp_path / "picture.png") as stored:
        assert stored.format == "TGA"  # Pillow would
    assert error_of(tmp_path / "picture.png").startswith("not a picture")


@pytest.mark.parametrize("pixels", [1001, 2001])  # Pillow warns above its limit, and refuses above twice of it
def test_a_decompression_bomb_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: int) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (pixels, 1)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert error_of(path) == "too large, expected at most 1000 pixels; make it smaller"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    assert read_image(path).size == (pixels, 1)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_samples_of_unknown_range_are_an_error(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "science.tif")
    assert f"32-bit samples (mode {mode}), expected 8 or 16 bits" in error_of(tmp_path / "science.tif")


def test_a_line_break_in_a_name_stays_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a\nb\x1b[31m.png"
    path.write_text("no")
    with pytest.raises(ValueError) as caught:
        read_image(path)
    assert str(caught.value).isprintable()


def test_list_images_is_natural_and_by_suffix(tmp_path: Path) -> None:
    for name in ["img10.png", "img2.PNG", "img1.jpeg", "Img3.webp", ".hidden.png", "notes.txt", "b.heic"]:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["img1.jpeg", "img2.PNG", "Img3.webp", "img10.png"]


def test_list_images_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as empty:
        list_images(tmp_path)
    assert str(empty.value).startswith(f"{tmp_path}: got no files, expected pictures (")
    (tmp_path / "1.heic").write_bytes(b"")
    with pytest.raises(ValueError) as others:
        list_images(tmp_path)
    assert str(others.value).startswith(f"{tmp_path}: got 1 other files, 1.heic first, expected pictures (")
    with pytest.raises(ValueError) as missing:
        list_images(tmp_path / "gone")
    assert str(missing.value) == f"{tmp_path / 'gone'}: no such folder, expected a folder of pictures"


def halves() -> Image.Image:
    """40 x 20: red on the left, blue on the right."""
    picture = Image.new("RGB", (40, 20), (255, 0, 0))
    picture.paste((0, 0, 255), (20, 0, 40, 20))
    return picture


@pytest.mark.parametrize("lies", [True, False])
@pytest.mark.parametrize(
    ("place", "pixel", "colour"),
    [(None, 0, (255, 0, 0)), (None, 7, (0, 0, 255)), (0.0, 4, (255, 0, 0)), (1.0, 3, (0, 0, 255))],
)
def test_fit_covers_and_crops(lies: bool, place: float | None, pixel: int, colour: tuple[int, ...]) -> None:
    picture = halves() if lies else halves().transpose(Transpose.TRANSPOSE)
    offset = None if place is None else (place, 0.5) if lies else (0.5, place)
    fitted = fit(picture, size=(8, 8), crop="center" if offset is None else "random", offset=offset)
    assert fitted.size == (8, 8)
    assert fitted.getpixel((pixel, 4) if lies else (4, pixel)) == colour


def test_fit_keeps_a_picture_of_the_right_size_as_it_is() -> None:
    picture = Image.fromarray(upright())
    np.testing.assert_array_equal(np.asarray(fit(picture, size=(60, 40))), upright())


def test_fit_never_steps_over_the_edge() -> None:
    picture = Image.new("RGB", (97, 61))
    for width in range(1, 40):
        for height in range(1, 40):
            assert fit(picture, size=(width, height), crop="random", offset=(1.0, 1.0)).size == (width, height)


def test_fit_refuses_an_offset_that_would_not_be_used() -> None:
    with pytest.raises(ValueError, match=r"offset: got \(0, 0\) with crop='center', expected one with 'random' only"):
        fit(halves(), size=(8, 8), crop="center", offset=(0, 0))
    with pytest.raises(ValueError, match="offset: got None with crop='random'"):
        fit(halves(), size=(8, 8), crop="random")


@pytest.mark.parametrize(
    ("original", "size", "offset", "expected"),
    [
        ((64, 48), (64, 48), None, (48, 64, 0, 0, 48, 64)),
        ((200, 100), (50, 50), None, (100, 200, 0, 25, 50, 50)),
        ((200, 100), (50, 50), (1.0, 0.0), (100, 200, 0, 50, 50, 50)),
        ((100, 200), (50, 50), (0.3, 0.5), (200, 100, 25, 0, 50, 50)),
    ],
)
def test_a_frame_is_original_size_crop_and_size(original, size, offset, expected) -> None:
    assert frame_of(original, size=size, offset=offset) == expected
