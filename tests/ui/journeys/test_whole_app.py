"""Through the whole page as a person would go: pick, draw, ask what does what, map, keep, merge, inspect; dark."""

from playwright.sync_api import expect

from tests.ui.tab import PATIENCE_MS, PHONE, Tab
from ui.app import RunningApp

LONG_MS = 3 * PATIENCE_MS


def test_from_a_card_to_a_merged_file_and_back(tab: Tab, app: RunningApp) -> None:
    page = tab.page
    page.locator("#prompt textarea").fill("a cat")
    tab.set_number("steps", "2")

    # the browser's cards fill the rack
    for slot, name in ((1, "ink"), (2, "lego")):
        page.locator(f'#browser-cards [data-pick="{name}"]').click(timeout=PATIENCE_MS)
        expect(page.locator(f"#slot-{slot}-badge")).to_contain_text("88/88 keys matched", timeout=PATIENCE_MS)
    tab.set_number("slot-2-strength", "-0.35")
    with tab.drawing():
        page.locator("#prompt textarea").press("Control+Enter")
    expect(page.locator("#blend img")).to_be_visible()
    tab.snap("whole-drawn")

    # what does each adapter do?
    page.locator("#leave-out").click()
    expect(page.locator("#leave-out-status")).to_contain_text("changes most without", timeout=PATIENCE_MS)

    # a map, and one of its cells goes into the rack
    tab.open("Weight map")
    page.locator("#map-across textarea, #map-across input").first.fill("0, 1")
    page.locator("#map-draw").click()
    expect(page.locator("#map-status")).to_contain_text("sheet is saved", timeout=LONG_MS)
    tab.snap("whole-map")
    page.locator("#map button").nth(1).click()
    expect(page.locator("#slot-1-strength input[type=number]")).to_have_value("0", timeout=PATIENCE_MS)

    # the history brings the picture back
    tab.open("History")
    pictures = page.locator("#history-gallery button:has(img)")
    expect(pictures.first).to_be_visible(timeout=PATIENCE_MS)
    pictures.first.click()
    expect(page.locator("#history-facts")).to_contain_text("a cat", timeout=PATIENCE_MS)
    page.locator("#history-restore").click()
    expect(page.locator("#slot-1-strength input[type=number]")).to_have_value("1", timeout=PATIENCE_MS)
    expect(page.locator("#slot-2-strength input[type=number]")).to_have_value("-0.35")
    tab.snap("whole-history")

    # the rack becomes a file, which draws what the rack draws
    tab.open("Merge")
    page.locator("#export-name input, #export-name textarea").first.fill("both")
    page.locator("#export-go").click()
    expect(page.locator("#export-status")).to_contain_text("Drawn from the file:", timeout=LONG_MS)
    assert (app.session.library.folder / "both.safetensors").is_file()

    tab.open("Inspect")
    tab.choose("inspect-file", "ink")
    expect(page.locator("#inspect-facts")).to_contain_text("88 of 88", timeout=PATIENCE_MS)
    tab.open("Train")
    tab.snap("whole-train")
    tab.dark()
    tab.snap("whole-dark")


def test_another_base_and_a_phone(tab: Tab) -> None:
    page = tab.page
    tab.pick(1, "ink")
    tab.choose("model", "pocket-dit")
    expect(page.locator("#news")).to_contain_text("sd3", timeout=LONG_MS)
    tab.expect_toast("ink")  # put away: it would cover the button until it goes by itself
    page.locator("#generate").click()
    expect(page.get_by_test_id("toast-body").first).to_contain_text(
        "ink", timeout=PATIENCE_MS
    )  # it does not fit, and why
    page.set_viewport_size(PHONE)
    page.reload()
    tab.expect_loaded()
    expect(page.locator("#generate")).to_be_in_viewport(timeout=PATIENCE_MS)  # the sidebar does not cover it
    tab.expect_fits_phone()
    for name in ("Weight map", "History"):
        tab.open(name)
        tab.expect_fits_phone()
    tab.snap("whole-phone")
