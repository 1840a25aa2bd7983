"""What a run leaves beside its adapter: exports, card, report, losses; the same bytes whatever befell it."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from dora_diffusion.cli import main
from dora_diffusion.formats import FORMATS, detect_format, load_adapter
from dora_diffusion.inspection.verify import verify_copy
from dora_diffusion.pretrain.scenes import background
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run import report
from dora_diffusion.training.run.exports import write_exports
from dora_diffusion.training.run.train import train
from tests.failing_disk import contents, fail_at_every_call
from tests.pocket_random import random_pocket_pipeline

EVIL = "<script>alert(1)</script> & \"'`"
EXPORTS = ["kohya", "peft", "for-comfyui"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    random_pocket_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> Path:
    """A folder with `images` and a run of four steps in `robot`, with checkpoints of 2 and 4; read only."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "images").mkdir()
    for name in ("red", "blue", "meadow"):
        background(name, 64).save(folder / "images" / f"{name}.png")
    (folder / "images" / "red.txt").write_text(EVIL)
    train(config_of(base, folder))
    return folder


@pytest.fixture
def work(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "work")
    return tmp_path / "work"


def config_of(base: Path, folder: Path, **sections) -> TrainConfig:
    plain = {
        "model": str(base),
        "output_dir": folder / "robot",
        "data": {"instance_dir": folder / "images", "instance_prompt": "a zqx cat", "resolution": 32},
        "adapter": {"rank": 2, "train_text_encoder": True},
        "optim": {"steps": 4, "learning_rate": 1e-3},
        "preview": {"prompts": ["a zqx cat", EVIL], "every": 2, "steps": 1},
        "validation": {"every": 2, "repeats": 1},
        "checkpoint": {"every": 2},
        "export": EXPORTS,
    }
    return TrainConfig.model_validate({**plain, **sections})


def without_logs(folder: Path) -> dict:
    return {name: data for name, data in contents(folder).items() if not name.startswith("logs")}


def test_exports_hold_the_adapter_under_the_names_that_were_asked_for(finished) -> None:
    run = finished / "robot"
    assert sorted(path.name for path in (run / "exports").iterdir()) == sorted(
        ["robot-kohya.safetensors", "robot-peft", "robot-for-comfyui.safetensors"]
    )
    adapter = load_adapter(run / "adapter.safetensors")
    path = run / "exports" / "robot-kohya.safetensors"
    assert verify_copy(load_adapter(path), adapter).error == 0 and detect_format(path) == "kohya"
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_output_name"] == "robot-kohya"
    assert verify_copy(load_adapter(run / "exports" / "robot-peft"), adapter).error == 0
    card = (run / "README.md").read_text()
    assert "- `exports/robot-kohya.safetensors`: read back: largest relative error 0 of " in card
    assert "for ComfyUI" in card


