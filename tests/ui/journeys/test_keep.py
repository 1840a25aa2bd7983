"""A picture is drawn, found in the history, restored, dropped, kept as a preset, exported and drawn from the file."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.ui.served import left_as_found
from tests.ui.tab import PATIENCE_MS, Tab
from ui.app import RunningApp
from ui.backend.request import DrawRequest, SlotValues, check_adapters, check_settings
from ui.backend.session import Session

LONG_PATIENCE_MS = 3 * PATIENCE_MS


@pytest.fixture
def app(shared_app: RunningApp) -> Iterator[RunningApp]:
    """One for all of these journeys, without the pictures, presets and adapters of those before."""
    with left_as_found(shared_app) as app:
        yield app


def _drawn(session: Session, prompt: str, strength: float) -> Path:
    ink = SlotValues.of("ink", strength)
    settings = check_settings(prompt, "dog", seed=5, steps=2, guidance=3.0)
    request = DrawRequest(settings, check_adapters((ink,), session.parts))
    return session.save(session.draw(request)[0])


def _expect_restored(page: Page, prompt: str, strength: str) -> None:
    expect(page.locator("#prompt textarea")).to_have_value(prompt, timeout=PATIENCE_MS)
    expect(page.locator("#slot-1-file input")).to_have_value("ink", timeout=PATIENCE_MS)
    expect(page.locator("#slot-1-strength input[type=number]")).to_have_value(strength)
    expect(page.locator("#seed input")).to_have_value("5")
    expect(page.locator("#steps input[type=number]")).to_have_value("2")
    expect(page.get_by_text("Dropdown", exact=True)).to_have_count(0)  # a widget that nobody asked for


def test_history_restores_and_compares(tab: Tab, app: RunningApp) -> None:
    session, page = app.session, tab.page
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
    tab.snap("keep-history")
    tab.expect_fits_phone()
    tab.snap("keep-history-phone")


def test_a_dropped_picture_is_restored_and_kept_as_preset(tab: Tab, app: RunningApp) -> None:
    session, page = app.session, tab.page
    picture = _drawn(session, "a red cat", 0.5)
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
    tab.snap("keep-presets")

    (session.library.folder / "ink.safetensors").unlink()
    page.locator("#preset-load").click()
    expect(page.locator("#preset-report")).to_contain_text("Missing, and left out:", timeout=PATIENCE_MS)
    expect(page.locator("#preset-report")).to_contain_text("no file in")
    expect(page.locator("#slot-1-file input")).not_to_have_value("ink")
    tab.snap("keep-missing")


def test_the_rack_is_exported_and_drawn_again(tab: Tab, app: RunningApp) -> None:
    session, page = app.session, tab.page
    picture = _drawn(session, "a red cat", 0.5)
    page.locator("#restore-drop input[type=file]").set_input_files(picture)
    _expect_restored(page, "a red cat", "0.5")
    tab.open("Merge")
    page.locator("#export-go").click()
    tab.expect_toast("name: got nothing")
    expect(page.locator("#export-go")).to_be_enabled()
    page.locator("#export-name input, #export-name textarea").first.fill("half-ink")
    page.locator("#export-go").click()
    expect(page.locator("#export-status")).to_contain_text("Drawn from the file:", timeout=LONG_PATIENCE_MS)
    expect(page.locator("#export-again img")).to_be_visible()
    assert "half-ink" in session.library.usable
    tab.snap("keep-export")
