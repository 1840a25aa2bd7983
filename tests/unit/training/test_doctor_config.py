"""The doctor on all that a config names, with its base: sizes, masks, stems, captions, notes; it and training agree."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from dora_diffusion.cli import main
from dora_diffusion.training.base.sizes import Sizes
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.buckets import in_buckets
from dora_diffusion.training.data.concepts import checked_examples
from dora_diffusion.training.data.doctor import DoctorReport, examine, examine_config, format_report

POCKET = Sizes(128, 8, "sd1")


def picture(path: Path, *, seed: int, size: tuple[int, int] = (96, 96)) -> Path:
    """Coarse colour patches: pictures of other seeds look other."""
    patches = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def mask(path: Path, size: tuple[int, int] = (96, 96), *, box: tuple[int, int, int, int] = (0, 0, 40, 40)) -> Path:
    """White in a box."""
    path.parent.mkdir(exist_ok=True)
    made = Image.new("L", size)
    made.paste(255, box)
    made.save(path)
    return path


def config(tmp_path: Path, **data: object) -> TrainConfig:
    keys = {"instance_dir": tmp_path, "instance_prompt": "a robot", **data}
    return TrainConfig.model_validate({"output_dir": tmp_path / "run", "data": keys})


def found(report: DoctorReport) -> list[tuple[str, str]]:
    return [(finding.kind, finding.path.relative_to(report.folder).as_posix()) for finding in report.findings]


def test_a_sliver_of_10000x20_is_a_loss_with_and_without_a_base(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", seed=1)
    picture(tmp_path / "2.png", seed=2, size=(10_000, 20))
    for report in (examine(tmp_path, instance_prompt="x"), examine_config(config(tmp_path))):
        assert ("sliver", "2.png") in found(report)
        assert [finding.path.name for finding in report.losses] == ["2.png"]
    assert report.findings[0].message.startswith("10000x20 pixels, longer than 8:1, which training refuses")
    assert [example.path.name for example in report.sized] == ["1.png"]


def test_a_picture_smaller_than_the_least_bucket_is_a_loss_unless_it_is_made_larger(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", seed=1, size=(20, 6))
    assert ("too-small", "1.png") in found(examine_config(config(tmp_path)))
    report = examine_config(config(tmp_path, upscale=True))
    assert report.losses == ()
    assert len(report.sized) == 1


def test_a_shape_longer_than_4_to_1_is_cut_and_in_squares_one_longer_than_3_to_1(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", seed=1, size=(350, 100))
    picture(tmp_path / "2.png", seed=2, size=(500, 100))
    assert found(examine_config(config(tmp_path))) == [("odd-shape", "2.png")]
    report = examine_config(config(tmp_path, buckets=False))
    assert found(report) == [("odd-shape", "1.png"), ("odd-shape", "2.png")]
    assert report.findings[0].message == "350x100 pixels: cropped to a square, most of it is cut off"


def test_the_table_says_how_many_pictures_each_size_has_and_how_much_is_cut(tmp_path: Path) -> None:
    for seed, size in enumerate([(128, 128), (256, 128), (256, 128), (300, 200)]):
        picture(tmp_path / f"{seed}.png", seed=seed, size=size)
    report = examine_config(config(tmp_path, resolution=[64, 128]))
    split = checked_examples(config(tmp_path).data, seed=0)
    expected = in_buckets(split.train, config(tmp_path, resolution=[64, 128]).data, POCKET)
    assert [(one.path, one.size) for one in report.sized] == [(one.path, one.size) for one in expected]
    lines = format_report(report).splitlines()
    assert lines[2] == "trained by pocket at 64, 128, sides multiples of 8:"
    rows = lines[3 : 3 + len({one.size for one in expected})]
    assert sum(int(row.split()[0]) for row in rows) == len(expected)
    assert f"{2:6} of 176x88: nothing is cut off" in [row.strip().rjust(len(row) - 2) for row in rows]
    assert any(" of 64x64: nothing is cut off" in row for row in rows)


def test_masks_are_no_pictures_and_an_orphan_mask_is_a_loss(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", seed=1)
    mask(tmp_path / "1_mask.png")
    mask(tmp_path / "2-masklabel.png")
    picture(tmp_path / "3.png", seed=3)
    mask(tmp_path / "masks" / "3.png")
    mask(tmp_path / "masks" / "4.png")
    report = examine(tmp_path, instance_prompt="x")
    assert report.images == 2
    assert found(report) == [("orphan-mask", "2-masklabel.png"), ("orphan-mask", "masks/4.png")]
    assert len(report.losses) == 2


@pytest.mark.parametrize(
    ("size", "box", "message"),
    [
        ((96, 48), (0, 0, 40, 40), "a mask of 96x48 pixels, expected the shape of its picture, 96x96"),
        ((96, 96), (0, 0, 0, 0), "the mask is black all over"),
    ],
)
def test_a_mask_of_another_shape_or_black_all_over_is_a_loss(tmp_path: Path, size, box, message: str) -> None:
    picture(tmp_path / "1.png", seed=1)
    mask(tmp_path / "1_mask.png", size, box=box)
    for report in (examine(tmp_path, instance_prompt="x"), examine_config(config(tmp_path, mask_outside=0.0))):
        assert found(report) == [("bad-mask", "1_mask.png")]
        assert report.findings[0].message.startswith(message)
        assert report.losses == report.findings
    unused = examine_config(config(tmp_path))
    assert unused.findings == ()
    assert unused.notes == ("1 mask (1_mask.png) is not used; set data.mask_outside to use it",)


def test_an_alpha_channel_that_is_clear_all_over_is_a_bad_mask_where_masks_count(tmp_path: Path) -> None:
    Image.new("RGBA", (96, 96), (255, 0, 0, 0)).save(tmp_path / "1.png")
    assert found(examine_config(config(tmp_path, mask_outside=0.0))) == [("bad-mask", "1.png")]
    assert found(examine_config(config(tmp_path))) == []


def test_two_pictures_of_one_stem_share_a_caption(tmp_path: Path) -> None:
    picture(tmp_path / "1.jpg", seed=1)
    picture(tmp_path / "1.png", seed=2)
    assert found(examine(tmp_path, instance_prompt="x")) == []
    (tmp_path / "1.txt").write_text("a cat")
    report = examine(tmp_path)
    assert found(report) == [("same-stem", "1.png")]
    assert report.findings[0].message == "shares the caption 1.txt with 1.jpg; rename one of the pictures"
    assert report.losses == ()
    mask(tmp_path / "1_mask.png")
    assert [finding.message for finding in examine(tmp_path).findings] == [
        "shares the caption 1.txt with 1.jpg; rename one of the pictures",
        "shares the mask 1_mask.png with 1.jpg; rename one of the pictures",
    ]


def test_pictures_are_compared_across_the_folders_of_a_config(tmp_path: Path) -> None:
    picture(tmp_path / "learnt" / "1.png", seed=1)
    with Image.open(tmp_path / "learnt" / "1.png") as one:
        (tmp_path / "held").mkdir()
        one.convert("RGB").save(tmp_path / "held" / "a.jpg", quality=60)
    concepts = [{"dir": str(tmp_path / "learnt")}, {"dir": str(tmp_path / "held"), "role": "validation"}]
    report = examine_config(config(tmp_path, instance_dir=None, concepts=concepts))
    assert report.folder == tmp_path
    assert found(report) == [("duplicate", "held/a.jpg")]
    assert str(tmp_path / "learnt" / "1.png") in report.findings[0].message


def test_a_folder_that_is_named_twice_is_looked_at_once(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", seed=1)
    concepts = [{"dir": str(tmp_path), "prompt": prompt} for prompt in ("one", "two")]
    report = examine_config(config(tmp_path, instance_dir=None, concepts=concepts))
    assert (report.images, found(report)) == (1, [])
    assert [example.caption for example in report.sized] == ["one", "two"]


def test_captions_are_those_of_training_with_triggers_names_and_resolutions(tmp_path: Path) -> None:
    for index, folder in enumerate(("a", "b", "held", "class", "a/3_red robot")):
        picture(tmp_path / folder / f"{index} blue car.png", seed=index)
    concepts = [
        {"dir": str(tmp_path / "b"), "prompt": "b {}", "trigger": "zqx", "resolution": 64},
        {"dir": str(tmp_path / "class"), "role": "class", "prompt": "a robot"},
    ]
    wanted = config(
        tmp_path,
        instance_dir=tmp_path / "a",
        validation_dir=tmp_path / "held",
        instance_prompt=None,
        concepts=concepts,
        captions={"from_file_name": True},
    )
    report = examine_config(wanted)
    split = checked_examples(wanted.data, seed=0)
    trained = in_buckets([*split.train, *split.validation, *split.classes], wanted.data, POCKET)
    seen = {(one.path, one.captions, one.original, one.size) for one in report.sized}
    assert report.losses == ()
    assert seen == {(one.path, one.captions, one.original, one.size) for one in trained}


def test_a_caption_that_asks_for_a_trigger_that_there_is_not_is_a_loss(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", seed=1)
    (tmp_path / "1.txt").write_text("a photo of {}")
    assert found(examine_config(config(tmp_path))) == [("bad-caption", "1.png")]
    assert found(examine_config(config(tmp_path, trigger="zqx"))) == []


def test_a_tag_of_an_adapter_in_a_caption_is_a_loss(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", seed=1)
    (tmp_path / "1.txt").write_text("a photo <lora:ink:1>")
    report = examine_config(config(tmp_path))
    assert found(report) == [("bad-caption", "1.png")]
    assert report.findings[0].message.startswith("<lora:ink> names an adapter")


def test_words_beyond_the_limit_are_named(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", seed=1)
    (tmp_path / "1.txt").write_text(f"{'red ' * 30}beach dog")
    report = examine_config(config(tmp_path))
    assert found(report) == [("cut-caption", "1.png")]
    assert report.findings[0].message == "text_encoder reads 32 of 34 tokens; cut: 'beach dog'"
    assert found(examine(tmp_path, model="pocket")) == [("cut-caption", "1.png")]
    (tmp_path / "1.txt").write_text("red " * 30)
    assert found(examine_config(config(tmp_path))) == []


def test_of_several_captions_the_one_that_is_cut_is_named_and_wildcards_count_at_their_longest(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", seed=1)
    (tmp_path / "1.txt").write_text(f"a dog\n{'red ' * 29}{{x|beach dog}}")
    report = examine_config(config(tmp_path, captions={"wildcards": True}))
    assert [finding.message for finding in report.findings] == [
        "text_encoder reads 32 of 33 tokens; cut: 'dog' (of 'red red red red red ...ed red {x|beach dog}')"
    ]


def test_what_files_say_beside_their_pixels_is_noted(tmp_path: Path) -> None:
    turned, placed = Image.Exif(), Image.Exif()
    turned[0x0112] = 6
    placed[0x8825] = {1: "N", 2: (52.0, 31.0, 12.0)}
    made = [Image.open(picture(tmp_path / f"{index}.png", seed=index)).convert("RGB") for index in range(6)]
    made[0].save(tmp_path / "0.jpg", exif=turned)
    made[1].save(tmp_path / "1.jpg", exif=placed)
    made[2].convert("CMYK").save(tmp_path / "2.jpg")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    made[3].save(tmp_path / "3.jpg", icc_profile=profile)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    made[4].save(tmp_path / "4.jpg", icc_profile=srgb)
    made[5].save(tmp_path / "5.jpg")
    for index in range(6):
        (tmp_path / f"{index}.png").unlink()
    report = examine(tmp_path, instance_prompt="x")
    assert report.findings == ()
    assert [note.split(")")[0] for note in report.notes] == [
        "1 picture (0.jpg",
        "1 picture (1.jpg",
        "1 picture (2.jpg",
        "1 picture (3.jpg",
    ]
    for note, word in zip(report.notes, ("upright", "place", "CMYK", "profile"), strict=True):
        assert word in note
    assert "note: 1 picture (0.jpg) turned upright" in format_report(report)


@pytest.mark.parametrize(
    "spoil",
    ["nothing", "sliver", "too small", "orphan mask", "black mask", "trigger", "no caption", "empty", "damaged"],
)
def test_no_losses_means_that_training_takes_all(tmp_path: Path, spoil: str) -> None:
    picture(tmp_path / "1.png", seed=1)
    picture(tmp_path / "2.png", seed=2, size={"sliver": (900, 100), "too small": (7, 20)}.get(spoil, (96, 96)))
    if spoil in ("orphan mask", "black mask"):
        mask(tmp_path / ("3_mask.png" if spoil == "orphan mask" else "2_mask.png"), box=(0, 0, 0, 0))
    if spoil in ("trigger", "empty"):
        (tmp_path / "2.txt").write_text("a {}" if spoil == "trigger" else " ")
    if spoil == "damaged":
        (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:200])
    prompt = None if spoil == "no caption" else "a robot"
    wanted = config(tmp_path, instance_prompt=prompt, mask_outside=0.0)
    report = examine_config(wanted)
    assert bool(report.losses) == (spoil != "nothing")
    assert trains(wanted) == (spoil == "nothing")


def trains(wanted: TrainConfig) -> bool:
    """Whether what training does with pictures before its first step, and in it, goes well."""
    from dora_diffusion.training.data.masks import read_mask

    try:
        for example in in_buckets(checked_examples(wanted.data, seed=0).train, wanted.data, POCKET):
            read_mask(example.path, example.mask, example.original)
    except ValueError:
        return False
    return True


def test_the_command_takes_a_yaml_file_and_what_is_said_beside_it(tmp_path: Path, capsys) -> None:
    picture(tmp_path / "photos" / "1.png", seed=1, size=(128, 128))
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: out\ndata: {instance_dir: photos, instance_prompt: a robot}\n")
    assert main(["doctor", str(file)]) == 0
    assert "trained by pocket at 128" in capsys.readouterr().out
    assert main(["doctor", str(file), "--model", "pocket-dit", "--resolution", "64", "32"]) == 0
    assert "trained by pocket-dit at 32, 64, sides multiples of 16" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path / "photos"), "--instance-prompt", "x", "--resolution", "64"]) == 0
    assert "trained by any base at 64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["photos", "--sheet", "out.png"], "--sheet out.png: needs --model or --resolution"),
        (["photos", "--model", "nowhere"], "nowhere"),
        (["photos", "--model", "pocket", "--resolution", "100"], "resolution"),
        (["photos", "--model", "pocket-dit", "--resolution", "72"], "expected a multiple of 16"),
        (["photos", "--resolution", "-8"], "resolution"),
        (["broken.yaml"], "broken.yaml"),
        (["photos/1.png"], "1.png"),
    ],
)
def test_what_is_wrong_with_a_command_is_one_line(tmp_path: Path, monkeypatch, capsys, arguments, told: str) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "photos" / "1.png", seed=1)
    (tmp_path / "broken.yaml").write_text("data: {instance_dir: photos, no_such: 1}\noutput_dir: out\n")
    assert main(["doctor", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.strip().splitlines()) == 1
