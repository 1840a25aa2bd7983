"""A person slides base over blend, draws a weight map and loads a cell, leaves each adapter out, inspects a file."""

import pytest
from playwright.sync_api import expect

from tests.ui.tab import PATIENCE_MS, Tab
from ui.app import RunningApp

MAP_MS = 3 * PATIENCE_MS


@pytest.fixture(scope="module")
def app(shared_app: RunningApp) -> RunningApp:
    """One for all of these journeys."""
    return shared_app


def _fill_rack(tab: Tab) -> None:
    """Two adapters, to be drawn in two steps."""
    tab.page.locator("#prompt textarea").fill("a cat")
    tab.set_number("steps", "2")
    for slot, (name, strength) in enumerate((("ink", "0.8"), ("lego", "-0.5")), start=1):
        tab.pick(slot, name)
        tab.set_number(f"slot-{slot}-strength", strength)


def _expect_strengths(tab: Tab, *strengths: str) -> None:
    for slot, strength in enumerate(strengths, start=1):
        box = tab.page.locator(f"#slot-{slot}-strength input[type=number]")
        expect(box).to_have_value(strength, timeout=PATIENCE_MS)


def test_base_and_blend_are_slid_over_one_another(tab: Tab) -> None:
    page = tab.page
    _fill_rack(tab)
    tab.set_number("count", "2")
    tab.draw()
    expect(page.locator("#status")).to_contain_text("re-weight")
    expect(page.locator("#status")).to_contain_text("1 beside it")
    expect(page.locator("#batch img")).to_have_count(2)
    tab.snap("understand-beside")
    before = page.locator("#blend img").get_attribute("src")
    page.locator("#batch button").first.click()
    expect(page.locator("#blend img")).not_to_have_attribute("src", str(before))
    expect(page.locator("#blend")).to_contain_text("Blend 1 of 2; the base has the last one's seed")
    page.locator("#view").get_by_text("Slider").click()
    expect(page.locator("#compare img").first).to_be_visible(timeout=PATIENCE_MS)
    expect(page.locator("#compare img")).to_have_count(2)
    expect(page.locator("#base")).to_be_hidden()
    tab.snap("understand-slider")
    page.locator("#view").get_by_text("Side by side").click()
    expect(page.locator("#base img")).to_be_visible()


def test_a_weight_map_streams_and_a_cell_is_loaded(tab: Tab, app: RunningApp) -> None:
    page, maps = tab.page, app.session.output / "maps"
    _fill_rack(tab)
    tab.open("Weight map")
    page.locator("#map-across textarea, #map-across input").first.fill("-1..1/1")
    page.locator("#map-draw").click()
    expect(page.locator("#map-status")).to_contain_text("sheet is saved", timeout=MAP_MS)
    expect(page.locator("#map img")).to_have_count(8)
    page.locator("#map").scroll_into_view_if_needed()  # pictures are fetched when they come into view
    loaded = "Array.from(document.querySelectorAll('#map img')).every(i => i.complete && i.naturalWidth > 0)"
    page.wait_for_function(loaded)
    assert len(list(maps.glob("*-map.png"))) == 1
    page.locator("#map button").nth(3).click()
    _expect_strengths(tab, "1", "-0.5")
    page.locator("#map button").nth(4).press("Enter")
    _expect_strengths(tab, "0.8", "0")
    tab.snap("understand-map")
    tab.expect_fits_phone()
    tab.snap("understand-map-phone")


def test_a_map_of_two_is_stopped(tab: Tab) -> None:
    page = tab.page
    _fill_rack(tab)
    tab.set_number("steps", "100")  # 12 cells of these last for minutes
    for side in ("width", "height"):
        page.locator(f"#{side} input").fill("512")
    tab.open("Weight map")
    page.locator("#map-kind").get_by_text("A × B").click()
    expect(page.locator("#map-down")).to_be_visible()
    page.locator("#map-draw").click()
    expect(page.locator("#map-stop")).to_be_enabled(timeout=PATIENCE_MS)
    page.locator("#map-stop").click()
    expect(page.locator("#map-status")).to_contain_text("Stopped after", timeout=PATIENCE_MS)
    expect(page.locator("#map-stop")).to_be_disabled()
    page.locator("#map-across textarea, #map-across input").first.fill("0..1")
    page.locator("#map-draw").click()
    tab.expect_toast("has no step")


def test_what_each_adapter_does(tab: Tab) -> None:
    page = tab.page
    _fill_rack(tab)
    page.locator("#leave-out").click()
    expect(page.locator("#leave-out-status")).to_contain_text("changes most without", timeout=PATIENCE_MS)
    expect(page.locator("#leave-out-row figure")).to_have_count(3)
    expect(page.locator("#leave-out-row")).to_contain_text("without #2 lego")
    expect(page.locator("#leave-out-row")).to_contain_text("of 255")
    expect(page.locator("#leave-out-stop")).to_be_hidden()
    tab.snap("understand-leave-out")


def test_a_file_is_inspected_plotted_and_compared(tab: Tab) -> None:
    pytest.importorskip("matplotlib")
    page = tab.page
    tab.open("Inspect")
    tab.choose("inspect-file", "ink")
    expect(page.locator("#inspect-facts")).to_contain_text("88 of 88 layers", timeout=PATIENCE_MS)
    page.locator("#inspect-compare").click()
    tab.expect_toast("expected two")
    tab.choose("inspect-beside", "lego")
    page.locator("#inspect-compare").click()
    expect(page.locator("#inspect-meter")).to_contain_text("88 layers in common", timeout=PATIENCE_MS)
    page.locator("#inspect-plot").click()
    expect(page.locator("#inspect-picture img")).to_be_visible(timeout=PATIENCE_MS)
    tab.snap("understand-inspect")
    tab.dark()
    tab.open("Inspect")
    tab.choose("inspect-file", "lego")
    expect(page.locator("#inspect-facts")).to_contain_text("LoRA", timeout=PATIENCE_MS)
    tab.snap("understand-inspect-dark")
