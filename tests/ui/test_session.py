"""The app without a browser: what is drawn, saved, cached, stopped, and kept apart between tabs."""

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from dora_diffusion.adapters import AdapterManager
from dora_diffusion.generation import GenerationSettings, generate
from dora_diffusion.storage import sha256_of
from ui import session as session_module
from ui.request import AdapterChoice, DrawRequest
from ui.run import Update
from ui.session import Session

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
    assert run.finished
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
    report = session.load("ink")
    assert (report.kind, report.ranks, report.matched, report.total) == (
        "DoRA",
        (4,),
        88,
        88,
    )  # 8 projections of 9 UNet blocks, 4 of 4 text layers
    assert report.sha256 == sha256_of(adapters / "ink.safetensors")
    with pytest.raises(ValueError, match=r"^broken: not a safetensors file, or cut short \(14 bytes\)$"):
        session.load("broken")


def test_a_changed_file_is_loaded_again(session: Session, adapters: Path) -> None:
    assert session.load("ink").kind == "DoRA"
    (adapters / "ink.safetensors").write_bytes((adapters / "lego.safetensors").read_bytes())
    assert session.load("ink").kind == "LoRA"
    (adapters / "ink.safetensors").unlink()
    with pytest.raises(ValueError, match="^ink: the file is gone"):
        session.load("ink")


def test_unused_adapters_make_room(
    session: Session, pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "MAX_LOADED", 1)
    session.load("ink")
    session.load("lego")
    assert [*session.loaded] == ["lego"]
    assert _finish(session, DrawRequest(SETTINGS, (INK, LEGO))).phase == "done"
    assert [*session.loaded] == ["ink", "lego"]
