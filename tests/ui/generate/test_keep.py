"""History, presets, restore by hash, export: what is kept comes back as it was, and what is missing is told."""

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dora_diffusion.conversion import TOOLS
from dora_diffusion.formats import FORMATS, examine
from dora_diffusion.generation.generate import GenerationSettings, GenerationStopped
from dora_diffusion.generation.img2img import Canvas
from dora_diffusion.generation.infotext import parse_infotext, settings_of
from dora_diffusion.generation.png_metadata import AdapterUse, save_picture
from dora_diffusion.generation.prompts import LoraTag
from dora_diffusion.utils.atomic import sha256_of
from tests.failing_disk import RENAMES, contents, failing_at
from ui.backend.checks import LIMITS
from ui.backend.picture_difference import largest_difference
from ui.backend.request import AdapterChoice, DrawRequest, SlotValues, check_adapters
from ui.backend.session import Session
from ui.errors import user_errors
from ui.generate.history import PAGE, described, find_picture, list_pictures
from ui.generate.presets import delete_preset, list_presets, load_preset, save_preset
from ui.generate.recipes import DrawRecipe, placed
from ui.generate.restore import Restored, report_html, restore_from
from ui.library import hashes as hashes_module
from ui.library.hashes import EMPTY_SHA256, Missing, Wanted, find_all
from ui.tabs.export_files import ExportOptions, export_mix

SETTINGS = GenerationSettings("a cat", negative_prompt="dog", seed=3, steps=2, guidance_scale=3.0, sampler="euler")
INK = SlotValues.of("ink", 0.8)
LEGO = replace(SlotValues.of("lego", -0.5, curve="fade in"), apart=True, text_encoders=1.5)


