"""A person writes a caption, trains, watches, stops, resumes, sends a checkpoint and compares checkpoints."""

import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import pytest
from diffusers import StableDiffusionPipeline
from playwright.sync_api import expect, sync_playwright

from dora_diffusion.pretrain.scenes import background
from tests.ui.tab import CHROMIUM, PATIENCE_MS, PHONE, SWITCHES, Tab
from ui.look import CSS as APP_CSS
from ui.look import theme
from ui.options import UiOptions
from ui.session import Session
from ui.train import CSS, Train, build_train

TRAINING_MS = 120_000


@dataclass
class Desk:
    """The tab of a browser, and what stands behind it."""

    tab: Tab
    train: Train
    options: UiOptions


@pytest.fixture
def desk(pipe: StableDiffusionPipeline, base: Path, adapters: Path, tmp_path: Path) -> Iterator[Desk]:
    """A page that holds the Train tab alone, and a line that shows what was sent to the rack."""
    cats = tmp_path / "sets" / "cats"
    cats.mkdir(parents=True)
    for name in ("red", "blue", "meadow"):
        background(name, 64).save(cats / f"{name}.png")
    options = UiOptions(
        model=str(base),
        adapters=adapters,
        output=tmp_path / "out",
        datasets=(tmp_path / "sets",),
        runs=tmp_path / "runs",
    )
    session = Session(pipe, model=str(base), folder=adapters, output=options.output)
    with gr.Blocks(analytics_enabled=False) as demo:
        train = build_train(session, options)
        rack = gr.HTML(elem_id="rack-says")
        train.sent.change(lambda name: f"rack: {name}" if name else "", train.sent, rack, api_visibility="private")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    _, url, _ = demo.queue(api_open=False).launch(
        server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, share=False, footer_links=[],
        allowed_paths=[str(options.output)], theme=theme(), css=APP_CSS + CSS,
    )  # fmt: skip
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        tab = Tab(browser.new_page(viewport={"width": 1280, "height": 900}))
        tab.watch()
        tab.page.goto(url)
        expect(tab.page.locator("#train-start")).to_be_visible(timeout=PATIENCE_MS)
        yield Desk(tab, train, options)
        browser.close()
    train.close()
    session.close()
    demo.close(verbose=False)
    assert tab.hosts == {"127.0.0.1"}
    assert tab.errors == []


def _choose(tab: Tab, elem_id: str, name: str) -> None:
    tab.page.locator(f"#{elem_id} input").click()
    tab.page.locator(f"#{elem_id}").get_by_role("option", name=name, exact=True).click()


def _fill(tab: Tab, **fields: str) -> None:
    for name, value in fields.items():
        box = tab.page.locator(f"#train-{name.replace('_', '-')}").locator("textarea, input").first
        box.fill(value)
        box.press("Tab")


