"""The rack in a browser: blocks, curve, mask and solo reach the picture; moving changes nothing; the meter measures."""

import json

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.ui.tab import PATIENCE_MS, Tab
from ui.app import RunningApp

_LEVEL = "c => c.getContext('2d').getImageData(128, 128, 1, 1).data[0]"
_BLACK = f"() => ({_LEVEL})(document.querySelector('#mask-canvas canvas')) === 0"


@pytest.fixture(scope="module")
def app(shared_app: RunningApp) -> RunningApp:
    """One for all of these journeys."""
    return shared_app


def _draw(tab: Tab, app: RunningApp) -> tuple[np.ndarray, list[dict]]:
    """Press Generate; the new picture's pixels and adapters."""
    had = set(app.session.output.glob("*.png"))
    tab.draw()
    (new,) = set(app.session.output.glob("*.png")) - had
    with Image.open(new) as picture:
        return np.asarray(picture), json.loads(picture.info["dora_diffusion"])["adapters"]


def test_fine_settings_reach_the_picture_and_move_with_their_slot(tab: Tab, app: RunningApp) -> None:
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

    before, (ink, lego) = _draw(tab, app)
    assert (ink["name"], ink["weight"], ink["schedule"]) == ("ink", 1.0, [[0.0, 0.0], [1.0, 1.0]])
    assert ink["mask"]
    assert lego["weight"] == {"unet": 1.0, "text_encoder": 1.0, "unet.mid_block": 0.5}

    page.locator("#slot-1-down").click()
    expect(page.locator("#slot-1-file input")).to_have_value("lego")
    expect(page.locator("#slot-2-file input")).to_have_value("ink")
    expect(page.locator("#blend-sentence")).to_contain_text("Moved, which changes nothing in the picture.")
    expect(page.locator("#slot-2-badge")).to_contain_text("88/88 keys matched")
    after, uses = _draw(tab, app)
    assert np.array_equal(before, after)
    assert uses == [lego, ink]

    page.locator("#slot-1-solo input").check()
    alone, uses = _draw(tab, app)
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
    assert canvas.evaluate(_LEVEL) == 255
    page.locator("#slot-1-unmask").click()
    expect(page.locator("#slot-1-mask")).to_contain_text("draws everywhere")
    page.wait_for_function(_BLACK)


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
    tab.expect_fits_phone()
