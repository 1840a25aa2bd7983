"""`generate` option by option: it draws what the library draws, and a picture is drawn again by what it says."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.cli import main
from dora_diffusion.formats import save_adapter
from dora_diffusion.generation.generate import Canvas, GenerationSettings, generate
from dora_diffusion.generation.png_metadata import PictureRecord, read_metadata
from dora_diffusion.pipelines.loading import load_pipeline
from dora_diffusion.pipelines.textual_inversion import add_words, save_words
from dora_diffusion.utils.hardware import device_of
from tests.pocket_random import random_adapter, random_pocket_pipeline
from ui.backend.request import AdapterChoice, DrawRequest
from ui.backend.session import Session

SETTINGS = GenerationSettings("a cat", seed=3, steps=2, width=64, height=64)
DRAW = ("--prompt", "a cat", "--seed", "3", "--steps", "2", "--width", "64", "--height", "64", "--device", "cpu")
FADE = ((0.0, 0.0), (0.3, 1.0))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, two adapters, another UNet, a picture and a mask."""
    folder, pipe = tmp_path_factory.mktemp("place"), random_pocket_pipeline()
    pipe.save_pretrained(folder / "base")
    save_adapter(random_adapter(pipe, 1), folder / "ink.safetensors")
    save_adapter(random_adapter(pipe, 2, use_dora=False), folder / "lego.safetensors")
    random_pocket_pipeline(seed=3).unet.save_pretrained(folder / "tuned")
    shutil.move(folder / "tuned" / "diffusion_pytorch_model.safetensors", folder / "unet.safetensors")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "photo.png")
    left = Image.new("L", (64, 64))
    left.paste(255, (0, 0, 32, 64))
    left.save(folder / "left.png")
    return folder


@pytest.fixture(scope="module")
def pipe(place: Path) -> StableDiffusionPipeline:
    """Read from its files, for where weights lie in memory shows in the last bit."""
    return load_pipeline(place / "base")


