"""The rack in a browser: blocks, curve, mask and solo reach the picture; moving changes nothing; the meter measures."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import expect

from tests.ui.tab import PATIENCE_MS, PHONE, Tab

DRAWN_MS = 3 * PATIENCE_MS


def _draw(tab: Tab, folder: Path, *, pictures: int) -> tuple[np.ndarray, list[dict]]:
    """Press Generate; the newest picture's pixels and adapters once there are so many."""
    tab.page.locator("#generate").click()
    for _ in range(DRAWN_MS // 100):
        if len(list(folder.glob("*.png"))) == pictures:
            break
        tab.page.wait_for_timeout(100)
    expect(tab.page.locator("#status")).to_contain_text("Done in", timeout=DRAWN_MS)
    with Image.open(max(folder.glob("*.png"), key=lambda path: path.stat().st_mtime_ns)) as picture:
        return np.asarray(picture), json.loads(picture.info["dora_diffusion"])["adapters"]


def test_fine_settings_reach_the_picture_and_move_with_their_slot(tab: Tab, tmp_path: Path) -> None:
    page = tab.page
    tab.set_number("steps", "2")
    expect(page.locator("#slot-2")).to_be_hidden()
    tab.pick(1, "ink")
    tab.pick(2, "lego")
    expect(page.locator("#slot-3")).to_be_visible()
    expect(page.locator("#slot-4")).to_be_hidden()
    expect(page.locator("#slot-1-badge")).to_contain_text("out axis")

    page.locator("#slot-1-curve-fold > button").click()
    page.locator("#slot-1-curve-name input").click()
    page.locator("#slot-1-curve-name").get_by_role("option", name="fade in", exact=True).click()
    expect(page.locator("#slot-1-curve textarea, #slot-1-curve input")).to_have_value("0:0, 1:1")
    page.locator("#slot-2-blocks > button").click()
    tab.set_number("slot-2-block-2", "0.5")
    page.locator("#slot-1-mask-fold > button").click()
    page.locator("#slot-1-paint").click()
    page.locator("#mask-canvas [data-deed=left]").click()
    expect(page.locator("#slot-1-mask")).to_contain_text("draws in 50%")
    tab.snap("rack")

    before, (ink, lego) = _draw(tab, tmp_path / "out", pictures=1)
    assert (ink["name"], ink["weight"], ink["schedule"]) == ("ink", 1.0, [[0.0, 0.0], [1.0, 1.0]])
    assert ink["mask"]
    assert lego["weight"] == {"unet": 1.0, "text_encoder": 1.0, "unet.mid_block": 0.5}

    page.locator("#slot-1-down").click()
    expect(page.locator("#slot-1-file input")).to_have_value("lego")
    expect(page.locator("#slot-2-file input")).to_have_value("ink")
    expect(page.locator("#blend-sentence")).to_contain_text("Moved, which changes nothing in the picture.")
    expect(page.locator("#slot-2-badge")).to_contain_text("88/88 keys matched")
    after, uses = _draw(tab, tmp_path / "out", pictures=2)
    assert np.array_equal(before, after)
    assert uses == [lego, ink]

    page.locator("#slot-1-solo input").check()
    alone, uses = _draw(tab, tmp_path / "out", pictures=3)
    assert uses == [lego]
    assert not np.array_equal(before, alone)


def test_a_stroke_paints_and_no_mask_wipes(tab: Tab) -> None:
    page = tab.page
    tab.pick(1, "ink")
    page.locator("#slot-1-mask-fold > button").click()
    page.locator("#slot-1-paint").click()
    canvas = page.locator("#mask-canvas canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.5 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.5 * box["height"], steps=4)
    page.mouse.up()
    expect(page.locator("#slot-1-mask")).to_contain_text("draws in 1")
    assert canvas.evaluate("c => c.getContext('2d').getImageData(128, 128, 1, 1).data[0]") == 255
    page.locator("#slot-1-unmask").click()
    expect(page.locator("#slot-1-mask")).to_contain_text("draws everywhere")
    page.wait_for_timeout(300)
    assert canvas.evaluate("c => c.getContext('2d').getImageData(128, 128, 1, 1).data[0]") == 0


def test_the_meter_the_mode_and_removing(tab: Tab) -> None:
    page = tab.page
    page.locator("#interference-fold > button").click()
    page.locator("#measure-interference").click()
    expect(page.locator("#interference")).to_contain_text("the rack is empty")
    tab.pick(1, "ink")
    tab.pick(2, "lego")
    page.locator("#measure-interference").click()
    expect(page.locator("#interference")).to_contain_text("88 layers in common", timeout=PATIENCE_MS)
    page.locator("#blend-mode input").click()
    page.locator("#blend-mode").get_by_role("option", name="comfyui", exact=True).click()
    expect(page.locator("#blend-sentence")).to_contain_text("The order of the slots changes the picture.")
    tab.snap("rack-meter")
    page.locator("#slot-1-remove").click()
    expect(page.locator("#slot-1-file input")).to_have_value("none")
    expect(page.locator("#slot-1-strength")).to_be_hidden()
    expect(page.locator("#slot-2-file input")).to_have_value("lego")
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
