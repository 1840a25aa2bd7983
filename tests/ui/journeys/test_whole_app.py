"""Through the whole page as a person would go: pick, draw, ask what does what, map, keep, merge, inspect; dark."""

from pathlib import Path

from playwright.sync_api import expect

from tests.ui.tab import PATIENCE_MS, PHONE, Tab

LONG_MS = 90_000


def test_from_a_card_to_a_merged_file_and_back(tab: Tab, adapters: Path, tmp_path: Path) -> None:
    page = tab.page
    page.locator("#prompt textarea").fill("a cat")
    tab.set_number("steps", "2")

    # the browser's cards fill the rack
    for slot, name in ((1, "ink"), (2, "lego")):
        page.locator(f'#browser-cards [data-pick="{name}"]').click(timeout=PATIENCE_MS)
        expect(page.locator(f"#slot-{slot}-badge")).to_contain_text("88/88 keys matched", timeout=PATIENCE_MS)
    tab.set_number("slot-2-strength", "-0.35")
    page.locator("#prompt textarea").press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("Done in", timeout=PATIENCE_MS)
    expect(page.locator("#blend img")).to_be_visible()
    tab.snap("whole-drawn")

    # what does each adapter do?
    page.locator("#leave-out").click()
    expect(page.locator("#leave-out-status")).to_contain_text("changes most without", timeout=PATIENCE_MS)

    # a map, and one of its cells goes into the rack
    page.get_by_role("tab", name="Weight map").click()
    page.locator("#map-across textarea, #map-across input").first.fill("0, 1")
    page.locator("#map-draw").click()
    expect(page.locator("#map-status")).to_contain_text("sheet is saved", timeout=LONG_MS)
    tab.snap("whole-map")
    page.locator("#map button").nth(1).click()
    expect(page.locator("#slot-1-strength input[type=number]")).to_have_value("0", timeout=PATIENCE_MS)

    # the history brings the picture back
    page.get_by_role("tab", name="History").click()
    pictures = page.locator("#history-gallery button:has(img)")
    expect(pictures.first).to_be_visible(timeout=PATIENCE_MS)
    pictures.first.click()
    expect(page.locator("#history-facts")).to_contain_text("a cat", timeout=PATIENCE_MS)
    page.locator("#history-restore").click()
    expect(page.locator("#slot-1-strength input[type=number]")).to_have_value("1", timeout=PATIENCE_MS)
    expect(page.locator("#slot-2-strength input[type=number]")).to_have_value("-0.35")
    tab.snap("whole-history")

    # the rack becomes a file, which draws what the rack draws
    page.get_by_role("tab", name="Merge").click()
    page.locator("#export-name input, #export-name textarea").first.fill("both")
    page.locator("#export-go").click()
    expect(page.locator("#export-status")).to_contain_text("Drawn from the file:", timeout=LONG_MS)
    assert (adapters / "both.safetensors").is_file()

    page.get_by_role("tab", name="Inspect").click()
    page.locator("#inspect-file input").click()
    page.locator("#inspect-file").get_by_role("option", name="ink", exact=True).click()
    expect(page.locator("#inspect-facts")).to_contain_text("88 of 88", timeout=PATIENCE_MS)
    page.get_by_role("tab", name="Train").click()
    tab.snap("whole-train")
    tab.dark()
    tab.snap("whole-dark")


def test_another_base_and_a_phone(tab: Tab) -> None:
    page = tab.page
    tab.pick(1, "ink")
    page.locator("#model input").click()
    page.locator("#model").get_by_role("option", name="pocket-dit", exact=True).click()
    expect(page.locator("#news")).to_contain_text("sd3", timeout=LONG_MS)
    page.locator("#generate").click()
    expect(page.get_by_test_id("toast-body").first).to_contain_text(
        "ink", timeout=PATIENCE_MS
    )  # it does not fit, and why
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    page.reload()
    expect(page.locator("#generate")).to_be_in_viewport(timeout=PATIENCE_MS)  # the sidebar does not cover it
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    for name in ("Weight map", "History"):
        page.get_by_role("tab", name=name).first.click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"], name
    tab.snap("whole-phone")