def test_a_run_that_is_resumed_from_half_way_leaves_the_same_bytes(base, work) -> None:
    """Everything but TensorBoard's logs: adapter, exports, card, report, losses, previews, checkpoints."""
    run = work / "robot"
    before = without_logs(run)
    for path in run.iterdir():
        if path.name not in ("checkpoints", "class", "config.yaml", "logs", "samples"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    # as at the place where the other lay: paths stand in config.yaml alone
    train(config_of(base, work), resume="latest")
    after = without_logs(run)
    assert after.pop("config.yaml") != before.pop("config.yaml")
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == []
    assert {"report.html", "loss.csv", "exports/robot-kohya.safetensors", "README.md"} <= after.keys()


def test_losses_of_all_steps_are_kept_over_a_resumption(finished) -> None:
    lines = (finished / "robot" / "loss.csv").read_text().splitlines()
    assert lines[0] == "step,loss,learning_rate" and [line.split(",")[0] for line in lines[1:]] == list("1234")
    half = finished / "robot" / "checkpoints" / "step-00000002" / "loss.csv"
    assert half.read_text().splitlines() == lines[:3]


def test_another_export_of_a_finished_run_is_made_and_the_old_goes(base, work) -> None:
    run = work / "robot"
    adapter = (run / "adapter.safetensors").read_bytes()
    result = train(config_of(base, work, export=["lycoris", "peft"]), resume="latest")
    assert result.is_new and [each.name for each in result.exports] == ["lycoris", "peft"]
    assert {path.name for path in (run / "exports").iterdir()} == {"robot-lycoris.safetensors", "robot-peft"}
    assert (run / "adapter.safetensors").read_bytes() == adapter
    assert not train(config_of(base, work, export=["lycoris", "peft"]), resume="latest").is_new


def test_what_could_not_be_written_after_the_last_step_is_refused_before_the_first(base, finished, tmp_path) -> None:
    config = config_of(base, finished, output_dir=tmp_path / "run", export=["kohya", "comfyui"])
    with pytest.raises(ValueError, match="export: comfyui: .*needs its original name, which is not known here"):
        train(config)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_whatever_call_fails_an_export_is_whole(base, finished, tmp_path) -> None:
    config = config_of(base, finished, output_dir=tmp_path / "robot", export=["kohya"])
    adapter, pipe = load_adapter(finished / "robot" / "adapter.safetensors"), random_pocket_pipeline()
    write_exports(config, adapter, pipe)
    (tmp_path / "robot" / "exports" / "robot-kohya.safetensors").write_bytes(b"the old one")
    messages = fail_at_every_call(
        lambda: write_exports(config, adapter, pipe), tmp_path / "robot" / "exports", may_be_new=True
    )
    assert messages and all("robot-kohya.safetensors" in message for message in messages)


def test_the_command_says_what_was_exported(base, work, tmp_path, capsys) -> None:
    config = config_of(base, work, output_dir=tmp_path / "cat", export=["kohya"], optim={"steps": 1})
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    path = tmp_path / "cat" / "exports" / "cat-kohya.safetensors"
    assert f"wrote {path}\n      read back: largest relative error 0" in capsys.readouterr().out


class Page(HTMLParser):
    """Tags and attributes of a page, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.heads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "data", "srcset")]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "h2" and data.strip():
            self.heads.append(data.strip())


def test_the_report_is_one_page_with_all_in_it(finished) -> None:
    text = (finished / "robot" / "report.html").read_text()
    page = Page(text)
    assert page.heads == [
        *("Loss", "Validation", "Previews", "How far the base was moved", "What was learnt", "Cost", "Written"),
        "Settings",
    ]
    assert page.tags.count("svg") == 2 and page.tags.count("img") == 2
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    assert "script" not in page.tags and "http" not in re.sub(r"base64,[^\"]+", "", text)
    assert str(finished) not in text
    assert "Could not be made" not in text
    assert "steps skipped by the guard</td><td>0" in text and "unet.down_blocks" in text
    assert "exports/robot-kohya.safetensors" in text


def test_what_strangers_wrote_is_text_in_the_report(finished) -> None:
    text = (finished / "robot" / "report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;" in text and "<script" not in text


def test_a_page_that_cannot_be_made_ends_no_run(base, work, tmp_path, monkeypatch, capfd) -> None:
    def broken(*_: object) -> str:
        raise RuntimeError("no room for a page")

    monkeypatch.setattr(report, "report_page", broken)
    config = config_of(base, work, output_dir=tmp_path / "run", optim={"steps": 1}, export=[])
    assert train(config).is_new and not (tmp_path / "run" / "report.html").exists()
    captured = capfd.readouterr()
    assert "report.html: not written (no room for a page); the run itself is whole" in captured.out + captured.err


def test_a_part_that_cannot_be_made_says_why_in_its_place(base, work, tmp_path, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> object:
        raise OSError("a picture is <gone>")

    monkeypatch.setattr(report, "contact_sheet", broken)
    config = config_of(base, work, output_dir=tmp_path / "run", optim={"steps": 1}, export=[])
    train(config)
    text = (tmp_path / "run" / "report.html").read_text()
    assert "Could not be made: a picture is &lt;gone&gt;" in text and "<h2>Cost</h2>" in text


def test_the_cards_pictures_are_those_of_its_prompts(finished) -> None:
    samples = finished / "robot" / "samples"
    with Image.open(samples / "step-00000004.png") as row:
        width = row.width // 2
        for number in range(2):
            with Image.open(samples / f"prompt-{number + 1}.png") as picture:
                place = (number * width, 0, (number + 1) * width, row.height)
                assert picture.tobytes() == row.convert("RGB").crop(place).tobytes()


def test_names_of_exports_are_those_of_formats_and_tools() -> None:
    from typing import get_args

    from dora_diffusion.cli.arguments import TOOL_NAMES
    from dora_diffusion.training.config import Export

    assert sorted(get_args(Export)) == sorted([*FORMATS, *(f"for-{tool}" for tool in TOOL_NAMES)])


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"export": ["kohja"]}, "export"),
        ({"export": ["kohya", "kohya"]}, "export: got 'kohya' twice"),
        ({"adapter": {"train_unet": False}, "words": {"starts": {"zqx": "cat"}}}, "export: got .* learnt alone"),
        ({"metadata": "some"}, "metadata"),
    ],
)
def test_a_mistake_in_what_is_written_is_told_at_once(base, finished, sections, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        config_of(base, finished, **sections)