def _restore(session: Session, path: Path) -> Restored:
    return restore_from(path, session.library, session.parts, output=session.output)


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def _with_text(path: Path, text: str) -> Path:
    info = PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def _tensors_sha256(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def test_a_restored_picture_draws_the_same_again(session: Session) -> None:
    blocks = tuple(0.5 if index == 1 else 1.0 for index in range(len(session.parts.blocks)))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    slots = (replace(INK, blocks=blocks, mask=mask), LEGO)
    canvas = Canvas(Image.new("RGB", (128, 128), "teal"))
    request = DrawRequest(replace(SETTINGS, strength=1.0), check_adapters(slots, session.parts), canvas=canvas)
    last = list(session.start(request, owner="tab").updates())[-1]
    assert last.picture is not None

    restored = _restore(session, last.picture)
    assert restored.settings == request.settings
    assert [slot.file for slot in restored.slots] == ["ink", "lego"]
    assert restored.slots[0].blocks == blocks
    assert restored.slots[1] == LEGO
    assert (restored.missing, restored.notes, restored.model, restored.blend) == ((), (), "random", "additive")
    again = restored.recipe.request(session.parts, restored.canvas)
    with Image.open(last.picture) as picture:
        np.testing.assert_array_equal(_pixels(session.draw(again)[0].image), _pixels(picture))


def test_adapters_are_found_by_hash_whatever_they_are_called(session: Session, adapters: Path, tmp_path: Path) -> None:
    use = AdapterUse("ink", sha256_of(adapters / "ink.safetensors"), 0.7)
    path = save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.png", SETTINGS, model="other", adapters=[use])
    (adapters / "sub").mkdir()
    (adapters / "ink.safetensors").rename(adapters / "sub" / "renamed.safetensors")
    shutil.copy(adapters / "lego.safetensors", adapters / "ink.safetensors")  # another adapter under its name
    session.library.refresh()
    restored = _restore(session, path)
    assert [(slot.file, slot.strength) for slot in restored.slots] == [("sub/renamed", 0.7)]
    assert restored.notes == ("ink is called sub/renamed here: the same file by its hash",)
    assert "drawn with <b>other</b>; the base here is random" in report_html(restored, model=session.model)


def test_missing_ones_are_listed_and_never_guessed(session: Session, tmp_path: Path) -> None:
    uses = [
        AdapterUse("ink", "ab" * 32, 1.0),
        AdapterUse("lego", EMPTY_SHA256, 1.0),
        AdapterUse("<script>", None, 1.0),
    ]
    path = save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.png", SETTINGS, model="random", adapters=uses)
    restored = _restore(session, path)
    assert restored.slots == ()
    assert [(one.name, one.hash) for one in restored.missing] == [
        ("ink", "ab" * 32), ("lego", EMPTY_SHA256), ("<script>", None),
    ]  # fmt: skip
    assert "empty file" in restored.missing[1].reason
    shown = report_html(restored, model="random")
    assert "<script>" not in shown and "&lt;script&gt;" in shown and "ab" * 32 in shown


@pytest.mark.parametrize("digits", [8, 10, 12, 64])
def test_short_hashes_of_file_or_tensors_match(session: Session, adapters: Path, digits: int) -> None:
    ink = adapters / "ink.safetensors"
    wanted = [Wanted("x", sha256_of(ink)[:digits].upper()), Wanted("y", _tensors_sha256(ink)[: min(digits, 12)])]
    assert [answer.name for answer in find_all(wanted, session.library)] == ["ink", "ink"]


@pytest.mark.parametrize(
    "hash", [EMPTY_SHA256, "e3b0c44298fc", "e3b0c44298", "0xe3b0c442", "1234567", "g" * 10, "", None]
)
def test_hashes_that_prove_nothing_find_nothing(session: Session, adapters: Path, hash: str | None) -> None:
    (adapters / "empty.safetensors").write_bytes(b"")
    session.library.refresh()
    (answer,) = find_all([Wanted("ink", hash)], session.library)
    assert isinstance(answer, Missing)


def test_files_are_hashed_once_and_only_as_far_as_needed(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def counted(path: Path) -> str:
        seen.append(path.stem)
        return sha256_of(path)

    monkeypatch.setattr(hashes_module, "sha256_of", counted)
    hashes_module._digest.cache_clear()
    lego = sha256_of(session.library.find("lego").path)
    for _ in range(2):
        (answer,) = find_all([Wanted("Lego", lego)], session.library)
        assert answer.name == "lego"
    assert seen == ["lego"]
    (late,) = find_all([Wanted("x", "ab" * 32)], session.library, patience=-1.0)
    assert isinstance(late, Missing) and "2 are left" in late.reason


def test_a1111_text_is_read() -> None:
    text = (
        "a cat (red:1.2)\non a hill <lora:ink:0.8><lora:sub/lego:-0.3>\nNegative prompt: dog,\nbird\n"
        "Steps: 30, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 42, Size: 512x768, "
        'Model hash: 1a2b3c4d5e, Model: "my, model", Clip skip: 2, '
        'Lora hashes: "ink: 0123456789ab, sub/lego: fedcba98", Version: v1.10.1'
    )
    parsed = parse_infotext(text)
    assert parsed.prompt == "a cat (red:1.2)\non a hill"
    assert parsed.negative == "dog,\nbird"
    assert parsed.tags == (LoraTag("ink", 0.8), LoraTag("sub/lego", -0.3))
    assert parsed.hashes == {"ink": "0123456789ab", "sub/lego": "fedcba98"}
    assert parsed.facts["Model"] == "my, model"
    settings, notes = settings_of(parsed, LIMITS)
    assert settings == GenerationSettings(
        "a cat (red:1.2)\non a hill", "dog,\nbird", 42, 30, 7.5, 512, 768, "dpm++ 2m karras"
    )
    assert notes == ("Clip skip: 2 is not done here",)


def test_what_cannot_be_taken_over_is_told() -> None:
    text = "x\nSteps: 900, Sampler: Restart, CFG scale: 7, Seed: -1, Size: 511x512"
    settings, notes = settings_of(parse_infotext(text), LIMITS)
    assert settings == GenerationSettings("x", steps=20, guidance_scale=7.0, height=512)
    assert sorted(note.partition(":")[0] for note in notes) == ["Sampler", "Seed", "Steps", "width"]


@pytest.mark.parametrize(
    "text", ["", "just words", "a\nNegative prompt: b", "Steps: 1", "<lora:a:b>", "\x00", "Steps: x, a, b"]
)
def test_odd_texts_do_not_break_it(text: str) -> None:
    settings, _ = settings_of(parse_infotext(text), LIMITS)
    assert settings.steps >= 1


def test_civitai_hashes_are_read() -> None:
    text = 'a <lora:ink:1>\nSteps: 20, Seed: 1, CFG scale: 7, Hashes: {"model": "aaaaaaaaaa", "lora:ink": "0123456789"}'
    parsed = parse_infotext(text)
    assert parsed.hashes == {"ink": "0123456789"} and parsed.facts["Seed"] == "1"


def test_a_picture_of_another_tool_is_restored(session: Session, adapters: Path, tmp_path: Path) -> None:
    short = _tensors_sha256(adapters / "ink.safetensors")[:12]
    text = (
        "a cat <lora:their name:0.8:0.5> <lora:lego:1>\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, "
        f'Size: 128x128, Lora hashes: "their name: {short}", Model: theirs'
    )
    restored = _restore(session, _with_text(tmp_path / "a.png", text))
    (slot,) = restored.slots
    assert (slot.file, slot.apart, slot.denoiser, slot.text_encoders) == ("ink", True, 0.5, 0.8)
    assert [one.name for one in restored.missing] == [
        "lego"
    ]  # its file is there, but nothing proves that it is the one
    assert restored.settings.prompt == "a cat" and restored.model == "theirs"


def test_the_own_text_is_enough(session: Session, adapters: Path, tmp_path: Path) -> None:
    """Sites that strip unknown chunks leave `parameters`."""
    last = list(
        session.start(DrawRequest(SETTINGS, check_adapters((INK, LEGO), session.parts)), owner="tab").updates()
    )[-1]
    assert last.picture is not None
    with Image.open(last.picture) as picture:
        restored = _restore(session, _with_text(tmp_path / "a.png", picture.info["parameters"]))
    assert restored.settings == replace(SETTINGS, width=None, height=None)
    assert restored.slots == (INK, replace(LEGO, curve=""))  # that text has no place for curves
    assert restored.missing == ()


def test_pictures_that_tell_nothing_are_refused(session: Session, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match=r"^plain.png: tells nothing; expected the text"):
        _restore(session, tmp_path / "plain.png")
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"^no.png: not a picture that can be read"):
        _restore(session, tmp_path / "no.png")


def test_strengths_that_the_rack_cannot_hold_are_told(session: Session) -> None:
    place = placed("ink", {"unet": 3.0, "text_encoder": 1.0, "text_encoder_2": 0.5}, session.parts)
    assert (place.slot.denoiser, place.slot.text_encoders) == (2.0, 1.0)
    assert len(place.notes) == 2
    assert placed("ink", 0.5, session.parts).notes == ()


def test_presets_come_back_as_they_were(session: Session, adapters: Path, tmp_path: Path) -> None:
    mask = Image.new("L", (64, 64), 128)
    off = replace(LEGO, enabled=False, solo=True, curve="0:0, 0.3:1")
    recipe = DrawRecipe(SETTINGS, (replace(INK, mask=mask), off), "additive")
    save_preset("my-look", recipe, session.library, model="random", output=session.output)
    assert list_presets(session.output) == ("my-look",)
    (adapters / "lego.safetensors").rename(adapters / "bricks.safetensors")
    session.library.refresh()
    restored = load_preset("my-look", session.library, session.parts, output=session.output)
    assert restored.settings == SETTINGS and restored.missing == ()
    first, second = restored.slots
    assert isinstance(first.mask, Image.Image)
    np.testing.assert_array_equal(np.asarray(first.mask), np.asarray(mask))
    assert second == replace(off, file="bricks")
    delete_preset("my-look", session.output)
    assert list_presets(session.output) == ()


@pytest.mark.parametrize("name", ["../x", "", None, 3, ".x", "a/b", "x" * 99, "a\x00"])
def test_names_of_presets_are_checked(session: Session, name: object) -> None:
    with pytest.raises(ValueError, match="^preset: got"):
        save_preset(name, DrawRecipe(SETTINGS), session.library, model="random", output=session.output)
    with pytest.raises(ValueError, match="^preset: got"):
        load_preset(name, session.library, session.parts, output=session.output)
    with pytest.raises(ValueError, match="^preset: got"):
        delete_preset(name, session.output)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": {"prompt": 1}}', "[" * 100_000])
def test_broken_presets_are_one_line(session: Session, content: str) -> None:
    folder = session.output / "presets"
    folder.mkdir(parents=True)
    (folder / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"^preset a: its file is not as this app writes it \(.*\)$"):
        load_preset("a", session.library, session.parts, output=session.output)


def test_presets_with_wrong_values_are_refused(session: Session) -> None:
    path = save_preset("a", DrawRecipe(SETTINGS, (INK,)), session.library, model="random", output=session.output)
    whole = json.loads(path.read_text())
    for change in ({"strength": 9}, {"enabled": "yes"}, {"curve": 3}, {"blocks": ["x"]}, {"mask": "../../etc/passwd"}):
        path.write_text(json.dumps({**whole, "slots": [{**whole["slots"][0], **change}]}))
        with pytest.raises(ValueError, match="^preset a: its file is not as this app writes it"):
            load_preset("a", session.library, session.parts, output=session.output)


def test_history_is_paged_newest_first(tmp_path: Path) -> None:
    import os

    for index in range(PAGE + 3):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (8, 8)).save(path)
        os.utime(path, (index, index))
    (tmp_path / "note.txt").write_text("x")
    (tmp_path / ".hidden.png").write_bytes(b"")
    first, second = list_pictures(tmp_path), list_pictures(tmp_path, 99)
    assert (first.names[0], len(first.names), first.pages, first.found) == (f"{PAGE + 2}.png", PAGE, 2, PAGE + 3)
    assert second.names == ("2.png", "1.png", "0.png") and second.number == 1
    assert list_pictures(tmp_path / "nowhere").sentence() == "Nothing is drawn yet."


@pytest.mark.parametrize(
    "name", ["../a.png", "/etc/passwd", "a.txt", None, 3, "x/a.png", "gone.png", ".a.png", "a\x00.png"]
)
def test_history_opens_its_own_pictures_only(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"picture: got|the picture is gone"):
        find_picture(folder, name)


def test_links_out_of_the_history_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "out" / "link.png").symlink_to(tmp_path / "a.png")
    assert list_pictures(tmp_path / "out").names == ()
    with pytest.raises(ValueError, match="gone"):
        find_picture(tmp_path / "out", "link.png")