def test_trains_watches_and_sends(desk: Desk, adapters: Path) -> None:
    tab, page = desk.tab, desk.tab.page
    _choose(tab, "train-dataset", "sets/cats")
    expect(page.locator("#train-doctor")).to_contain_text("3 missing-caption", timeout=PATIENCE_MS)
    page.locator("#train-gallery button.thumbnail-item").first.click()
    expect(page.locator("#train-picture").locator("textarea, input")).to_have_value("blue.png", timeout=PATIENCE_MS)
    _fill(tab, caption="a <b>blue</b> wall")
    page.locator("#train-save-caption").click()
    expect(page.locator("#train-doctor")).to_contain_text("2 missing-caption", timeout=PATIENCE_MS)
    assert (desk.options.datasets[0] / "cats" / "blue.txt").read_text() == "a <b>blue</b> wall\n"

    _fill(tab, name="../walls", instance_prompt="a wall", steps="4", rank="2", resolution="32", batch="1", every="2")
    expect(page.locator("#train-doctor")).to_contain_text("nothing would be lost", timeout=PATIENCE_MS)
    _fill(tab, samples="a wall\na cat")
    page.locator("#train-start").click()
    expect(page.get_by_test_id("toast-body")).to_contain_text("run name: got '../walls'", timeout=PATIENCE_MS)
    page.get_by_test_id("toast-close").click()
    _fill(tab, name="walls")
    page.locator("#train-plan").click()
    expect(page.locator("#train-plan-text")).to_contain_text("activations", timeout=TRAINING_MS)
    page.locator("#train-start").click()
    expect(page.locator("#train-start")).to_be_disabled(timeout=PATIENCE_MS)
    expect(page.locator("#train-status")).to_contain_text("walls: done, step 4 of 4", timeout=TRAINING_MS)
    expect(page.locator("#train-loss svg")).to_be_visible()
    expect(page.locator("#train-strip")).to_contain_text("step 4", timeout=PATIENCE_MS)
    expect(page.locator("#train-start")).to_be_enabled(timeout=PATIENCE_MS)

    expect(page.locator("#train-checkpoint input")).to_have_value("step 4", timeout=PATIENCE_MS)
    for _ in range(2):  # the same again is told again
        page.locator("#train-send").click()
        expect(page.locator("#rack-says")).to_contain_text("rack: walls-step4", timeout=PATIENCE_MS)
    assert (adapters / "walls-step4.safetensors").is_file()

    page.locator("#train-grid-fold > button").click()
    tab.set_number("train-grid-steps", "2")
    page.locator("#train-grid-draw").click()
    expect(page.locator("#train-grid-status")).to_contain_text("6 pictures", timeout=TRAINING_MS)
    expect(page.locator("#train-grid")).to_contain_text("step 2 · base")
    page.locator("#train-grid button.thumbnail-item").nth(1).click()
    expect(page.locator("#train-checkpoint input")).to_have_value("step 2", timeout=PATIENCE_MS)
    tab.snap("train")
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    tab.snap("train-phone")
    page.set_viewport_size({"width": 1280, "height": 900})
    page.goto(page.url.split("?")[0] + "?__theme=dark")
    expect(page.locator("#train-run input")).to_be_visible(timeout=PATIENCE_MS)
    page.wait_for_timeout(1500)  # the first tick tells the page of runs that came after it was built
    _choose(tab, "train-run", "walls")
    expect(page.locator("#train-status")).to_contain_text("walls: done", timeout=PATIENCE_MS)
    expect(page.locator("#train-loss svg")).to_be_visible(timeout=PATIENCE_MS)
    tab.snap("train-dark")


def test_stop_leaves_a_run_that_goes_on(desk: Desk) -> None:
    tab, page = desk.tab, desk.tab.page
    _choose(tab, "train-dataset", "sets/cats")
    _fill(tab, name="long", instance_prompt="a wall", steps="50000", rank="2", resolution="32", batch="1", every="5")
    page.locator("#train-start").click()
    expect(page.locator("#train-status")).to_contain_text("loss", timeout=TRAINING_MS)
    expect(page.locator("#train-checkpoint input")).to_have_value("step 5", timeout=TRAINING_MS)
    page.locator("#train-grid-fold > button").click()  # drawing goes on beside training
    tab.set_number("train-grid-steps", "1")
    page.locator("#train-grid-draw").click()
    expect(page.locator("#train-grid")).to_contain_text("· 1", timeout=TRAINING_MS)
    page.locator("#train-grid-stop").click()
    expect(page.locator("#train-grid-status")).to_contain_text("Stopped.", timeout=PATIENCE_MS)
    assert desk.train.trainer.running
    page.reload()  # another page finds the run that is under way
    expect(page.locator("#train-status")).to_contain_text("long: step", timeout=PATIENCE_MS)
    expect(page.locator("#train-stop")).to_be_enabled(timeout=PATIENCE_MS)
    pressed = time.monotonic()
    page.locator("#train-stop").click()
    expect(page.locator("#train-status")).to_contain_text("Resume goes on from step", timeout=PATIENCE_MS)
    assert time.monotonic() - pressed < 12
    page.locator("#train-resume").click()
    expect(page.locator("#train-stop")).to_be_enabled(timeout=PATIENCE_MS)
    assert desk.train.trainer.running
