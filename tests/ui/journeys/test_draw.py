"""Two adapters are blended by keyboard and mouse, Stop stops, a closed tab stops, a mistake is one line."""

import json
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from dora_diffusion.utils.atomic import sha256_of
from tests.ui.tab import PATIENCE_MS, Tab
from ui.app import RunningApp
from ui.backend.request import DrawRequest
from ui.backend.run import Run


@pytest.fixture(scope="module")
def app(shared_app: RunningApp) -> RunningApp:
    """One for all of these journeys."""
    return shared_app


def _pictures(app: RunningApp) -> set[Path]:
    """All that is saved: the blends, and the bases in their folder."""
    return set(app.session.output.rglob("*.png"))


def _shown(page: Page, elem_id: str) -> bytes:
    """The bytes of the picture on show."""
    source = page.locator(f"#{elem_id} img").get_attribute("src")
    assert source is not None
    return page.request.get(source).body()


def test_blends_two_adapters(tab: Tab, app: RunningApp) -> None:
    page, had, adapters = tab.page, _pictures(app), app.session.library.folder
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
    with tab.drawing():
        page.locator("#prompt textarea").press("Control+Enter")

    base, saved = sorted(_pictures(app) - had, key=lambda path: path.parent.name != "base")
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
        tab.draw()
        expect(page.locator("#blend img")).to_be_visible()
        expect(page.locator("#base img")).to_be_visible()


def _last_for_minutes(tab: Tab) -> None:
    """What is drawn then does not end before it is stopped, on a quick machine or with a page that lags behind."""
    tab.set_number("steps", "100")
    tab.set_number("count", "4")
    for side in ("width", "height"):
        tab.page.locator(f"#{side} input").fill("512")


def test_stop_ends_a_long_run(tab: Tab, app: RunningApp, monkeypatch: pytest.MonkeyPatch) -> None:
    page, session, had = tab.page, app.session, _pictures(app)
    runs: list[Run] = []
    steps: list[int] = []
    start, stop = session.start, session.stop

    def start_noted(request: DrawRequest, *, owner: str) -> Run:
        runs.append(start(request, owner=owner))
        return runs[-1]

    def stop_noted(owner: str) -> None:
        stop(owner)
        steps.append(runs[-1].latest.step)

    monkeypatch.setattr(session, "start", start_noted)
    monkeypatch.setattr(session, "stop", stop_noted)
    _last_for_minutes(tab)
    page.locator("#generate").click()
    expect(page.locator("#base img")).to_be_visible(timeout=PATIENCE_MS)
    expect(page.locator("#status")).to_contain_text("of 100")
    page.locator("#stop").click()
    expect(page.locator("#status")).to_contain_text("Stopped at step", timeout=PATIENCE_MS)
    (run,), (step,) = runs, steps
    assert step <= run.latest.step <= step + 1  # the step that was under way ends, and no other begins
    expect(page.locator("#status")).to_contain_text(f"Stopped at step {run.latest.step} of 100")
    assert _pictures(app) == had


def test_a_closed_tab_stops_its_run(tab: Tab, app: RunningApp) -> None:
    page, had = tab.page, _pictures(app)
    _last_for_minutes(tab)
    page.locator("#generate").click()
    expect(page.locator("#status")).to_contain_text("of 100", timeout=PATIENCE_MS)
    assert app.session.busy
    page.close()
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while app.session.busy and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not app.session.busy
    assert _pictures(app) == had


def test_a_mistake_is_one_line(tab: Tab) -> None:
    tab.pick(1, "ink")
    tab.pick(2, "ink")
    tab.page.locator("#generate").click()
    tab.expect_toast("ink: in slots 1 and 2, expected each adapter once")


def test_refresh_offers_new_files(tab: Tab, app: RunningApp) -> None:
    page, folder = tab.page, app.session.library.folder
    old, new = folder / "older.safetensors", folder / "newer.safetensors"
    old.write_bytes((folder / "lego.safetensors").read_bytes())
    page.locator("#refresh").click()
    tab.pick(1, "older")
    new.write_bytes((folder / "ink.safetensors").read_bytes())
    old.unlink()
    page.locator("#refresh").click()
    expect(page.locator("#slot-1-file input")).to_have_value("none")
    expect(page.locator("#slot-1-strength")).to_be_hidden()
    tab.pick(1, "newer")
    expect(page.locator("#slot-1-badge")).to_contain_text("DoRA")
    new.unlink()


def test_fits_a_phone(tab: Tab) -> None:
    tab.pick(1, "ink")
    tab.page.locator("#slot-1-components > button").click()
    tab.expect_fits_phone()


def test_serves_this_machine_only(app: RunningApp) -> None:
    def status(path: str, headers: dict[str, str]) -> int:
        try:
            with urlopen(Request(app.url + path, headers=headers)) as answer:
                return answer.status
        except HTTPError as error:
            error.close()
            return error.code

    ink = app.session.library.folder / "ink.safetensors"
    assert status("config", {}) == 200
    assert status("config", {"Host": "evil.example"}) == 403
    assert status("config", {"Origin": "https://evil.example"}) == 403
    assert status(f"gradio_api/file={ink}", {}) == 403