@pytest.fixture
def draw(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs `generate` in `place`, which must do it; gives the picture's path."""
    monkeypatch.chdir(place)

    def run(*arguments: str, name: str = "out.png") -> Path:
        assert main(["generate", *arguments, "--output", str(tmp_path / name)]) == 0
        return tmp_path / name

    return run


@pytest.fixture
def fails(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `generate`, which must fail before it draws; gives its line."""
    monkeypatch.chdir(place)

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["generate", *arguments, "--output", str(tmp_path / "failed.png")]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert not list(tmp_path.glob("failed*"))
        assert lines[-1].startswith("dora-diffusion: ") and not any("Traceback" in line for line in lines)
        return lines[-1].removeprefix("dora-diffusion: ")

    return run


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def _record(path: Path) -> PictureRecord:
    record = read_metadata(path)
    assert record is not None
    return record


def _same(path: Path, picture: Image.Image) -> None:
    np.testing.assert_array_equal(_pixels(path), np.asarray(picture))


def test_count_draws_one_seed_after_another(draw, pipe: StableDiffusionPipeline) -> None:
    first = draw("--model", "base", *DRAW, "--count", "2", "--sampler", "euler a")
    pictures = [first.with_name(f"out-{number}.png") for number in (1, 2)]
    assert not first.exists()
    for path, seed in zip(pictures, (3, 4), strict=True):
        settings = replace(SETTINGS, seed=seed, sampler="euler a")
        _same(path, generate(pipe, settings))
        assert _record(path).settings == settings


def test_many_pictures_sort_by_their_names(draw) -> None:
    from dora_diffusion.cli.drawing import _outputs

    names = [path.name for path in _outputs(Path("a/out.png"), 11)]
    assert (names[0], names[-1], names == sorted(names)) == ("out-01.png", "out-11.png", True)


def test_prompts_of_a_file(draw, fails, tmp_path: Path, pipe: StableDiffusionPipeline) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# two\na cat\n\na dog --w 128 --s 3 --l 2 --d 9 --n bird\n")
    rest = DRAW[2:]
    first = draw("--model", "base", "--prompts", str(file), *rest)
    _same(first.with_name("out-1.png"), generate(pipe, SETTINGS))
    dog = GenerationSettings("a dog", "bird", 9, 3, 2.0, 128, 64)
    _same(first.with_name("out-2.png"), generate(pipe, dog))
    for line, message in (
        ("a dog --q 3", f"{file}, line 2: --q is no setting; expected --w, --h, --s, --l, --d, --n"),
        ("a <lora:ink:1> dog", f"{file}, line 2: prompt: <lora:ink> names an adapter"),
    ):
        file.write_text(f"a cat\n{line}\n")
        assert fails("--model", "base", "--prompts", str(file), *rest).startswith(message)


def test_a_picture_to_start_from_and_a_mask(draw, fails, place: Path, pipe: StableDiffusionPipeline) -> None:
    with Image.open(place / "photo.png") as opened:
        photo = opened.convert("RGB")
    with Image.open(place / "left.png") as opened:
        left = opened.convert("L")
    start = ("--model", "base", *DRAW, "--image", "photo.png")
    settings = replace(SETTINGS, strength=0.75)
    _same(draw(*start), generate(pipe, settings, canvas=Canvas(photo)))
    path = draw(*start, "--mask", "left.png", "--denoise", "0.5")
    _same(path, generate(pipe, replace(settings, strength=0.5), canvas=Canvas(photo, left)))
    np.testing.assert_array_equal(_pixels(path)[:, 32:], np.asarray(photo)[:, 32:])
    record = _record(path)
    assert (record.origin.canvas_file, record.origin.canvas_mask_file) == ("photo.png", "left.png")
    assert record.settings.strength == 0.5
    assert fails(*start, "--denoise", "0") == "--denoise: got 0, expected a number above 0 and up to 1"
    assert fails(*start, "--denoise", "0.1").startswith("strength 0.1 of 2 steps leaves no step to draw")
    assert fails("--model", "base", *DRAW, "--denoise", "0.5").startswith("--denoise: there is no picture")
    assert fails("--model", "base", *DRAW, "--mask", "left.png").startswith("--mask: there is no picture to draw in")
    assert fails("--model", "base", *DRAW, "--image", "unet.safetensors").startswith(
        "--image unet.safetensors: not a p"
    )


def test_schedules_and_masks_of_adapters(draw, fails, place: Path, pipe: StableDiffusionPipeline) -> None:
    mix = ("--model", "base", *DRAW, "--adapter", "ink.safetensors:0.8", "--adapter", "lego.safetensors")
    path = draw(*mix, "--schedule", "ink=0:0,.3:1", "--mask-for", "lego=left.png")
    manager = AdapterManager(pipe)
    manager.load_adapter(place / "ink.safetensors", name="ink")
    manager.load_adapter(place / "lego.safetensors", name="lego")
    manager.set_adapters({"ink": 0.8, "lego": 1.0})
    plain = generate(pipe, SETTINGS)
    manager.set_schedule("ink", FADE)
    with Image.open(place / "left.png") as left:
        manager.set_mask("lego", left.convert("L"))
    expected = generate(pipe, SETTINGS)
    manager.unload()
    _same(path, expected)
    assert not np.array_equal(np.asarray(plain), np.asarray(expected))
    ink, lego = _record(path).adapters
    assert (ink.file, ink.schedule, ink.mask_file) == ("ink.safetensors", FADE, None)
    assert (lego.file, lego.schedule, lego.mask_file) == ("lego.safetensors", None, "left.png")
    assert fails(*mix, "--schedule", "lgo=0:0").startswith(
        "--schedule lgo: no adapter named 'lgo'; there are ink, lego"
    )
    assert fails(*mix, "--mask-for", "x=left.png").startswith("--mask-for x: no adapter named 'x'; there are ink, lego")
    assert fails(*mix, "--schedule", "ink").startswith("--schedule ink: expected NAME=CURVE, such as ink=0:0,.3:1")
    assert fails(*mix, "--schedule", "ink=up").startswith("--schedule ink: got 'up', expected points such as")
    assert fails(*mix, "--mask-for", "ink=gone.png") == "--mask-for ink gone.png: no such file"
    assert "fold" in fails(*mix, "--schedule", "ink=fade in", "--blend", "comfyui")


def test_small_mistakes(fails) -> None:
    base = ("--model", "base")
    assert fails(*base).startswith("nothing to draw: give --prompt TEXT, --prompts FILE or --recipe PICTURE.png")
    assert fails(*base, *DRAW, "--sampler", "eulr").startswith("sampler 'eulr' is unknown: expected one of default, eu")
    assert fails(*base, *DRAW, "--count", "0") == "--count: got 0, expected a whole number from 1 to 10000"
    assert fails(*base, *DRAW, "--prompts", "base").startswith("--prompt and --prompts: give one of the two")
    assert fails(*base, *DRAW, "--unet", "gone.safetensors") == "gone.safetensors: no such file"
    assert "cannot be used here" in fails(*base, *DRAW[:-1], "nonsense")


def test_the_device_is_the_best_that_is_here(draw) -> None:
    base = _record(draw("--model", "base", *DRAW[:-2])).origin.base
    assert base is not None and base.device == device_of("auto")


ALL = (
    *("--model", "base", "--unet", "unet.safetensors", *DRAW, "--negative-prompt", "dog", "--guidance-scale", "3"),
    *("--adapter", "ink.safetensors:0.8", "--adapter", "lego.safetensors", "--part", "ink:unet.mid_block=0.25"),
    *("--schedule", "ink=0:0,.3:1", "--mask-for", "lego=left.png", "--sampler", "dpm++ 2m karras"),
    *("--image", "photo.png", "--mask", "left.png", "--denoise", "1"),
)


def test_a_recipe_draws_the_same_again(draw, tmp_path: Path) -> None:
    first = draw(*ALL)
    again = draw("--recipe", str(first), name="again.png")
    np.testing.assert_array_equal(_pixels(again), _pixels(first))
    assert _record(again) == _record(first)
    base = _record(again).origin.base
    assert base is not None and [(use.part, use.file) for use in base.parts] == [("unet", "unet.safetensors")]
    changed = draw("--recipe", str(first), "--seed", "4", name="changed.png")
    assert _record(changed) == replace(
        _record(first),
        settings=replace(_record(first).settings, seed=4),
        parameters=_record(first).parameters.replace("Seed: 3", "Seed: 4"),
    )
    assert not np.array_equal(_pixels(changed), _pixels(first))


def test_options_go_before_a_recipe(draw, place: Path, tmp_path: Path) -> None:
    first = draw(*ALL)
    shutil.copy(place / "ink.safetensors", tmp_path / "ink.safetensors")
    moved = draw("--recipe", str(first), "--adapter", str(tmp_path / "ink.safetensors"), name="moved.png")
    np.testing.assert_array_equal(_pixels(moved), _pixels(first))  # its strengths and its curve are the recipe's
    other = draw(
        *("--recipe", str(first), "--adapter", "lego.safetensors:0", "--schedule", "ink=constant", "--unet"),
        *("unet.safetensors", "--model", "base", "--prompt", "a dog", "--sampler", "default", "--denoise", "0.5"),
        name="other.png",
    )
    record = _record(other)
    ink, lego = record.adapters
    assert (ink.schedule, ink.weight, lego.weight) == (None, _record(first).adapters[0].weight, 0.0)
    assert (record.settings.prompt, record.settings.sampler, record.settings.strength) == ("a dog", "default", 0.5)
    without = draw("--recipe", str(first), "--model", "base", name="without.png")
    base = _record(without).origin.base
    assert base is not None and base.parts == ()  # another base, with its own UNet


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("ink.safetensors", "--adapter"),
        ("unet.safetensors", "--unet"),
        ("photo.png", "--image"),
        ("left.png", "--mask"),
    ],
)
def test_files_that_are_gone_or_others_are_one_line(
    draw, fails, place: Path, tmp_path: Path, name: str, flag: str
) -> None:
    first, kept = draw(*ALL), tmp_path / "elsewhere" / name
    kept.parent.mkdir()
    shutil.move(place / name, kept)
    try:
        gone = fails("--recipe", str(first))
        assert gone == f"{name}: no such file, and the recipe needs it; name another by {flag}"
        if name.endswith(".png"):
            Image.new("RGB", (64, 64), "red").save(place / name)
        else:
            shutil.copy(place / "lego.safetensors", place / name)
        other = fails("--recipe", str(first))
        assert other.startswith(f"{name}: its SHA-256 is ") and other.endswith(f"or take this one by {flag}")
    finally:
        shutil.move(kept, place / name)


def test_a_picture_of_the_app_is_drawn_again(draw, place: Path, tmp_path: Path) -> None:
    with Image.open(place / "photo.png") as photo, Image.open(place / "left.png") as left:
        canvas, mask = Canvas(photo.convert("RGB"), left.convert("L")), left.convert("L")
    pipe = load_pipeline("base", unet="unet.safetensors")
    output = tmp_path / "out"
    session = Session(pipe, model="base", folder=Path("."), output=output, files={"unet": Path("unet.safetensors")})
    weight = {"unet": 1.0, "unet.mid_block": 0.5, "text_encoder": 0.25}
    choices = (AdapterChoice("lego", 0.5, FADE), AdapterChoice("ink", weight, mask=mask))
    settings = replace(SETTINGS, strength=0.75, sampler="euler karras", steps=4)
    run = session.start(DrawRequest(settings, choices, canvas=canvas, count=2), owner="tab")
    last = list(run.updates())[-1]
    session.close()
    for number, path in enumerate((*last.pictures, last.base)):
        again = draw("--recipe", str(path), name=f"again-{number}.png")
        np.testing.assert_array_equal(_pixels(again), _pixels(path))


def _with_text(path: Path, text: str) -> Path:
    info = PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_a_text_of_a1111_is_a_recipe(
    draw, fails, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        "a cat <lora:ink:0.8>\nSteps: 2, Sampler: Euler a, CFG scale: 4, Seed: 3, Size: 64x64, Model: own, Clip skip: 2"
    )
    told = _with_text(tmp_path / "told.png", text)
    draw_it = ("--recipe", str(told), "--device", "cpu")
    assert fails(*draw_it).startswith("told.png: was drawn with 'own' and does not say where it lies; give --model")
    assert fails(*draw_it, "--model", "base").startswith(
        "told.png: names the adapter 'ink' and not its file; give --ad"
    )
    capsys.readouterr()
    path = draw(*draw_it, "--model", "base", "--adapter", "ink.safetensors")
    assert "told.png: Clip skip: 2 is not done here" in capsys.readouterr().err
    same = draw("--model", "base", *DRAW, "--adapter", "ink.safetensors:0.8", "--sampler", "euler a", name="same.png")
    np.testing.assert_array_equal(_pixels(path), _pixels(same))
    assert fails("--recipe", "photo.png").startswith("photo.png: tells nothing; expected the text that this app or")
    assert fails("--recipe", "gone.png") == "--recipe gone.png: no such file"


def test_a_picture_of_an_older_version_is_a_recipe_as_far_as_it_tells(draw, fails, tmp_path: Path) -> None:
    """It has no `base`, and no files: the base's name is what was loaded, adapters have to be given."""
    path = draw("--model", "base", *DRAW, "--adapter", "ink.safetensors:0.5")
    with Image.open(path) as picture:
        record = json.loads(picture.info["dora_diffusion"])
    del record["base"]
    del record["adapters"][0]["file"]
    info = PngInfo()
    info.add_itxt("dora_diffusion", json.dumps(record))
    old = tmp_path / "old.png"
    Image.new("RGB", (8, 8)).save(old, pnginfo=info)
    assert fails("--recipe", str(old)).startswith("old.png: names the adapter 'ink' and not its file; give --adapter")
    again = draw("--recipe", str(old), "--adapter", "ink.safetensors", name="again.png")
    np.testing.assert_array_equal(_pixels(again), _pixels(path))


def test_a_recipe_knows_its_words(draw, fails, place: Path, pipe: StableDiffusionPipeline) -> None:
    for folder, start in (("words", "cat"), ("others", "castle")):
        words = add_words(pipe, {"<zqx>": start})
        save_words(words.state(), place / folder)
        words.remove()
    rest = ("--model", "base", *DRAW[2:], "--prompt", "a <zqx>")
    first = draw(*rest, "--words", "words/zqx.safetensors")
    again = draw("--recipe", str(first), name="again.png")
    np.testing.assert_array_equal(_pixels(again), _pixels(first))
    assert not np.array_equal(_pixels(draw(*rest, name="without.png")), _pixels(first))
    other = draw("--recipe", str(first), "--words", "others/zqx.safetensors", name="other.png")
    assert not np.array_equal(_pixels(other), _pixels(first))
    shutil.copy(place / "others" / "zqx.safetensors", place / "words" / "zqx.safetensors")
    assert fails("--recipe", str(first)).startswith("words/zqx.safetensors: its SHA-256 is ")


def test_a_base_of_one_file_is_known_by_its_hash(draw, fails, place: Path, tmp_path: Path) -> None:
    """Stands for any: the base is not loaded before its hash is looked at."""
    path = draw("--model", "base", *DRAW)
    with Image.open(path) as picture:
        record = json.loads(picture.info["dora_diffusion"])
    record["base"] |= {"source": "unet.safetensors", "sha256": "ab" * 32}
    info = PngInfo()
    info.add_itxt("dora_diffusion", json.dumps(record))
    told = tmp_path / "told.png"
    Image.new("RGB", (8, 8)).save(told, pnginfo=info)
    assert fails("--recipe", str(told)).startswith("unet.safetensors: its SHA-256 is ")
    record["base"] |= {"sha256": "no hash"}
    info = PngInfo()
    info.add_itxt("dora_diffusion", json.dumps(record))
    Image.new("RGB", (8, 8)).save(told, pnginfo=info)
    assert fails("--recipe", str(told)) == "told.png: its metadata is not as this app writes it (a hash is no SHA-256)"


def test_the_device_of_a_recipe_that_is_not_here_is_told(draw, monkeypatch, capsys) -> None:
    from dora_diffusion.cli import drawing_plan

    path = draw("--model", "base", *DRAW)
    monkeypatch.setattr(drawing_plan, "is_here", lambda device: False)
    draw("--recipe", str(path), name="again.png")
    assert "recipe: drawn on cpu, which is not here: " in capsys.readouterr().err


def test_strengths_of_a_tag_go_to_the_base_s_own_parts(draw, tmp_path: Path) -> None:
    text = "a cat <lora:ink:0.25:0.8>\nSteps: 2, CFG scale: 4, Seed: 3, Size: 64x64"
    told = _with_text(tmp_path / "told.png", text)
    path = draw("--recipe", str(told), "--model", "base", "--adapter", "ink.safetensors", "--device", "cpu")
    mix = ("--adapter", "ink.safetensors", "--part", "ink:unet=0.8", "--part", "ink:text_encoder=0.25")
    np.testing.assert_array_equal(_pixels(path), _pixels(draw("--model", "base", *DRAW, *mix, name="same.png")))
    assert _record(path).adapters[0].weight == {"text_encoder": 0.25, "unet": 0.8}


def test_what_is_drawn_from_is_not_written_over(
    draw, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = draw("--model", "base", *DRAW, "--image", "photo.png", "--denoise", "1")
    before = first.read_bytes(), (place / "photo.png").read_bytes()
    for arguments, output in (
        (("--recipe", str(first)), first),
        (("--recipe", str(first)), place / "photo.png"),
        (("--model", "base", *DRAW, "--image", "photo.png"), place / "photo.png"),
    ):
        capsys.readouterr()
        assert main(["generate", *arguments, "--output", str(output)]) == 2
        line = f"--output {output}: would replace a picture that is drawn from; name another"
        assert capsys.readouterr().err.strip() == f"dora-diffusion: {line}"
    assert (first.read_bytes(), (place / "photo.png").read_bytes()) == before
