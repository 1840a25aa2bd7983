"""A picture is drawn, found in the history, restored, dropped, kept as a preset, exported and drawn from the file."""

import socket
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from dora_diffusion.canvases import Canvas
from tests.ui.tab import CHROMIUM, PATIENCE_MS, PHONE, SWITCHES, Tab
from ui import history, rack, restore
from ui.export import build_export
from ui.form import build_form, build_prompt
from ui.history import build_history
from ui.look import theme
from ui.presets import build_presets
from ui.recipes import RecipeWidgets
from ui.request import DetailValues, DrawRequest, SlotValues, check_adapters, check_settings
from ui.restore import build_restore
from ui.session import Session

LONG_PATIENCE_MS = 60_000


@pytest.fixture
def served(pipe: StableDiffusionPipeline, adapters: Path, tmp_path: Path) -> Iterator[tuple[Session, str]]:
    """A page of form, rack, history, presets, restore and export."""
    session = Session(pipe, model="random", folder=adapters, output=tmp_path / "out")
    session.output.mkdir()
    with gr.Blocks(title="Keep", analytics_enabled=False) as demo:
        form = build_form(session, build_prompt())
        widgets = RecipeWidgets(form, rack.build_rack(session, demo))
        with gr.Tab("History"):
            build_history(session, widgets, demo)
        with gr.Tab("Presets"):
            build_presets(session, widgets)
            build_restore(session, widgets)
        with gr.Tab("Export"):
            build_export(session, widgets)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    _, url, _ = demo.queue().launch(
        server_name="127.0.0.1",
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        footer_links=[],
        allowed_paths=[str(session.output.resolve())],
        css=restore.CSS + history.CSS + rack.CSS,
        theme=theme(),
    )
    yield session, url
    demo.close(verbose=False)
    session.close()


