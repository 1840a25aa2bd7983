"""Examples and captions, pixels, the order of steps, and the split for validation."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from dora_diffusion.training.config import DataConfig
from dora_diffusion.training.data.concepts import split_validation
from dora_diffusion.training.data.examples import Example, check_words, find_examples
from dora_diffusion.training.data.order import StepSampler
from dora_diffusion.training.data.views import View, fresh_view, load_sample

PHOTOS = Path(__file__).parents[4] / "shared" / "data" / "dreambooth"


def picture(path: Path, colour: tuple[int, int, int] = (200, 100, 0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def write_metadata(folder: Path, *rows: object) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def error_of(folder: Path, instance_prompt: str | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        find_examples(folder, instance_prompt=instance_prompt)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(folder), "FOLDER")


def test_captions_by_precedence(tmp_path: Path) -> None:
    for name in ("10.png", "9.png", "8.png", "7.png", "6.jpg"):
        picture(tmp_path / name)
    (tmp_path / "10.txt").write_bytes("\ufeffa dog\r\non a café's roof \n".encode())
    (tmp_path / "6.TXT").write_text("six")
    write_metadata(
        tmp_path,
        {"file_name": "10.png", "text": "not this"},
        {"file_name": "9.png", "prompt": "third", "caption": "second", "text": "first"},
        "",
        {"file_name": "8.png", "prompt": "by prompt", "width": 8},
    )
    assert find_examples(tmp_path, instance_prompt="a sks dog") == [
        Example(tmp_path / "6.jpg", "six"),
        Example(tmp_path / "7.png", "a sks dog"),
        Example(tmp_path / "8.png", "by prompt"),
        Example(tmp_path / "9.png", "first"),
        Example(tmp_path / "10.png", "a dog", ("on a café's roof",)),
    ]


def test_metadata_may_name_pictures_in_subfolders(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "2.png")
    picture(tmp_path / "images" / "unnamed.png")
    write_metadata(tmp_path, {"file_name": "images/2.png", "text": "two"})
    assert find_examples(tmp_path, instance_prompt=None) == [Example(tmp_path / "images" / "2.png", "two")]
    picture(tmp_path / "1.png")
    assert find_examples(tmp_path, instance_prompt="one") == [
        Example(tmp_path / "1.png", "one"),
        Example(tmp_path / "images" / "2.png", "two"),
    ]


def test_pictures_without_a_caption_are_listed(tmp_path: Path) -> None:
    for index in range(5):
        picture(tmp_path / f"{index}.png")
    (tmp_path / "0.txt").write_text("zero")
    expected = "expected a .txt file beside each, a line in metadata.jsonl, or an instance prompt"
    assert error_of(tmp_path) == (
        f"FOLDER: 4 of 5 pictures have no caption, or an empty one (1.png, 2.png, 3.png ...); {expected}"
    )
    (tmp_path / "1.txt").write_text(" \n")  # an instance prompt does not paper over an empty caption
    assert error_of(tmp_path, "a dog") == (
        f"FOLDER: 1 of 5 pictures have no caption, or an empty one (1.png); {expected}"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{'file_name': '1.png'}", 'not JSON, expected {"file_name": "1.png", "text": "a dog"}'),
        ("[" * 100_000, 'not JSON, expected {"file_name": "1.png", "text": "a dog"}'),
        ([1], "got no file_name, expected the name of a picture"),
        ({"text": "a dog"}, "got no file_name, expected the name of a picture"),
        ({"file_name": 5, "text": "a dog"}, "got no file_name, expected the name of a picture"),
        ({"file_name": "gone.png"}, "file_name 'gone.png' is no picture in FOLDER; mend or remove the line"),
        ({"file_name": "x\0.png"}, "file_name 'x\\x00.png' is no picture in FOLDER; mend or remove the line"),
        (
            {"file_name": "n" * 300 + ".png"},
            f"file_name '{'n' * 300}.png' is no picture in FOLDER; mend or remove the line",
        ),
        ({"file_name": "notes.md"}, "file_name 'notes.md' is no picture in FOLDER; mend or remove the line"),
        (
            {"file_name": "../outside.png", "text": "a"},
            "file_name '../outside.png' leads out of the folder, expected a picture in it",
        ),
        (
            {"file_name": "/outside.png", "text": "a"},
            "file_name '/outside.png' leads out of the folder, expected a picture in it",
        ),
        ({"file_name": "1.png"}, "got none of them, expected a caption in one of text, caption, prompt"),
        ({"file_name": "1.png", "text": None}, "got None, expected a caption in one of text, caption, prompt"),
        ({"file_name": "0.png", "text": "a"}, "0.png is named twice, expected one line for each picture"),
    ],
)
def test_a_bad_line_of_metadata_is_named(tmp_path: Path, row: object, message: str) -> None:
    folder = tmp_path / "set"
    for path in (folder / "0.png", folder / "1.png", tmp_path / "outside.png"):
        picture(path)
    (folder / "notes.md").write_text("no picture")
    write_metadata(folder, {"file_name": "0.png", "text": "zero"}, row)
    assert error_of(folder, "a dog") == f"FOLDER/metadata.jsonl:2: {message}"


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "1.txt").write_bytes(b"caf\xe9")
    assert error_of(tmp_path) == "FOLDER/1.txt: not UTF-8 text (byte 3); save it as UTF-8"


def test_pixels_lie_in_minus_one_to_one(tmp_path: Path) -> None:
    path = tmp_path / "1.png"
    Image.fromarray(np.array([[[0, 51, 255], [255, 102, 0]]], np.uint8)).save(path)
    pixels = load_sample(Example(path, "a", size=(2, 1)), View()).pixels
    expected = torch.tensor([[[-1.0, 1.0]], [[-0.6, -0.2]], [[1.0, -1.0]]])
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
    assert pixels.dtype == torch.float32 and pixels.is_contiguous()
    flipped = load_sample(Example(path, "a", size=(2, 1)), View(flip=True)).pixels
    assert torch.equal(flipped, pixels.flip(-1))


def test_size_is_width_and_height(tmp_path: Path) -> None:
    path = picture(tmp_path / "1.png")
    sample = load_sample(Example(path, "a", size=(4, 6)), View())
    assert sample.pixels.shape == (3, 6, 4)


def test_only_a_random_crop_draws_and_the_same_seed_crops_the_same(tmp_path: Path) -> None:
    path = tmp_path / "1.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 60, 3), dtype=np.uint8)).save(path)
    example = Example(path, "a", size=(8, 8))
    rng = Random(7)
    assert fresh_view(DataConfig(instance_dir=tmp_path), rng) == View()
    assert rng.getstate() == Random(7).getstate()
    random = DataConfig(instance_dir=tmp_path, crop="random")
    crops = [load_sample(example, fresh_view(random, Random(seed))) for seed in (7, 7, 8)]
    assert torch.equal(crops[0].pixels, crops[1].pixels)
    assert not torch.equal(crops[0].pixels, crops[2].pixels)
    frames = [crop.frame.tolist() for crop in crops]
    assert frames[0] == frames[1] != frames[2]
    assert all(frame[:2] == [20, 60] and frame[2] == 0 and 0 <= frame[3] <= 16 for frame in frames)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "1.png"
    path.write_text("no")
    with pytest.raises(ValueError, match="1.png: not a picture"):
        load_sample(Example(path, "a", size=(8, 8)), View())


def batch_at(sampler: StepSampler, step: int) -> list[int]:
    return [place.sample for place in sampler.places_at(step)]


@pytest.mark.parametrize(("count", "batch_size"), [(5, 1), (5, 2), (5, 3), (4, 4), (3, 8), (1, 2)])
def test_each_example_once_an_epoch_across_batch_borders(count: int, batch_size: int) -> None:
    sampler = StepSampler([range(count)], batch_size=batch_size, seed=0)
    epochs = 6
    steps = -(-epochs * count // batch_size)
    seen = [index for step in range(steps) for index in batch_at(sampler, step)]
    for epoch in range(epochs):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_a_step_depends_on_seed_and_step_alone() -> None:
    sampler = StepSampler([range(7)], batch_size=3, seed=5)
    forwards = [batch_at(sampler, step) for step in range(40)]
    again = StepSampler([range(7)], batch_size=3, seed=5)
    assert [batch_at(again, step) for step in reversed(range(40))] == forwards[::-1]
    other = StepSampler([range(7)], batch_size=3, seed=6)
    assert [batch_at(other, step) for step in range(40)] != forwards
    # Written down, so that no change of Python or of this code silently breaks the resuming of old runs.
    assert forwards[:3] == [[6, 1, 0], [3, 2, 4], [5, 0, 6]]


def test_every_epoch_has_an_order_of_its_own() -> None:
    sampler = StepSampler([range(6)], batch_size=6, seed=0)
    orders = Counter(tuple(batch_at(sampler, epoch)) for epoch in range(50))
    assert len(orders) > 40
    first = Counter(order[0] for order in orders.elements())
    assert set(first) == set(range(6))


@pytest.mark.parametrize(("count", "batch_size"), [(0, 1), (3, 0)])
def test_nothing_to_sample_is_an_error(count: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match=rf"got \[{count}\] samples in batches of {batch_size}"):
        StepSampler([range(count)], batch_size=batch_size, seed=0)


def examples(count: int, folder: str = "a") -> list[Example]:
    return [Example(Path(folder) / f"{index}.png", "a dog") for index in range(count)]


@pytest.mark.parametrize(
    ("count", "share", "aside"), [(10, 0.0, 0), (10, 0.2, 2), (10, 0.01, 1), (10, 0.999, 9), (2, 0.1, 1), (2, 0.9, 1)]
)
def test_split_sizes(count: int, share: float, aside: int) -> None:
    split = split_validation(examples(count), share=share, seed=0)
    assert len(split.validation) == aside
    assert sorted([*split.train, *split.validation], key=lambda e: e.path.name) == examples(count)
    assert split.train == [example for example in examples(count) if example not in split.validation]


def test_split_goes_by_file_name() -> None:
    here = split_validation(examples(20), share=0.3, seed=0)
    there = split_validation(examples(20, "elsewhere")[::-1], share=0.3, seed=0)
    assert {e.path.name for e in there.validation} == {e.path.name for e in here.validation}
    other = split_validation(examples(20), share=0.3, seed=1)
    assert other.validation != here.validation


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range(share: float) -> None:
    with pytest.raises(ValueError, match="validation share: got .*, expected at least 0 and below 1"):
        split_validation(examples(4), share=share, seed=0)


def test_one_picture_cannot_be_parted() -> None:
    with pytest.raises(ValueError, match="validation share: got 0.5 of 1 picture, expected at least 2 pictures"):
        split_validation(examples(1), share=0.5, seed=0)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no folder shared/data/dreambooth beside the repository")
@pytest.mark.parametrize(("subject", "count"), [("dog", 5), ("teapot", 5), ("vase", 6)])
def test_real_photos(subject: str, count: int) -> None:
    found = find_examples(PHOTOS / subject, instance_prompt=f"a {subject}")
    assert [example.path.name for example in found] == [f"0{index}.jpg" for index in range(count)]
    pixels = load_sample(replace(found[0], size=(128, 96)), View(flip=True, offset=(0.3, 0.9))).pixels
    assert pixels.shape == (3, 96, 128)
    assert -1 <= pixels.min() < -0.2 and 0.2 < pixels.max() <= 1


def test_a_mirrored_crop_says_where_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "1.png"
    Image.new("RGB", (60, 20)).save(path)
    plain, mirrored = (
        load_sample(Example(path, "a", size=(8, 8)), View(flip, (0.3, 0.6))).frame for flip in (False, True)
    )
    assert plain[3] != mirrored[3] and plain[3] + mirrored[3] == 16  # 24 x 8, of which 8 are kept


def test_a_new_word_inside_another_is_refused(tmp_path: Path) -> None:
    examples = [Example(tmp_path / "1.png", "a ROB robot"), Example(tmp_path / "2.png", "a <zqx>, red")]
    check_words(["<zqx>"], examples)
    with pytest.raises(ValueError, match="'rob' stands inside another word of 'a ROB robot'"):
        check_words(["rob"], examples)
    with pytest.raises(ValueError, match="'cat' stands in none of the 2 captions"):
        check_words(["cat"], examples)
