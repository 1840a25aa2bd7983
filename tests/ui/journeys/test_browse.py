"""Adapters are searched, filtered and picked by mouse and keyboard; new files turn up; nothing of a file is run."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright

from dora_diffusion.formats import load_adapter, save_adapter
from dora_diffusion.state import AdapterState
from tests.ui.tab import CHROMIUM, PATIENCE_MS, PHONE, SWITCHES, Tab
from ui.browser import CSS, add_word, build_browser
from ui.library import AdapterLibrary
from ui.look import CSS as LOOK
from ui.look import theme

EVIL = "<img src=x onerror=alert(1)>"


@dataclass(frozen=True)
class Desk:
    """What the browser needs of a session."""

    library: AdapterLibrary
    family: str = "sd1"


@pytest.fixture
def folder(adapters: Path) -> Path:
    """Besides `ink`, `lego` and `broken`: one with metadata and a picture, one with script for words."""
    ink = load_adapter(adapters / "ink.safetensors")
    told = {"modelspec.title": "Night Sea", "modelspec.trigger_phrase": "nightsea, deep", "modelspec.tags": "sea"}
    save_adapter(AdapterState(ink.modules, told), adapters / "sub" / "sea.safetensors", format="kohya")
    Image.new("RGB", (300, 200), "navy").save(adapters / "sub" / "sea.preview.png")
    evil = {"modelspec.title": EVIL, "modelspec.trigger_phrase": EVIL, "modelspec.tags": "sea"}
    save_adapter(AdapterState(ink.modules, evil), adapters / "evil.safetensors")
    return adapters


@pytest.fixture
def shelf(folder: Path) -> Iterator[Tab]:
    """A page with a prompt and the browser; at the end nothing may have left loopback or gone wrong in the page."""
    library = AdapterLibrary(folder)
    library.refresh()
    with gr.Blocks(analytics_enabled=False) as demo:
        prompt = gr.Textbox(label="Prompt", elem_id="prompt")
        chosen = gr.Textbox(label="Chosen", elem_id="chosen")
        browser = build_browser(Desk(library), demo)
        browser.when_picked.success(lambda had, name: f"{had} {name}", [chosen, browser.picked], chosen)
        browser.when_word.success(add_word, [prompt, browser.word], prompt)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    _, url, _ = demo.launch(
        server_port=port, prevent_thread_lock=True, quiet=True, ssr_mode=False, theme=theme(), css=LOOK + CSS
    )
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        tab = Tab(chromium.new_page(viewport={"width": 1280, "height": 900}))
        tab.watch()
        tab.page.goto(url)
        expect(_card(tab.page, "ink")).to_be_visible(timeout=PATIENCE_MS)
        yield tab
        chromium.close()
    demo.close(verbose=False)
    assert tab.hosts == {"127.0.0.1"}
    assert tab.errors == []


def _card(page: Page, name: str) -> Locator:
    return page.locator(f'#browser-cards [data-pick="{name}"]')


def _cards(page: Page) -> Locator:
    return page.locator("#browser-cards .card")


def test_searches_filters_and_picks(shelf: Tab) -> None:
    page = shelf.page
    expect(_cards(page)).to_have_count(5)
    expect(page.locator("#browser-status")).to_contain_text("5 of 5 adapters · 1 cannot be used")
    expect(page.locator("#browser-cards .off")).to_contain_text("not a safetensors file, or cut short")
    expect(page.locator("#browser-cards img")).to_have_count(1)
    shelf.snap("browser")
    shelf.page.locator("#browser-search input, #browser-search textarea").fill("night")
    expect(_cards(page)).to_have_count(1)
    page.locator('#browser-cards [data-word="0"]').click()
    page.locator('#browser-cards [data-word="1"]').click()
    expect(page.locator("#prompt textarea")).to_have_value("nightsea, deep", timeout=PATIENCE_MS)
    card = page.locator('#browser-cards [data-pick="sub/sea"]')
    card.focus()
    card.press("Enter")
    expect(page.locator("#chosen textarea")).to_have_value(" sub/sea", timeout=PATIENCE_MS)
    card.click()
    expect(page.locator("#chosen textarea")).to_have_value(" sub/sea sub/sea", timeout=PATIENCE_MS)
    page.locator("#browser-search input, #browser-search textarea").fill("")
    page.locator("#browser-kind input").click()
    page.locator("#browser-kind").get_by_role("option", name="LoRA", exact=True).click()
    expect(_cards(page)).to_have_count(1)
    expect(page.locator('#browser-cards [data-pick="lego"]')).to_be_visible()


def test_new_files_turn_up_and_tags_filter(shelf: Tab, folder: Path) -> None:
    page = shelf.page
    (folder / "newer.safetensors").write_bytes((folder / "ink.safetensors").read_bytes())
    expect(page.locator('#browser-cards [data-pick="newer"]')).to_be_visible(timeout=PATIENCE_MS)
    (folder / "newer.safetensors").unlink()
    expect(page.locator('#browser-cards [data-pick="newer"]')).to_have_count(0, timeout=PATIENCE_MS)
    page.locator('#browser-cards [data-tag="sea"]').first.click()
    expect(_cards(page)).to_have_count(2)
    expect(page.locator("#browser-tag input")).to_have_value("sea")


def test_words_of_files_are_only_words(shelf: Tab) -> None:
    page = shelf.page
    card = page.locator('#browser-cards .card:has([data-pick="evil"])')
    expect(card.locator(".title")).to_have_text(EVIL)
    assert page.locator("#browser-cards img[src=x]").count() == 0
    card.locator('[data-word="0"]').click()
    expect(page.locator("#prompt textarea")).to_have_value(EVIL, timeout=PATIENCE_MS)


def test_a_name_that_is_not_listed_is_refused(shelf: Tab) -> None:
    page = shelf.page
    page.evaluate("document.querySelector('#browser-cards [data-pick=ink]').dataset.pick = '../../etc/passwd'")
    page.locator('#browser-cards [data-pick="../../etc/passwd"]').click()
    expect(page.get_by_test_id("toast-body")).to_contain_text("no such adapter in", timeout=PATIENCE_MS)
    expect(page.locator("#chosen textarea")).to_have_value("")


def test_fits_a_phone_and_the_dark(shelf: Tab) -> None:
    page = shelf.page
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    shelf.dark()
    expect(_cards(page)).to_have_count(5, timeout=PATIENCE_MS)
    shelf.snap("browser-phone-dark")