def test_described_escapes_what_files_say(tmp_path: Path) -> None:
    settings = replace(SETTINGS, prompt="<img src=x onerror=alert(1)>")
    path = save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.png", settings, model="<b>", adapters=[])
    assert "<img" not in described(path) and "<b><b>" not in described(path)


def test_largest_difference_is_of_any_channel() -> None:
    first = Image.new("RGB", (4, 4), (10, 20, 30))
    second = first.copy()
    second.putpixel((2, 1), (10, 13, 35))
    assert largest_difference(first, first) == 0
    assert largest_difference(first, second) == 7
    with pytest.raises(ValueError, match="4 x 4 and 5 x 4"):
        largest_difference(first, Image.new("RGB", (5, 4)))


@pytest.mark.parametrize("tool", ["comfyui", "a1111"])
def test_an_adapter_exported_for_a_tool_says_how_near_that_draws(session: Session, tool: str) -> None:
    request = DrawRequest(SETTINGS, (AdapterChoice("ink", 1.0),))
    done = export_mix(session, request, ExportOptions("for-it", format="peft", tool=tool))
    assert done.path.is_file() and examine(done.path).format == "kohya"
    assert done.largest_difference <= 1, done.sentence  # drawn from the file by us, beside the base
    assert f"Made for {TOOLS[tool].title}: " in done.sentence
    found = re.search(r"It draws each layer's change to ([0-9.e+-]+) or nearer", done.sentence)
    assert found is not None and float(found[1]) < 1e-4
    with pytest.raises(ValueError, match="tool: got 'webui', expected one of comfyui, "):
        export_mix(session, request, ExportOptions("other", tool="webui"))


