"""A person slides base over blend, draws a weight map and loads a cell, leaves each adapter out, inspects a file."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from diffusers import StableDiffusionPipeline
from playwright.sync_api import expect, sync_playwright

from dora_diffusion.generation import GenerationSettings
from tests.ui.tab import CHROMIUM, PATIENCE_MS, PHONE, SWITCHES, Tab
from ui import inspect_page, leave_out, meter, stage, weightmap
from ui.desk import Desk
from ui.look import CSS, theme
from ui.request import DrawRequest, SlotValues, check_adapters
from ui.session import Session

RACK = (SlotValues("ink", True, 0.8, False, 1, 1), SlotValues("lego", True, -0.5, False, 1, 1))
RACK += (SlotValues(None, True, 1, False, 1, 1),)


@dataclass
class Understanding:
    """The tab of a browser, and where its pictures go."""

    tab: Tab
    output: Path


def _page(session: Session) -> gr.Blocks:
    """The parts over a rack that is what it is, a prompt and the number of steps."""
    with gr.Blocks(analytics_enabled=False) as demo:
        prompt = gr.Textbox("a cat", elem_id="prompt")
        steps = gr.Number(2, elem_id="steps", precision=0)
        go = gr.Button("Generate", elem_id="generate")
        with gr.Column(elem_id="stage"):
            show = stage.build_stage()
            left = leave_out.build_leave_out()
        board = weightmap.build_weight_map(session)
        rack = gr.HTML(elem_id="rack-says")
        inspect_page.build_inspect_page(session)

        def request(values: Any) -> DrawRequest:
            settings = GenerationSettings(values[prompt], steps=values[steps])
            return DrawRequest(settings, check_adapters(RACK, session.parts), count=2)

        def draw(values: dict) -> Iterator[dict]:
            screenplay = stage.Screenplay(show)
            for update in session.start(request(values), owner="tab").updates():
                yield screenplay.changes(update)

        def load(picked: object, cells: object) -> str:
            slots = weightmap.picked_slots(picked, cells)
            return ", ".join(f"{slot.file} {slot.strength:g}" for slot in slots if slot.file and slot.enabled)

        desk = Desk({prompt, steps}, request, lambda values: RACK)
        go.click(draw, {prompt, steps}, [*show.outputs], show_progress="hidden", api_visibility="private")
        leave_out.wire_leave_out(left, session, desk)
        weightmap.wire_weight_map(board, session, desk)
        board.picked.change(load, [board.picked, board.cells], rack, api_visibility="private")
    return demo


@pytest.fixture
def page(pipe: StableDiffusionPipeline, adapters: Path, tmp_path: Path) -> Iterator[Understanding]:
    """A page that holds these parts alone."""
    session = Session(pipe, model="random", folder=adapters, output=tmp_path / "out")
    session.output.mkdir()
    demo = _page(session)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    styles = CSS + stage.CSS + leave_out.CSS + weightmap.CSS + inspect_page.CSS + meter.CSS
    _, url, _ = demo.queue(api_open=False).launch(
        server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, share=False, footer_links=[],
        allowed_paths=[str(session.output)], theme=theme(), css=styles,
    )  # fmt: skip
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        tab = Tab(browser.new_page(viewport={"width": 1280, "height": 900}))
        tab.watch()
        tab.page.goto(url)
        expect(tab.page.locator("#prompt textarea")).to_be_visible(timeout=PATIENCE_MS)
        yield Understanding(tab, session.output)
        browser.close()
    session.close()
    demo.close(verbose=False)
    assert tab.hosts == {"127.0.0.1"}
    assert tab.errors == []


def test_base_and_blend_are_slid_over_one_another(page: Understanding) -> None:
    view, tab = page.tab.page, page.tab
    view.locator("#generate").click()
    expect(view.locator("#status")).to_contain_text("re-weight", timeout=PATIENCE_MS)
    expect(view.locator("#status")).to_contain_text("1 beside it")
    expect(view.locator("#batch img")).to_have_count(2)
    tab.snap("understand-beside")
    before = view.locator("#blend img").get_attribute("src")
    view.locator("#batch button").first.click()
    expect(view.locator("#blend img")).not_to_have_attribute("src", str(before))
    expect(view.locator("#blend")).to_contain_text("Blend 1 of 2; the base has the last one's seed")
    view.locator("#view").get_by_text("Slider").click()
    expect(view.locator("#compare img").first).to_be_visible(timeout=PATIENCE_MS)
    expect(view.locator("#compare img")).to_have_count(2)
    expect(view.locator("#base")).to_be_hidden()
    tab.snap("understand-slider")
    view.locator("#view").get_by_text("Side by side").click()
    expect(view.locator("#base img")).to_be_visible()


def test_a_weight_map_streams_and_a_cell_is_loaded(page: Understanding) -> None:
    view, tab = page.tab.page, page.tab
    view.locator("#map-across textarea, #map-across input").first.fill("-1..1/1")
    view.locator("#map-draw").click()
    expect(view.locator("#map-status")).to_contain_text("sheet is saved", timeout=PATIENCE_MS)
    expect(view.locator("#map img")).to_have_count(8)
    loaded = "Array.from(document.querySelectorAll('#map img')).every(i => i.complete && i.naturalWidth > 0)"
    view.wait_for_function(loaded)
    assert len(list((page.output / "maps").glob("*-map.png"))) == 1
    view.locator("#map button").nth(3).click()
    expect(view.locator("#rack-says")).to_contain_text("ink 1, lego -0.5")
    view.locator("#map button").nth(4).press("Enter")
    expect(view.locator("#rack-says")).to_have_text("ink 0.8")
    tab.snap("understand-map")
    view.set_viewport_size(PHONE)  # type: ignore[arg-type]
    view.wait_for_timeout(300)
    assert view.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    tab.snap("understand-map-phone")


def test_a_map_of_two_is_stopped(page: Understanding) -> None:
    view = page.tab.page
    view.locator("#steps input").fill("100")
    view.locator("#map-kind").get_by_text("A × B").click()
    expect(view.locator("#map-down")).to_be_visible()
    view.locator("#map-draw").click()
    expect(view.locator("#map-stop")).to_be_enabled(timeout=PATIENCE_MS)
    view.locator("#map-stop").click()
    expect(view.locator("#map-status")).to_contain_text("Stopped after", timeout=PATIENCE_MS)
    expect(view.locator("#map-stop")).to_be_disabled()
    view.locator("#map-across textarea, #map-across input").first.fill("0..1")
    view.locator("#map-draw").click()
    expect(view.get_by_test_id("toast-body")).to_contain_text("has no step", timeout=PATIENCE_MS)


def test_what_each_adapter_does(page: Understanding) -> None:
    view, tab = page.tab.page, page.tab
    view.locator("#leave-out").click()
    expect(view.locator("#leave-out-status")).to_contain_text("changes most without", timeout=PATIENCE_MS)
    expect(view.locator("#leave-out-row figure")).to_have_count(3)
    expect(view.locator("#leave-out-row")).to_contain_text("without #2 lego")
    expect(view.locator("#leave-out-row")).to_contain_text("of 255")
    expect(view.locator("#leave-out-stop")).to_be_hidden()
    tab.snap("understand-leave-out")


def test_a_file_is_inspected_plotted_and_compared(page: Understanding) -> None:
    pytest.importorskip("matplotlib")
    view, tab = page.tab.page, page.tab
    _choose(tab, "inspect-file", "ink")
    expect(view.locator("#inspect-facts")).to_contain_text("88 of 88 layers", timeout=PATIENCE_MS)
    view.locator("#inspect-compare").click()
    expect(view.get_by_test_id("toast-body")).to_contain_text("expected two", timeout=PATIENCE_MS)
    _choose(tab, "inspect-beside", "lego")
    view.locator("#inspect-compare").click()
    expect(view.locator("#inspect-meter")).to_contain_text("88 layers in common", timeout=PATIENCE_MS)
    view.locator("#inspect-plot").click()
    expect(view.locator("#inspect-picture img")).to_be_visible(timeout=PATIENCE_MS)
    tab.snap("understand-inspect")
    tab.dark()
    _choose(tab, "inspect-file", "lego")
    expect(view.locator("#inspect-facts")).to_contain_text("LoRA", timeout=PATIENCE_MS)
    tab.snap("understand-inspect-dark")


def _choose(tab: Tab, elem_id: str, name: str) -> None:
    tab.page.locator(f"#{elem_id} input").click()
    tab.page.locator(f"#{elem_id}").get_by_role("option", name=name, exact=True).click()