@pytest.fixture
def keep(served: tuple[Session, str]) -> Iterator[Tab]:
    """A tab that shows it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        tab = Tab(browser.new_page(viewport={"width": 1280, "height": 900}))
        tab.watch()
        tab.page.goto(served[1])
        expect(tab.page.locator("#prompt textarea")).to_be_visible(timeout=PATIENCE_MS)
        yield tab
        browser.close()
    assert tab.hosts == {"127.0.0.1"}
    assert tab.errors == []


def _drawn(session: Session, prompt: str, strength: float) -> Path:
    ink = SlotValues("ink", True, strength, False, strength, strength)
    settings = check_settings(prompt, "dog", seed=5, steps=2, guidance=3.0)
    request = DrawRequest(settings, check_adapters((ink,), session.parts))
    return session.save(session.draw(request)[0])


def _open(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def _expect_restored(page: Page, prompt: str, strength: str) -> None:
    expect(page.locator("#prompt textarea")).to_have_value(prompt, timeout=PATIENCE_MS)
    expect(page.locator("#slot-1-file input")).to_have_value("ink", timeout=PATIENCE_MS)
    expect(page.locator("#slot-1-strength input[type=number]")).to_have_value(strength)
    expect(page.locator("#seed input")).to_have_value("5")
    expect(page.locator("#steps input[type=number]")).to_have_value("2")
    expect(page.get_by_text("Dropdown", exact=True)).to_have_count(0)  # a widget that nobody asked for


def test_history_restores_and_compares(keep: Tab, served: tuple[Session, str]) -> None:
    session, page = served[0], keep.page
    _drawn(session, "a red cat", 0.5)
    _drawn(session, "a <b>blue</b> cat", 1.5)
    page.locator("#history-refresh").click()
    pictures = page.locator("#history-gallery button:has(img)")
    expect(pictures).to_have_count(2, timeout=PATIENCE_MS)
    expect(page.locator("#history-place")).to_contain_text("2 pictures, page 1 of 1")
    pictures.nth(0).click()
    expect(page.locator("#history-facts")).to_contain_text("a <b>blue</b> cat", timeout=PATIENCE_MS)
    page.locator("#history-restore").click()
    _expect_restored(page, "a <b>blue</b> cat", "1.5")
    expect(page.locator("#history-report")).to_contain_text("Restored the settings and 1 adapter.")
    page.locator("#history-pin").click()
    expect(page.locator("#history-report")).to_contain_text("Press another picture")
    pictures.nth(1).click()
    expect(page.locator("#history-report")).to_contain_text("Largest difference", timeout=PATIENCE_MS)
    expect(page.locator("#history-compare img").first).to_be_visible()
    keep.snap("keep-history")
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    keep.snap("keep-history-phone")


def test_a_dropped_picture_is_restored_and_kept_as_preset(
    keep: Tab, served: tuple[Session, str], adapters: Path
) -> None:
    session, page = served[0], keep.page
    picture = _drawn(session, "a red cat", 0.5)
    _open(page, "Presets")
    page.locator("#restore-drop input[type=file]").set_input_files(picture)
    _expect_restored(page, "a red cat", "0.5")
    expect(page.locator("#restore-report")).to_contain_text("Restored the settings and 1 adapter.")
    name = page.locator("#preset-name input")
    name.fill("my-look")
    name.press("Enter")
    page.locator("#preset-save").click()
    expect(page.locator("#preset-report")).to_contain_text("Saved.", timeout=PATIENCE_MS)
    page.locator("#prompt textarea").fill("something else")
    page.locator("#preset-load").click()
    _expect_restored(page, "a red cat", "0.5")
    keep.snap("keep-presets")

    (adapters / "ink.safetensors").unlink()
    page.locator("#preset-load").click()
    expect(page.locator("#preset-report")).to_contain_text("Missing, and left out:", timeout=PATIENCE_MS)
    expect(page.locator("#preset-report")).to_contain_text("no file in")
    expect(page.locator("#slot-1-file input")).not_to_have_value("ink")
    keep.snap("keep-missing")


def test_a_canvas_comes_back_and_its_paint_is_asked_for(keep: Tab, served: tuple[Session, str]) -> None:
    session, page = served[0], keep.page
    image = Image.linear_gradient("L").resize((128, 128)).convert("RGB")
    mask = Image.new("L", (128, 128))
    mask.paste(255, (32, 32, 96, 96))
    settings = check_settings("x", "", seed=5, steps=3, guidance=3.0, details=DetailValues(strength=0.75))
    run = session.start(DrawRequest(settings, canvas=Canvas(image, mask)), owner="test")
    picture = list(run.updates())[-1].picture
    assert picture is not None
    _open(page, "Presets")
    page.locator("#restore-drop input[type=file]").set_input_files(picture)
    expect(page.locator("#restore-report")).to_contain_text("paint over that part again", timeout=PATIENCE_MS)
    page.locator("#canvas-fold > button").click()
    expect(page.locator("#canvas canvas").first).to_be_visible(timeout=PATIENCE_MS)
    expect(page.locator("#denoise input[type=number]")).to_have_value("0.75")
    keep.snap("keep-canvas")


def test_the_rack_is_exported_and_drawn_again(keep: Tab, served: tuple[Session, str]) -> None:
    session, page = served[0], keep.page
    picture = _drawn(session, "a red cat", 0.5)
    _open(page, "Presets")
    page.locator("#restore-drop input[type=file]").set_input_files(picture)
    _expect_restored(page, "a red cat", "0.5")
    _open(page, "Export")
    page.locator("#export-go").click()
    expect(page.get_by_test_id("toast-body").first).to_contain_text("name: got nothing", timeout=PATIENCE_MS)
    page.locator("#export-name input, #export-name textarea").first.fill("half-ink")
    page.locator("#export-go").click()
    expect(page.locator("#export-status")).to_contain_text("Drawn from the file:", timeout=LONG_PATIENCE_MS)
    expect(page.locator("#export-again img")).to_be_visible()
    assert "half-ink" in session.library.usable
    keep.snap("keep-export")