@pytest.mark.parametrize("format", ["diffusers", "peft", "kohya"])
def test_an_exported_adapter_draws_as_the_rack_did(session: Session, format: str) -> None:
    slots = (
        replace(INK, blocks=tuple(1.0 if index else 0.5 for index in range(len(session.parts.blocks)))),
        replace(LEGO, curve=""),
    )
    request = DrawRequest(SETTINGS, check_adapters(slots, session.parts))
    assert format in FORMATS
    done = export_mix(session, request, ExportOptions("both", format=format))
    assert done.largest_difference <= 1, done.sentence
    assert done.name.rstrip("/") == "both" and done.name in session.library.usable
    assert "Drawn from the file:" in done.sentence and str(done.path) in done.sentence
    live, again = (Image.open(path) for path in done.pictures)
    with live, again:
        assert largest_difference(live, again) == done.largest_difference
        assert json.loads(again.info["dora_diffusion"])["adapters"][0]["name"] == done.name
    with pytest.raises(ValueError, match="^name: both.* is there already"):
        export_mix(session, request, ExportOptions("both", format=format))


def test_a_smaller_rank_tells_its_difference(session: Session) -> None:
    request = DrawRequest(SETTINGS, (AdapterChoice("ink", 1.0), AdapterChoice("lego", 1.0)))
    done = export_mix(session, request, ExportOptions("small", mode="ties", rank=1))
    assert done.largest_difference > 1
    assert f"largest difference {done.largest_difference} of 255" in done.sentence


