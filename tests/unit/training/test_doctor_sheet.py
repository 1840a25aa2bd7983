"""The contact sheet: whole pictures with what is kept of them, what is cut dark, what a mask leaves out red."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dora_diffusion.cli import main
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.doctor import contact_sheet, examine, examine_config
from dora_diffusion.training.data.doctor.contact_sheet import _CELL, _HEAD, _LINE, CELLS, COLUMNS, write_contact_sheet

PHOTOS = Path(__file__).parents[4] / "shared" / "data" / "dreambooth"


def plain(path: Path, size: tuple[int, int], colour: tuple[int, int, int] = (100, 200, 100)) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def cell(sheet: np.ndarray, number: int = 0) -> np.ndarray:
    """The picture of a cell of the first row."""
    left = number * _CELL
    return sheet[_HEAD : _HEAD + _CELL, left : left + _CELL].astype(int)


def sheet_of(tmp_path: Path, **data: object) -> np.ndarray:
    keys = {"instance_dir": tmp_path / "in", "instance_prompt": "a robot", **data}
    config = TrainConfig.model_validate({"output_dir": tmp_path / "run", "data": keys})
    file = tmp_path / "sheet.png"
    assert write_contact_sheet(examine_config(config), file, with_masks="mask_outside" in data) == 0
    return np.asarray(Image.open(file))


def test_what_is_cut_off_is_dark_and_the_middle_is_kept(tmp_path: Path) -> None:
    plain(tmp_path / "in" / "1.png", (400, 200))
    shown = cell(sheet_of(tmp_path, buckets=False))  # 168 x 84 in the middle of the cell
    middle = shown[_CELL // 2]
    bright = np.flatnonzero((middle == (100, 200, 100)).all(axis=1))
    dark = np.flatnonzero((middle == (30, 60, 30)).all(axis=1))
    assert (bright.min(), bright.max()) == (47, 128)  # 84 of 168 pixels, in a frame of one pixel
    assert (dark.min(), dark.max()) == (4, 171)
    assert len(dark) == 84
    assert (middle[[46, 129]] == (255, 196, 0)).all()


def test_nothing_is_dark_where_the_bucket_has_the_pictures_shape(tmp_path: Path) -> None:
    plain(tmp_path / "in" / "1.png", (400, 200))
    shown = cell(sheet_of(tmp_path))
    assert not (shown == (30, 60, 30)).all(axis=2).any()
    assert (shown == (100, 200, 100)).all(axis=2).sum() == 166 * 82


def test_what_a_mask_leaves_out_is_red(tmp_path: Path) -> None:
    plain(tmp_path / "in" / "1.png", (128, 128))
    half = Image.new("L", (128, 128))
    half.paste(255, (0, 0, 64, 128))
    half.save(tmp_path / "in" / "1_mask.png")
    shown = cell(sheet_of(tmp_path, mask_outside=0.0))
    assert (shown[88, 40] == (100, 200, 100)).all()
    assert (shown[88, 140] == (172, 103, 63)).all()  # four tenths of it, and six of red


def test_every_size_is_shown_and_how_many_are_left_out_is_said(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(contact_sheet, "CELLS", 5)
    for number in range(8):
        plain(tmp_path / "in" / f"{number}.png", (128, 128), (number, 0, 0))
    plain(tmp_path / "in" / "wide.png", (256, 128))
    report = examine(tmp_path / "in", instance_prompt="x", model="pocket")
    file = tmp_path / "sheet.png"
    assert write_contact_sheet(report, file) == 4
    with Image.open(file) as sheet:
        assert sheet.size == (COLUMNS * _CELL, _HEAD + _CELL + 2 * _LINE + 2)
    arguments = ["doctor", str(tmp_path / "in"), "--instance-prompt", "x", "--model", "pocket", "--sheet", str(file)]
    assert main(arguments) == 0
    assert capsys.readouterr().out.endswith(f"wrote {file}, 4 pictures left out\n")


def test_two_hundred_are_shared_among_sizes() -> None:
    assert CELLS == 200
    assert contact_sheet._shares([500, 3, 90], 200) == [107, 3, 90]
    assert contact_sheet._shares([4, 2], 200) == [4, 2]
    assert sum(contact_sheet._shares([1] * 300, 200)) == 200


def test_names_and_captions_of_any_signs_are_drawn(tmp_path: Path) -> None:
    plain(tmp_path / "in" / "\u732b\n\x1b[31m.png", (64, 64))
    (tmp_path / "in" / "\u732b\n\x1b[31m.txt").write_text("\u732b \U0001f408 " * 30)
    assert sheet_of(tmp_path).shape[1] == COLUMNS * _CELL


def test_without_a_size_there_is_nothing_to_draw(tmp_path: Path) -> None:
    plain(tmp_path / "in" / "1.png", (64, 64))
    with pytest.raises(ValueError, match="sheet.png: nothing to draw"):
        write_contact_sheet(examine(tmp_path / "in", instance_prompt="x"), tmp_path / "sheet.png")


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no folder shared/data/dreambooth beside the repository")
def test_a_sheet_of_photos(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, file in enumerate(sorted((PHOTOS / "dog").glob("*.jpg"))):
        with Image.open(file) as photo:
            photo.crop((0, 0, photo.width, photo.height * (5 - number) // 6)).save(tmp_path / "in" / file.name)
    sheet = sheet_of(tmp_path, buckets=False, resolution=512)
    for number, file in enumerate(sorted((tmp_path / "in").glob("*.jpg"))):  # bright in the middle, dark at both sides
        with Image.open(file) as photo:
            height = round(photo.height * (_CELL - 8) / photo.width)
        rows = cell(sheet, number)[_CELL // 2 - height // 2 + 2 : _CELL // 2 + height // 2 - 2].mean(axis=(0, 2))
        side = (_CELL - height) // 2
        assert rows[6 : side - 4].mean() < 0.5 * rows[side + 4 : _CELL - side - 4].mean(), file.name
