"""The doctor finds what is wrong with a folder, and nothing in a sound one."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dora_diffusion.training.data.doctor import DoctorReport, examine, format_report
from dora_diffusion.training.data.examples import find_examples

PHOTOS = Path(__file__).parents[4] / "shared" / "data" / "dreambooth"


def picture(path: Path, *, seed: int, size: tuple[int, int] = (96, 96)) -> Path:
    """Coarse colour patches: pictures of other seeds look other."""
    patches = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def found(report: DoctorReport) -> list[tuple[str, str]]:
    return [(finding.kind, finding.path.relative_to(report.folder).as_posix()) for finding in report.findings]


def test_a_sound_folder(tmp_path: Path) -> None:
    for index in range(3):
        picture(tmp_path / f"{index}.png", seed=index)
        (tmp_path / f"{index}.txt").write_text("a dog")
    for name in ("README.md", "LICENSE", "credits.txt", "Thumbs.db", ".DS_Store"):
        (tmp_path / name).write_text("not for training")
    report = examine(tmp_path)
    assert report == DoctorReport(tmp_path, 3, ((96, 96),) * 3, ())
    assert report.losses == ()
    assert format_report(report) == (
        f"{tmp_path}: 3 pictures\nwidths 96-96, heights 96-96 pixels; 3 square\nnothing would be lost"
    )


def test_every_kind_of_fault(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", seed=1)
    (tmp_path / "1.txt").write_text("  \n")
    picture(tmp_path / "2.png", seed=2)
    (tmp_path / "3.png").write_bytes((tmp_path / "2.png").read_bytes())
    picture(tmp_path / "4.jpg", seed=2, size=(80, 80))
    picture(tmp_path / "5.png", seed=5, size=(100, 20))
    (tmp_path / "6.png").write_text("text")
    picture(tmp_path / "7.png", seed=7, size=(64, 64))
    (tmp_path / "7.txt").write_bytes(b"caf\xe9")
    for index in (2, 3, 4, 5, 6):
        (tmp_path / f"{index}.txt").write_text("a dog")
    picture(tmp_path / "8.png", seed=8)
    (tmp_path / "80.txt").write_text("whose?")
    (tmp_path / "clip.mp4").write_bytes(b"video")
    (tmp_path / "phone.heic").write_bytes(b"heic")
    Image.new("RGB", (80, 80)).save(tmp_path / "photo.data", format="PNG")
    picture(tmp_path / "more" / "9.png", seed=9)
    (tmp_path / "notes").mkdir()

    report = examine(tmp_path)
    assert report.images == 8
    assert report.sizes == ((96, 96), (96, 96), (96, 96), (80, 80), (100, 20), (64, 64), (96, 96))
    assert found(report) == [
        ("corrupt", "6.png"),
        ("corrupt", "7.txt"),
        ("missing-caption", "8.png"),
        ("empty-caption", "1.png"),
        ("orphan-caption", "80.txt"),
        ("not-an-image", "clip.mp4"),
        ("not-an-image", "phone.heic"),
        ("not-an-image", "photo.data"),
        ("subfolder", "more"),
        ("duplicate", "3.png"),
        ("duplicate", "4.jpg"),
        ("tiny", "5.png"),
        ("odd-shape", "5.png"),
    ]
    assert report.losses == report.findings[:9]
    messages = [finding.message for finding in report.findings]
    assert messages[0].startswith("not a picture, or damaged; ")
    assert messages[1:] == [
        "not UTF-8 text (byte 3); save it as UTF-8",
        "no 8.txt, no line in metadata.jsonl, no instance prompt",
        "its caption is empty; write one, or remove it to use the instance prompt",
        "a caption without a picture of its name",
        "neither a picture nor a caption; it is not used",
        "HEIC is not read; save it as JPEG or PNG",
        "a picture, but the suffix '.data' is not one of a picture; rename it",
        "pictures in it are not used (1); move them up",
        "the same bytes as 2.png; keep one of them",
        "nearly the same picture as 2.png; keep one of them",
        "100x20 pixels, expected at least 64 on the shorter side",
        "100x20 pixels, longer than 4:1: at least 20 % of it is cut off",
    ]
    lines = format_report(report).splitlines()
    assert lines[:4] == [
        f"{tmp_path}: 8 pictures",
        "widths 64-100, heights 20-96 pixels; 6 square, 1 landscape",
        "found: 2 corrupt, 1 missing-caption, 1 empty-caption, 1 orphan-caption, 3 not-an-image, 1 subfolder, "
        "2 duplicate, 1 tiny, 1 odd-shape",
        f"  corrupt: 6.png: {messages[0]}",
    ]
    assert len(lines) == 3 + 13 + 1
    assert lines[-1] == "9 of these would be lost, or make training fail: mend them first"


def test_an_instance_prompt_is_the_caption_of_all(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", seed=1)
    assert found(examine(tmp_path)) == [("missing-caption", "1.png")]
    assert found(examine(tmp_path, instance_prompt="a dog")) == []


def test_a_bad_metadata_line_is_one_finding(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", seed=1)
    picture(tmp_path / "2.png", seed=2)
    rows = [{"file_name": "1.png", "text": "one"}, {"file_name": "gone.png", "text": "two"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    report = examine(tmp_path)
    assert found(report) == [("corrupt", "metadata.jsonl")]
    assert report.findings[0].message == (
        f"line 2: file_name 'gone.png' is no picture in {tmp_path}; mend or remove the line"
    )


def test_pictures_that_metadata_names_in_a_subfolder_are_used(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "1.png", seed=1)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "images/1.png", "text": "one"}\n')
    assert examine(tmp_path) == DoctorReport(tmp_path, 1, ((96, 96),), ())


def test_the_size_is_that_of_the_upright_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 64)).save(tmp_path / "1.jpg", exif=exif)
    assert examine(tmp_path, instance_prompt="a dog").sizes == ((64, 100),)


def test_min_side(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", seed=1)
    assert found(examine(tmp_path, instance_prompt="a dog", min_side=96)) == []
    assert found(examine(tmp_path, instance_prompt="a dog", min_side=97)) == [("tiny", "1.png")]


@pytest.mark.parametrize("change", ["resaved", "halved", "brighter"])
def test_near_duplicates(tmp_path: Path, change: str) -> None:
    path = picture(tmp_path / "1.png", seed=1)
    with Image.open(path) as stored:
        other = stored.convert("RGB")
    if change == "halved":
        other = other.resize((48, 48), Image.Resampling.LANCZOS)
    if change == "brighter":
        other = other.point([min(255, value * 11 // 10) for value in range(256)] * 3)
    other.save(tmp_path / "2.jpg", quality=60)
    assert found(examine(tmp_path, instance_prompt="a dog", min_side=1)) == [("duplicate", "2.jpg")]


def test_the_same_shape_in_other_colours_is_no_duplicate(tmp_path: Path) -> None:
    for name, background in (("1.png", (255, 160, 40)), ("2.png", (255, 230, 60))):
        drawing = Image.new("RGB", (96, 96), background)
        drawing.paste((20, 20, 20), (30, 30, 60, 70))
        drawing.save(tmp_path / name)
    assert found(examine(tmp_path, instance_prompt="a square")) == []


def test_a_name_with_control_codes_stays_one_line(tmp_path: Path) -> None:
    picture(tmp_path / "a\n\x1b[31mb.png", seed=1)
    text = format_report(examine(tmp_path))
    assert len(text.splitlines()) == 5
    assert text.replace("\n", "").isprintable()


def test_no_losses_means_that_training_finds_all(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", seed=1)
    for damage in (None, b"", b" ", b"\xff", b"a dog"):
        sidecar = tmp_path / "1.txt"
        if damage is not None:
            sidecar.write_bytes(damage)
        try:
            find_examples(tmp_path, instance_prompt=None)
        except ValueError:
            assert examine(tmp_path).losses != ()
        else:
            assert examine(tmp_path).losses == ()


def test_no_folder_and_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder, expected a folder of pictures"):
        examine(tmp_path / "gone")
    with pytest.raises(ValueError, match="got no files, expected pictures"):
        examine(tmp_path)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no folder shared/data/dreambooth beside the repository")
@pytest.mark.parametrize(("subject", "count"), [("dog", 5), ("teapot", 5), ("vase", 6)])
def test_real_photos_are_sound(subject: str, count: int) -> None:
    report = examine(PHOTOS / subject, instance_prompt=f"a {subject}")
    assert (report.images, report.findings) == (count, ())
    assert found(examine(PHOTOS / subject)) == [("missing-caption", f"0{index}.jpg") for index in range(count)]