def test_what_cannot_be_exported_leaves_nothing(
    session: Session, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(adapters.iterdir())
    for request, options, message in (
        (DrawRequest(SETTINGS), ExportOptions("a"), "nothing to export"),
        (DrawRequest(SETTINGS, check_adapters((LEGO,), session.parts)), ExportOptions("a"), "lego: has a curve"),
        (DrawRequest(SETTINGS, (AdapterChoice("ink", 1.0),)), ExportOptions("../a"), "name: got"),
        (DrawRequest(SETTINGS, (AdapterChoice("ink", 1.0),)), ExportOptions("a", format="zip"), "format: got"),
        (DrawRequest(SETTINGS, (AdapterChoice("ink", 1.0),)), ExportOptions("ink"), "name: ink.safetensors is there"),
        (
            DrawRequest(SETTINGS, (AdapterChoice("ink", 1.0),)),
            ExportOptions("a", target="a whole model"),
            "random: the base",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            export_mix(session, request, options)
    drawn: list[DrawRequest] = []
    draw = session.draw

    def fails_at_last(request: DrawRequest, *, should_stop: Callable[[], bool]) -> object:
        drawn.append(request)
        if len(drawn) == 2:
            raise ValueError("broken")
        return draw(request, should_stop=should_stop)

    monkeypatch.setattr(session, "draw", fails_at_last)
    with pytest.raises(ValueError, match="^broken$"):
        export_mix(session, DrawRequest(SETTINGS, (AdapterChoice("ink", 1.0),)), ExportOptions("a"))
    assert sorted(adapters.iterdir()) == before
    assert "a" not in session.library.usable


@pytest.mark.parametrize(("format", "calls"), [("diffusers", 1), ("peft", 6)])
def test_an_export_that_cannot_be_written_leaves_nothing_and_is_one_line(
    session: Session, adapters: Path, format: str, calls: int
) -> None:
    before = contents(adapters)
    request = DrawRequest(SETTINGS, (AdapterChoice("ink", 1.0), AdapterChoice("lego", 0.5)))
    for call in range(calls):
        with failing_at(call, of=RENAMES) as tried, pytest.raises(gr.Error) as caught, user_errors(is_markup=False):
            export_mix(session, request, ExportOptions("both", format=format))
        assert len(tried) == call + 1
        assert contents(adapters) == before and not session.output.exists()
        assert not caught.value.print_exception  # no traceback in the terminal: it was foreseen
        assert "both" in caught.value.message and "No space left on device" in caught.value.message
        assert "\n" not in caught.value.message and "staging" not in caught.value.message


def test_a_model_that_cannot_be_written_leaves_nothing_and_is_one_line(
    pipe: object, adapters: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    pipe.save_pretrained(base)  # type: ignore[attr-defined]
    own = Session(pipe, model=str(base), folder=adapters, output=tmp_path / "out")
    request = DrawRequest(SETTINGS, check_adapters((INK,), own.parts))
    options = ExportOptions("whole", target="a whole model")
    messages = []
    for call in range(100):
        with failing_at(call, of=RENAMES):
            try:
                with user_errors(is_markup=False):
                    export_mix(own, request, options)
                break
            except gr.Error as error:
                assert list((tmp_path / "out" / "models").iterdir()) == [] or "png" in error.message
                messages.append(error.message)
    own.close()
    assert len(messages) > 10
    assert all("No space left on device" in text and "staging" not in text and "\n" not in text for text in messages)


@pytest.mark.parametrize("asks", [0, 1, 2, 3, 5, 40, 95])
def test_a_stopped_export_leaves_nothing(session: Session, adapters: Path, asks: int) -> None:
    before, asked = sorted(adapters.iterdir()), itertools.count()
    request = DrawRequest(SETTINGS, (AdapterChoice("ink", 1.0), AdapterChoice("lego", 0.5)))
    with pytest.raises(GenerationStopped):
        export_mix(session, request, ExportOptions("both"), should_stop=lambda: next(asked) >= asks)
    assert sorted(adapters.iterdir()) == before
    assert not session.output.exists() and "both" not in session.library.usable


def test_a_baked_model_draws_as_the_rack_did(session: Session, adapters: Path, tmp_path: Path, pipe: object) -> None:
    folder = tmp_path / "base"
    pipe.save_pretrained(folder)  # type: ignore[attr-defined]
    own = Session(pipe, model=str(folder), folder=adapters, output=tmp_path / "out")
    request = DrawRequest(SETTINGS, check_adapters((INK,), own.parts))
    done = export_mix(own, request, ExportOptions("whole", target="a whole model"))
    assert done.path == tmp_path / "out" / "models" / "whole" and (done.path / "model_index.json").is_file()
    assert done.largest_difference <= 1 and done.name == ""
    for asks in (3, 6, 20):  # while it draws, while it is written, while it draws again
        asked = itertools.count()
        with pytest.raises(GenerationStopped):
            export_mix(
                own,
                request,
                ExportOptions("again", target="a whole model"),
                should_stop=lambda asked=asked, asks=asks: next(asked) >= asks,
            )
        assert [path.name for path in done.path.parent.iterdir()] == ["whole"]
    own.close()
