"""The app without a browser: what is drawn, saved, cached, stopped, and kept apart between tabs."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.generation.base_use import BaseUse, PartUse
from dora_diffusion.generation.generate import Canvas, GenerationSettings, GenerationStopped, generate
from dora_diffusion.generation.inputs import find_input
from dora_diffusion.generation.png_metadata import metadata_text, read_metadata
from dora_diffusion.generation.prompts import LoraTag
from dora_diffusion.utils.atomic import sha256_of
from tests.pocket_random import random_pocket_pipeline
from tests.tolerances import assert_identical
from tests.ui.scripted import until
from ui.backend import engine as engine_module
from ui.backend.request import AdapterChoice, DrawRequest
from ui.backend.run import Update
from ui.backend.session import Session
from ui.library.library import AdapterLibrary, stamp_of

SETTINGS = GenerationSettings("a cat on a red background", negative_prompt="dog", seed=3, steps=2, guidance_scale=3.0)
LONG = GenerationSettings("a cat", steps=100)
INK = AdapterChoice("ink", 0.8)
LEGO = AdapterChoice("lego", {"unet": -0.5, "text_encoder": 1.5})


def _pixels(path: Path | None) -> np.ndarray:
    assert path is not None
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def _finish(session: Session, request: DrawRequest, owner: str = "tab") -> Update:
    return list(session.start(request, owner=owner).updates())[-1]


def _expected(pipe: StableDiffusionPipeline, adapters: Path, settings: GenerationSettings, weights: dict) -> np.ndarray:
    """What the library draws by itself."""
    manager = AdapterManager(pipe)
    for name in weights:
        manager.load_adapter(adapters / f"{name}.safetensors", name=name)
    manager.set_adapters(weights)
    picture = generate(pipe, settings)
    manager.unload()
    return np.asarray(picture)


def test_a_session_looks_into_its_folder_once(
    pipe: StableDiffusionPipeline, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Path] = []
    refresh = AdapterLibrary.refresh
    monkeypatch.setattr(AdapterLibrary, "refresh", lambda library: looked.append(library.folder) or refresh(library))
    session = Session(pipe, model="random", folder=adapters, output=tmp_path / "out")
    session.close()
    assert looked == [adapters] and session.library.usable == ("ink", "lego")


def test_blend_and_base_are_what_the_library_draws(
    session: Session, pipe: StableDiffusionPipeline, adapters: Path
) -> None:
    weights = {"ink": 0.8, "lego": {"unet": -0.5, "text_encoder": 1.5}}
    blend = _expected(pipe, adapters, SETTINGS, weights)
    base = _expected(pipe, adapters, SETTINGS, {})
    last = _finish(session, DrawRequest(SETTINGS, (INK, LEGO)))
    assert last.phase == "done"
    np.testing.assert_array_equal(_pixels(last.picture), blend)
    np.testing.assert_array_equal(_pixels(last.base), base)
    assert not np.array_equal(blend, base)


def test_saved_picture_names_its_adapters(session: Session, adapters: Path, tmp_path: Path) -> None:
    last = _finish(session, DrawRequest(SETTINGS, (INK, LEGO)))
    assert last.picture is not None and last.picture.parent == tmp_path / "out"
    with Image.open(last.picture) as picture:
        record = json.loads(picture.info["dora_diffusion"])
        parameters = picture.info["parameters"]
    assert [(a["name"], a["sha256"], a["weight"]) for a in record["adapters"]] == [
        ("ink", sha256_of(adapters / "ink.safetensors"), 0.8),
        ("lego", sha256_of(adapters / "lego.safetensors"), {"unet": -0.5, "text_encoder": 1.5}),
    ]
    assert record["model"] == "random"
    assert parameters.startswith("a cat on a red background <lora:ink:0.8>")


def test_base_is_drawn_once_for_the_same_settings(session: Session, tmp_path: Path) -> None:
    first = _finish(session, DrawRequest(SETTINGS, (INK,)))
    second = _finish(session, DrawRequest(SETTINGS, (LEGO,)))
    assert first.base == second.base
    assert first.picture != second.picture
    assert list((tmp_path / "out" / "base").iterdir()) == [first.base]
    assert first.base is not None
    first.base.unlink()
    third = _finish(session, DrawRequest(SETTINGS, (INK,)))
    assert _pixels(third.base).shape == (128, 128, 3)


def test_without_adapters_the_picture_is_the_base(session: Session) -> None:
    last = _finish(session, DrawRequest(SETTINGS, ()))
    assert last.picture == last.base
    assert last.picture is not None


def test_stop_ends_a_run_and_saves_nothing(session: Session, tmp_path: Path) -> None:
    run = session.start(DrawRequest(LONG, (INK,)), owner="tab")
    seen = []
    for update in run.updates():
        seen.append(update)
        if update.step:
            session.stop("tab")
    assert seen[-1].phase == "stopped"
    assert 0 < seen[-1].step < 100
    assert [update.preview.size for update in seen if update.preview][:1] == [(128, 128)]
    assert not (tmp_path / "out").exists()
    assert _finish(session, DrawRequest(SETTINGS, ())).phase == "done"


def test_leaving_the_page_stops_the_work(session: Session, tmp_path: Path) -> None:
    run = session.start(DrawRequest(LONG, ()), owner="tab")
    updates = run.updates()
    next(updates)
    updates.close()  # type: ignore[attr-defined]
    until(lambda: run.finished)  # it ends within a step
    assert run.latest.phase == "stopped"
    assert not (tmp_path / "out").exists()


def test_tabs_take_turns_and_do_not_mix(session: Session, pipe: StableDiffusionPipeline, adapters: Path) -> None:
    expected = _expected(pipe, adapters, SETTINGS, {"lego": 1.0})
    long = session.start(DrawRequest(LONG, (INK,)), owner="first")
    news = long.updates()
    while next(news).phase != "blend":
        pass
    waiting = session.start(DrawRequest(SETTINGS, (AdapterChoice("lego", 1.0),)), owner="second")
    gives_up = session.start(DrawRequest(SETTINGS, ()), owner="third")
    assert waiting.latest.phase == "waiting"
    session.stop("third")
    assert list(gives_up.updates())[-1].phase == "stopped"
    assert not long.is_stopping()
    session.stop("first")
    assert list(news)[-1].phase == "stopped"
    np.testing.assert_array_equal(_pixels(list(waiting.updates())[-1].picture), expected)


def test_a_new_run_of_a_tab_stops_its_earlier_one(session: Session) -> None:
    earlier = session.start(DrawRequest(LONG, ()), owner="tab")
    assert _finish(session, DrawRequest(SETTINGS, ())).phase == "done"
    assert list(earlier.updates())[-1].phase == "stopped"


def test_an_error_reaches_the_tab_and_frees_the_pipeline(session: Session) -> None:
    with pytest.raises(ValueError, match=r"^nowhere: no such adapter in .*; press Refresh"):
        _finish(session, DrawRequest(SETTINGS, (AdapterChoice("nowhere", 1.0),)))
    assert _finish(session, DrawRequest(SETTINGS, ())).phase == "done"


def test_load_reports_and_refuses(session: Session, adapters: Path) -> None:
    loaded = session.load("ink")
    report = loaded.report
    assert (report.kind, report.ranks, report.matched, report.total) == (
        "DoRA",
        (4,),
        88,
        88,
    )  # 8 projections of 9 UNet blocks, 4 of 4 text layers
    assert report.sha256 == sha256_of(adapters / "ink.safetensors")
    assert (loaded.model, loaded.stamp) == ("random", stamp_of(adapters / "ink.safetensors"))
    assert loaded.seconds and session.load("ink").seconds is None
    with pytest.raises(ValueError, match=r"^broken: not a safetensors file, or cut short \(14 bytes\)$"):
        session.load("broken")


def test_a_changed_file_is_loaded_again(session: Session, adapters: Path) -> None:
    assert session.load("ink").report.kind == "DoRA"
    (adapters / "ink.safetensors").write_bytes((adapters / "lego.safetensors").read_bytes())
    assert session.load("ink").report.kind == "LoRA"
    (adapters / "ink.safetensors").unlink()
    with pytest.raises(ValueError, match="^ink: the file is gone"):
        session.load("ink")


def test_unused_adapters_make_room(
    session: Session, pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "MAX_LOADED", 1)
    session.load("ink")
    session.load("lego")
    assert [*session.loaded] == ["lego"]
    assert _finish(session, DrawRequest(SETTINGS, (INK, LEGO))).phase == "done"
    assert [*session.loaded] == ["ink", "lego"]


SMALL = replace(SETTINGS, width=64, height=64)
FADE = ((0.0, 0.0), (1.0, 1.0))
LEFT = Image.new("L", (64, 64))
LEFT.paste(255, (0, 0, 32, 64))
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def test_a_batch_has_a_picture_for_every_seed(session: Session) -> None:
    last = _finish(session, DrawRequest(SMALL, (INK,), count=3))
    assert last.count == 3 and len(last.pictures) == 3 and last.picture == last.pictures[-1]
    alone = [_finish(session, DrawRequest(replace(SMALL, seed=seed), (INK,))) for seed in (3, 4, 5)]
    for together, single in zip(last.pictures, alone, strict=True):
        np.testing.assert_array_equal(_pixels(together), _pixels(single.picture))
    assert last.base == alone[-1].base


def test_a_batch_without_adapters(session: Session) -> None:
    last = _finish(session, DrawRequest(SMALL, count=2))
    assert len(set(last.pictures)) == 2 and last.picture == last.base == last.pictures[-1]


@pytest.mark.parametrize(
    "request_",
    [
        DrawRequest(SMALL, (INK, LEGO), blend="compose"),
        DrawRequest(SMALL, (INK, AdapterChoice("lego", 0.5, curve=FADE))),
        DrawRequest(SMALL, (AdapterChoice("ink", 1.0, mask=LEFT),)),
        DrawRequest(replace(SMALL, sampler="dpm++ 2m"), (INK,)),
        DrawRequest(replace(SMALL, prompt="a (cat:1.4)"), (INK,)),
        DrawRequest(replace(SMALL, strength=0.6), (INK,), canvas=Canvas(PICTURE, LEFT)),
        DrawRequest(SMALL, (AdapterChoice("ink", {"unet": 1.0, "unet.mid_block": 0.5, "text_encoder": 0.0}),)),
    ],
    ids=["mode", "curve", "mask", "sampler", "weights", "canvas", "blocks"],
)
def test_a_request_is_what_the_library_draws_and_leaves_nothing(
    session: Session, pipe: StableDiffusionPipeline, adapters: Path, request_: DrawRequest
) -> None:
    scheduler = pipe.scheduler
    plain = session.draw(DrawRequest(SMALL))[0].image
    manager = AdapterManager(pipe)
    session.close()
    for choice in request_.adapters:
        manager.load_adapter(adapters / f"{choice.file}.safetensors", name=choice.file)
    manager.set_adapters({choice.file: choice.weight for choice in request_.adapters}, blend=request_.blend)
    for choice in request_.adapters:
        if choice.curve:
            manager.set_schedule(choice.file, choice.curve)
        if choice.mask:
            manager.set_mask(choice.file, choice.mask)
    expected = generate(pipe, request_.settings, canvas=request_.canvas)
    manager.unload()
    session = Session(pipe, model="random", folder=adapters, output=session.output)
    last = _finish(session, request_)
    np.testing.assert_array_equal(_pixels(last.picture), np.asarray(expected))
    assert not np.array_equal(_pixels(last.picture), _pixels(last.base))
    assert session.draw(DrawRequest(SMALL))[0].image.tobytes() == plain.tobytes()
    session.close()
    assert pipe.scheduler is scheduler
    assert not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks


def test_tags_become_adapters_and_the_rack_wins(session: Session) -> None:
    tagged = replace(SMALL, prompt="a cat <lora:INK:0.8> on red <lora:lego:1.5>")
    last = _finish(session, DrawRequest(tagged, (AdapterChoice("lego", 0.25),)))
    same = _finish(session, DrawRequest(replace(SMALL, prompt="a cat on red"), (AdapterChoice("lego", 0.25), INK)))
    np.testing.assert_array_equal(_pixels(last.picture), _pixels(same.picture))
    assert last.picture is not None
    record = read_metadata(last.picture)
    assert record is not None and record.settings.prompt == "a cat on red"
    assert {use.name: use.weight for use in record.adapters} == {"ink": 0.8, "lego": 0.25}
    assert record.origin.tags == (LoraTag("INK", 0.8), LoraTag("lego", 1.5))
    with pytest.raises(ValueError, match="^prompt: no adapter named 'lgo' for <lora:...>; nearest: lego$"):
        session.start(DrawRequest(replace(SMALL, prompt="<lora:lgo:1>")), owner="tab")


def test_metadata_loses_nothing(session: Session, adapters: Path, tmp_path: Path) -> None:
    settings = replace(SMALL, sampler="euler a", strength=0.6)
    choice = AdapterChoice("ink", {"unet": 1.0, "unet.mid_block": 0.5}, curve=FADE, mask=LEFT)
    last = _finish(session, DrawRequest(settings, (choice,), canvas=Canvas(PICTURE, LEFT)))
    assert last.picture is not None
    record = read_metadata(last.picture)
    assert record is not None
    assert (record.settings, record.model, record.blend) == (settings, "random", "additive")
    [use] = record.adapters
    assert (use.name, use.weight, use.schedule) == ("ink", choice.weight, FADE)
    assert use.sha256 == sha256_of(adapters / "ink.safetensors")
    for sha256, picture in ((use.mask, LEFT), (record.origin.canvas, PICTURE), (record.origin.canvas_mask, LEFT)):
        assert sha256 is not None
        found = find_input(tmp_path / "out", sha256)
        assert found is not None and found.tobytes() == picture.tobytes()
    assert "Sampler: Euler a, " in record.parameters and "Denoising strength: 0.6" in record.parameters
    assert "euler a" in metadata_text(last.picture)


def test_broken_metadata_is_one_line(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    picture = tmp_path / "x.png"
    for text in ("[" * 10_000, "{}", '{"settings": {"prompt": 7}, "adapters": [], "model": ""}', "7", "null"):
        info = PngInfo()
        info.add_itxt("dora_diffusion", text)
        PICTURE.save(picture, pnginfo=info)
        with pytest.raises(ValueError, match="^x.png: its metadata is not as this app writes it "):
            read_metadata(picture)
    PICTURE.save(picture)
    assert read_metadata(picture) is None
    picture.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="^x.png: not a picture that can be read"):
        read_metadata(picture)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 900 + "]" * 900, "no JSON", "{"])
def test_json_that_cannot_be_laid_out_is_one_line(tmp_path: Path, text: str) -> None:
    from PIL.PngImagePlugin import PngInfo

    picture, info = tmp_path / "x.png", PngInfo()
    info.add_itxt("dora_diffusion", text)
    info.add_text("parameters", "a cat")
    PICTURE.save(picture, pnginfo=info)
    shown, _, line = metadata_text(picture).partition("\n\n")
    assert shown == "a cat"
    assert line == "" or line.startswith("[") or "\n" not in line
    with pytest.raises(ValueError, match="^x.png: its metadata is not as this app writes it "):
        read_metadata(picture)


def test_those_that_wait_know_how_many_are_before_them(session: Session) -> None:
    runs = [session.start(DrawRequest(LONG), owner=str(number)) for number in range(3)]
    while runs[2].latest.ahead != 2:
        assert not runs[2].finished
    assert runs[1].latest.ahead == 1
    session.stop("0")
    while runs[2].latest.ahead != 1:
        assert not runs[2].finished
    session.stop("1")
    session.stop("2")
    assert [list(run.updates())[-1].phase for run in runs] == ["stopped"] * 3
    assert not session.busy


def test_turns_come_in_order(session: Session, tmp_path: Path) -> None:
    quick = replace(SMALL, steps=1)
    runs = [session.start(DrawRequest(replace(quick, seed=seed)), owner=str(seed)) for seed in range(4)]
    last = [list(run.updates())[-1].picture for run in runs]
    times = [path.stat().st_mtime_ns for path in last if path is not None]
    assert times == sorted(times) and len(times) == 4


def test_draw_waits_for_its_turn_and_can_be_stopped(session: Session) -> None:
    session.start(DrawRequest(LONG), owner="tab")
    with pytest.raises(GenerationStopped):
        session.draw(DrawRequest(SMALL), should_stop=lambda: True)
    threading.Timer(0.3, session.stop, ("tab",)).start()
    [drawn] = session.draw(DrawRequest(SMALL, (INK,)))
    assert drawn.seconds > 0 and drawn.adapters[0].name == "ink"
    record = read_metadata(session.save(drawn))
    assert record is not None and record.settings == SMALL


def test_times_are_told(session: Session) -> None:
    last = _finish(session, DrawRequest(SMALL, (INK,)))
    parts = (last.load_seconds, last.mix_seconds, last.draw_seconds)
    assert min(parts) > 0 and sum(parts) < last.seconds


def test_another_base_is_switched_to(session: Session, tmp_path: Path) -> None:
    assert session.models[:2] == ("random", "pocket")
    assert session.parts.blocks[0].prefixes == ("unet.down_blocks",)
    session.load("ink")
    with pytest.raises(ValueError, match=r"^model '/etc' is not offered here; expected one of random, pocket"):
        session.switch("/etc")
    misfits = session.switch("pocket-dit")
    assert session.model == "pocket-dit" and session.parts.denoiser == "transformer"
    assert [block.label for block in session.parts.blocks] == ["early blocks", "middle blocks", "late blocks"]
    assert list(misfits) == ["ink"] and "\n" not in misfits["ink"]
    last = _finish(session, DrawRequest(replace(SMALL, steps=1)))
    assert last.picture is not None
    record = read_metadata(last.picture)
    assert record is not None and record.model == "pocket-dit"
    with pytest.raises(ValueError, match="ink"):
        _finish(session, DrawRequest(SMALL, (INK,)))


def test_a_request_made_for_another_base_is_refused(session: Session) -> None:
    long = session.start(DrawRequest(LONG), owner="long")
    switching = threading.Thread(target=session.switch, args=("pocket",))
    switching.start()
    while session.waiting < 2:
        assert switching.is_alive()
    late = session.start(DrawRequest(SMALL, (INK,)), owner="late")
    session.stop("long")
    assert list(long.updates())[-1].phase == "stopped"
    with pytest.raises(ValueError, match="^the base was switched to pocket while this waited; press Generate again$"):
        list(late.updates())
    switching.join()


def test_what_variations_were_drawn_on_is_kept_with_them(session: Session) -> None:
    canvas = Canvas(Image.new("RGB", (64, 64), "navy"), Image.new("L", (64, 64), 255))
    mask = Image.linear_gradient("L").resize((64, 64))
    request = DrawRequest(replace(SETTINGS, strength=0.6), (replace(INK, mask=mask),), canvas=canvas)
    (drawn,) = session.draw(request)
    record = read_metadata(session.save(drawn, session.output / "maps"))
    assert record is not None and record.origin.canvas is not None and record.origin.canvas_mask is not None
    for name, picture in (
        (record.origin.canvas, canvas.image),
        (record.origin.canvas_mask, canvas.mask),
        (record.adapters[0].mask, mask),
    ):
        kept = find_input(session.output, str(name))
        assert kept is not None and picture is not None and np.array_equal(np.asarray(kept), np.asarray(picture))


def test_closing_stops_variations_too(pipe: StableDiffusionPipeline, adapters: Path, tmp_path: Path) -> None:
    session = Session(pipe, model="random", folder=adapters, output=tmp_path / "out")
    steps: list[int] = []

    def on_step(report: object) -> None:
        steps.append(1)
        session.stop_all()

    with pytest.raises(GenerationStopped):
        session.draw(DrawRequest(LONG), on_step=on_step)
    assert len(steps) <= 2
    session.close()
    with pytest.raises(GenerationStopped):
        session.draw(DrawRequest(SETTINGS))


def test_a_base_keeps_the_files_it_came_with(
    pipe: StableDiffusionPipeline, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back from another base, its UNet is again the one of the file; the other base has its own."""
    other = random_pocket_pipeline(seed=3)
    other.unet.save_pretrained(tmp_path / "tuned")
    file = tmp_path / "tuned" / "diffusion_pytorch_model.safetensors"
    options = {"model": "pocket", "folder": adapters, "output": tmp_path / "out", "files": {"unet": file}}
    session = Session(pipe, **options)
    assert session.files == {"unet": file}
    session.switch("pocket-dit")
    assert session.files == {}
    session.switch("pocket")
    assert_identical(session._engine.pipe.unet.state_dict(), other.unet.state_dict())
    session.close()


