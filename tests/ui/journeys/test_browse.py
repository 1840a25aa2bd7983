"""Adapters are searched, filtered and picked by mouse and keyboard; new files turn up; nothing of a file is run."""

from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from dora_diffusion.formats import load_adapter, save_adapter
from dora_diffusion.state import AdapterState
from tests.ui.tab import PATIENCE_MS, Tab
from ui.app import RunningApp

EVIL = "<img src=x onerror=alert(1)>"


def _add_files(folder: Path) -> None:
    """Besides `ink`, `lego` and `broken`: one with metadata and a picture, one with script for words."""
    ink = load_adapter(folder / "ink.safetensors")
    metadata = {
        "modelspec.title": "Night Sea",
        "modelspec.trigger_phrase": "nightsea, deep",
        "modelspec.tags": "sea",
    }
    save_adapter(AdapterState(ink.modules, metadata), folder / "sub" / "sea.safetensors", format="kohya")
    Image.new("RGB", (300, 200), "navy").save(folder / "sub" / "sea.preview.png")
    evil = {"modelspec.title": EVIL, "modelspec.trigger_phrase": EVIL, "modelspec.tags": "sea"}
    save_adapter(AdapterState(ink.modules, evil), folder / "evil.safetensors")


@pytest.fixture(scope="module")
def app(shared_app: RunningApp) -> RunningApp:
    """One for all of these journeys, with more files."""
    _add_files(shared_app.session.library.folder)
    return shared_app


def _card(page: Page, name: str) -> Locator:
    return page.locator(f'#browser-cards [data-pick="{name}"]')


def _cards(page: Page) -> Locator:
    return page.locator("#browser-cards .card")


def test_searches_filters_and_picks(tab: Tab) -> None:
    page = tab.page
    expect(_cards(page)).to_have_count(5)
    expect(page.locator("#browser-status")).to_contain_text("5 of 5 adapters · 1 cannot be used")
    expect(page.locator("#browser-cards .off")).to_contain_text("not a safetensors file, or cut short")
    expect(page.locator("#browser-cards img")).to_have_count(1)
    tab.snap("browser")
    page.locator("#browser-search input, #browser-search textarea").fill("night")
    expect(_cards(page)).to_have_count(1)
    page.locator('#browser-cards [data-word="0"]').click()
    expect(page.locator("#prompt textarea")).to_have_value("nightsea", timeout=PATIENCE_MS)
    page.locator('#browser-cards [data-word="1"]').click()
    expect(page.locator("#prompt textarea")).to_have_value("nightsea, deep", timeout=PATIENCE_MS)
    card = page.locator('#browser-cards [data-pick="sub/sea"]')
    card.focus()
    card.press("Enter")
    expect(page.locator("#slot-1-file input")).to_have_value("sub/sea", timeout=PATIENCE_MS)
    card.click()  # the same again is told again
    tab.expect_toast("sub/sea: is in slot 1 already")
    expect(page.locator("#slot-2-file input")).to_have_value("none")
    page.locator("#browser-search input, #browser-search textarea").fill("")
    tab.choose("browser-kind", "LoRA")
    expect(_cards(page)).to_have_count(1)
    expect(page.locator('#browser-cards [data-pick="lego"]')).to_be_visible()


def test_new_files_turn_up_and_tags_filter(tab: Tab, app: RunningApp) -> None:
    page, folder = tab.page, app.session.library.folder
    (folder / "newer.safetensors").write_bytes((folder / "ink.safetensors").read_bytes())
    expect(page.locator('#browser-cards [data-pick="newer"]')).to_be_visible(timeout=PATIENCE_MS)
    (folder / "newer.safetensors").unlink()
    expect(page.locator('#browser-cards [data-pick="newer"]')).to_have_count(0, timeout=PATIENCE_MS)
    page.locator('#browser-cards [data-tag="sea"]').first.click()
    expect(_cards(page)).to_have_count(2)
    expect(page.locator("#browser-tag input")).to_have_value("sea")


def test_words_of_files_are_only_words(tab: Tab) -> None:
    page = tab.page
    card = page.locator('#browser-cards .card:has([data-pick="evil"])')
    expect(card.locator(".title")).to_have_text(EVIL)
    assert page.locator("#browser-cards img[src=x]").count() == 0
    card.locator('[data-word="0"]').click()
    expect(page.locator("#prompt textarea")).to_have_value(EVIL, timeout=PATIENCE_MS)


def test_a_name_that_is_not_listed_is_refused(tab: Tab) -> None:
    page = tab.page
    page.evaluate("document.querySelector('#browser-cards [data-pick=ink]').dataset.pick = '../../etc/passwd'")
    page.locator('#browser-cards [data-pick="../../etc/passwd"]').click()
    tab.expect_toast("no such adapter in")
    expect(page.locator("#slot-1-file input")).to_have_value("none")


def test_fits_a_phone_and_the_dark(tab: Tab) -> None:
    page = tab.page
    tab.expect_fits_phone()
    tab.dark()
    expect(page.locator(".sidebar.open")).to_have_count(0)  # there it would cover the page
    page.locator(".sidebar .toggle-button").click()
    expect(_cards(page)).to_have_count(5)
    expect(_card(page, "ink")).to_be_in_viewport()
    tab.expect_fits_phone()
    tab.snap("browser-phone-dark")
