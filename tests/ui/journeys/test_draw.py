"""Two adapters are blended by keyboard and mouse, Stop stops, a closed tab stops, a mistake is one line."""

import json
import time
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image
from playwright.sync_api import Page, expect

from dora_diffusion.storage import sha256_of
from tests.ui.tab import PATIENCE_MS, PHONE, Tab
from ui.app import RunningApp


def _shown(page: Page, elem_id: str) -> bytes:
    """The bytes of the picture on show."""
    source = page.locator(f"#{elem_id} img").get_attribute("src")
    assert source is not None
    return page.request.get(source).body()


def test_blends_two_adapters(tab: Tab, adapters: Path, tmp_path: Path) -> None:
    page = tab.page
    expect(page.locator("#broken")).to_contain_text("broken.safetensors: not a safetensors file")
    page.locator("#prompt textarea").fill("a cat on a red background")
    tab.set_number("steps", "3")
    tab.pick(1, "ink")
    tab.pick(2, "lego")
    tab.press_on_slider("slot-1-strength", "ArrowLeft", 4)
    page.locator("#slot-2-components > button").click()
    page.locator("#slot-2-apart input").check()
    expect(page.locator("#slot-2-denoiser input[type=range]")).to_be_enabled()
    tab.press_on_slider("slot-2-denoiser", "ArrowRight", 2)
    tab.set_number("slot-2-text", "-0.35")
    page.locator("#prompt textarea").press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("Done in", timeout=PATIENCE_MS)

    (saved,) = (tmp_path / "out").glob("*.png")
    (base,) = (tmp_path / "out" / "base").glob("*.png")
    assert _shown(page, "blend") == saved.read_bytes()
    assert _shown(page, "base") == base.read_bytes()
    with Image.open(saved) as blend_picture, Image.open(base) as base_picture:
        record = json.loads(blend_picture.info["dora_diffusion"])
        parameters = blend_picture.info["parameters"]
        assert not np.array_equal(np.asarray(blend_picture), np.asarray(base_picture))
    assert [(use["name"], use["sha256"], use["weight"]) for use in record["adapters"]] == [
        ("ink", sha256_of(adapters / "ink.safetensors"), 0.8),
        ("lego", sha256_of(adapters / "lego.safetensors"), {"unet": 1.1, "text_encoder": -0.35}),
    ]
    assert record["settings"]["steps"] == 3
    page.locator("#metadata-fold > button").click()
    expect(page.locator("#metadata textarea")).to_have_value(f"{parameters}\n\n{json.dumps(record, indent=2)}")


def test_quick_drawings_all_show(tab: Tab) -> None:
    page = tab.page
    tab.pick(1, "ink")
    for seed, steps in enumerate(("2", "1", "2", "3", "2")):
        tab.set_number("steps", steps)
        page.locator("#seed input").fill(str(seed))
        page.locator("#generate").click()
        page.wait_for_timeout(300)
        expect(page.locator("#status")).to_contain_text("Done in", timeout=PATIENCE_MS)
        expect(page.locator("#blend img")).to_be_visible()
        expect(page.locator("#base img")).to_be_visible()


def slow_down(tab: Tab) -> None:
    """A drawing that lasts, also on a machine where the page lags behind."""
    tab.set_number("steps", "100")
    for side in ("width", "height"):
        tab.page.locator(f"#{side} input").fill("256")


def test_stop_ends_a_long_run(tab: Tab, tmp_path: Path) -> None:
    page = tab.page
    slow_down(tab)
    page.locator("#generate").click()
    expect(page.locator("#base img")).to_be_visible(timeout=PATIENCE_MS)
    expect(page.locator("#status")).to_contain_text("of 100")
    page.locator("#stop").click()
    pressed = time.monotonic()
    expect(page.locator("#status")).to_contain_text("Stopped at step", timeout=PATIENCE_MS)
    assert time.monotonic() - pressed < 2
    assert not (tmp_path / "out" / "base").exists()


def test_a_closed_tab_stops_its_run(tab: Tab, app: RunningApp) -> None:
    page = tab.page
    slow_down(tab)
    page.locator("#generate").click()
    expect(page.locator("#status")).to_contain_text("of 100", timeout=PATIENCE_MS)
    assert app.session.busy
    page.close()
    deadline = time.monotonic() + 3
    while app.session.busy and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not app.session.busy


def test_a_mistake_is_one_line(tab: Tab) -> None:
    page = tab.page
    tab.pick(1, "ink")
    tab.pick(2, "ink")
    page.locator("#generate").click()
    toast = page.get_by_test_id("toast-body")
    expect(toast).to_contain_text("ink: in slots 1 and 2, expected each adapter once", timeout=PATIENCE_MS)
    expect(toast).not_to_contain_text("Traceback")


def test_refresh_offers_new_files(tab: Tab, adapters: Path) -> None:
    page = tab.page
    tab.pick(1, "lego")
    (adapters / "newer.safetensors").write_bytes((adapters / "ink.safetensors").read_bytes())
    (adapters / "lego.safetensors").unlink()
    page.locator("#refresh").click()
    expect(page.locator("#slot-1-file input")).to_have_value("none")
    expect(page.locator("#slot-1-strength")).to_be_hidden()
    tab.pick(1, "newer")
    expect(page.locator("#slot-1-badge")).to_contain_text("DoRA")


def test_fits_a_phone(tab: Tab) -> None:
    tab.pick(1, "ink")
    tab.page.locator("#slot-1-components > button").click()
    tab.page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    tab.page.wait_for_timeout(300)
    assert tab.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


def test_serves_this_machine_only(app: RunningApp, adapters: Path) -> None:
    def status(path: str, headers: dict[str, str]) -> int:
        from urllib.error import HTTPError

        try:
            with urlopen(Request(app.url + path, headers=headers)) as answer:
                return answer.status
        except HTTPError as error:
            error.close()
            return error.code

    assert status("config", {}) == 200
    assert status("config", {"Host": "evil.example"}) == 403
    assert status("config", {"Origin": "https://evil.example"}) == 403
    assert status(f"gradio_api/file={adapters / 'ink.safetensors'}", {}) == 403