def test_a_picture_names_all_that_it_was_drawn_with(
    pipe: StableDiffusionPipeline, adapters: Path, tmp_path: Path
) -> None:
    """What a redrawing needs: where the base, its UNet's own file, the adapter, its mask and the canvas lie."""
    pipe.unet.save_pretrained(tmp_path / "tuned")
    file = tmp_path / "tuned" / "diffusion_pytorch_model.safetensors"
    session = Session(pipe, model="pocket", folder=adapters, output=tmp_path / "out", files={"unet": file})
    request = DrawRequest(replace(SMALL, strength=0.6), (replace(INK, mask=LEFT),), canvas=Canvas(PICTURE, LEFT))
    (drawn,) = session.draw(request)
    record = read_metadata(session.save(drawn))
    session.close()
    assert record is not None
    assert record.origin.base == BaseUse("pocket", parts=(PartUse("unet", str(file), sha256_of(file)),))
    [use] = record.adapters
    assert use.file == str(adapters / "ink.safetensors")
    for name, picture in (
        (use.mask_file, LEFT),
        (record.origin.canvas_file, PICTURE),
        (record.origin.canvas_mask_file, LEFT),
    ):
        with Image.open(tmp_path / "out" / str(name)) as kept:
            assert kept.tobytes() == picture.tobytes()
