"""A person writes a caption, trains, watches, stops, resumes, sends a checkpoint and compares checkpoints."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.ui.scripted import until
from tests.ui.tab import DESKTOP, PATIENCE_MS, Tab
from ui.app import RunningApp
from ui.backend.picture_store import Drawn
from ui.backend.request import DrawRequest
from ui.backend.session import Session
from ui.train import recipes

TRAINING_MS = 3 * PATIENCE_MS


def _fill(tab: Tab, **fields: str) -> None:
    for name, value in fields.items():
        box = tab.page.locator(f"#train-{name.replace('_', '-')}").locator("textarea, input").first
        box.fill(value)
        box.press("Tab")


def test_trains_watches_and_sends(tab: Tab, app: RunningApp, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tab.page
    monkeypatch.setitem(recipes._PLAIN_SETTINGS, "preview", {"steps": 2})  # samples come as they do in 20, only sooner
    tab.open("Train")
    tab.choose("train-dataset", "sets/cats")
    expect(page.locator("#train-doctor")).to_contain_text("3 missing-caption", timeout=PATIENCE_MS)
    page.locator("#train-gallery button.thumbnail-item").first.click()
    expect(page.locator("#train-picture").locator("textarea, input")).to_have_value("blue.png", timeout=PATIENCE_MS)
    _fill(tab, caption="a <b>blue</b> wall")
    page.locator("#train-save-caption").click()
    expect(page.locator("#train-doctor")).to_contain_text("2 missing-caption", timeout=PATIENCE_MS)
    assert (app.options.datasets[0] / "cats" / "blue.txt").read_text() == "a <b>blue</b> wall\n"

    _fill(tab, name="../walls", instance_prompt="a wall", steps="4", rank="2", resolution="32", batch="1", every="2")
    expect(page.locator("#train-doctor")).to_contain_text("nothing would be lost", timeout=PATIENCE_MS)
    _fill(tab, samples="a wall\na cat")
    page.locator("#train-start").click()
    tab.expect_toast("run name: got '../walls'")
    _fill(tab, name="walls")
    page.locator("#train-plan").click()
    expect(page.locator("#train-plan-text")).to_contain_text("activations", timeout=TRAINING_MS)
    page.locator("#train-start").click()
    expect(page.locator("#train-start")).to_be_disabled(timeout=PATIENCE_MS)
    expect(page.locator("#train-status")).to_contain_text("walls: done, step 4 of 4", timeout=TRAINING_MS)
    expect(page.locator("#train-loss svg")).to_be_visible()
    expect(page.locator("#train-strip")).to_contain_text("step 4", timeout=PATIENCE_MS)
    expect(page.locator("#train-start")).to_be_enabled(timeout=PATIENCE_MS)

    expect(page.locator("#train-checkpoint input")).to_have_value("step 4", timeout=PATIENCE_MS)
    page.locator("#train-send").click()
    expect(page.locator("#slot-1-file input")).to_have_value("walls-step4", timeout=PATIENCE_MS)
    expect(page.locator("#slot-1-badge")).to_contain_text("keys matched", timeout=PATIENCE_MS)
    page.locator("#train-send").click()  # the same again is told again
    tab.expect_toast("walls-step4: is in slot 1 already")
    assert (app.session.library.folder / "walls-step4.safetensors").is_file()

    page.locator("#train-grid-fold > button").click()
    tab.set_number("train-grid-steps", "2")
    page.locator("#train-grid-draw").click()
    expect(page.locator("#train-grid-status")).to_contain_text("6 pictures", timeout=TRAINING_MS)
    expect(page.locator("#train-grid")).to_contain_text("step 2 · base")
    page.locator("#train-grid button.thumbnail-item").nth(1).click()
    expect(page.locator("#train-checkpoint input")).to_have_value("step 2", timeout=PATIENCE_MS)
    tab.snap("train")
    tab.expect_fits_phone()
    tab.snap("train-phone")
    page.set_viewport_size(DESKTOP)
    tab.dark()
    tab.open("Train")
    # the first tick tells the page of runs that came after it was built
    expect(page.locator("#train-seen").locator("textarea, input")).not_to_have_value("", timeout=PATIENCE_MS)
    tab.choose("train-run", "walls")
    expect(page.locator("#train-status")).to_contain_text("walls: done", timeout=PATIENCE_MS)
    expect(page.locator("#train-loss svg")).to_be_visible(timeout=PATIENCE_MS)
    tab.snap("train-dark")


def _hold_after(session: Session, pictures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so many be drawn; the next one begins, and lasts until it is stopped however quick the machine is."""
    draw, begun = session.draw, []

    def draw_held(request: DrawRequest, *, should_stop: Callable[[], bool], **options: Any) -> list[Drawn]:
        begun.append(request)
        if len(begun) > pictures:
            options["on_step"] = lambda report: until(should_stop)
        return draw(request, should_stop=should_stop, **options)

    monkeypatch.setattr(session, "draw", draw_held)


def test_stop_leaves_a_run_that_goes_on(tab: Tab, app: RunningApp, monkeypatch: pytest.MonkeyPatch) -> None:
    page, trainer = tab.page, app.page.train.trainer
    tab.open("Train")
    tab.choose("train-dataset", "sets/cats")
    _fill(tab, name="long", instance_prompt="a wall", steps="50000", rank="2", resolution="32", batch="1", every="5")
    page.locator("#train-start").click()
    expect(page.locator("#train-status")).to_contain_text("loss", timeout=TRAINING_MS)
    newest = page.locator("#train-checkpoint input")
    expect(newest).to_have_value(re.compile(r"step \d+$"), timeout=2 * TRAINING_MS)

    # drawing goes on beside training: the base, a picture, and another in the middle of which it is stopped
    _hold_after(app.session, 2, monkeypatch)
    page.locator("#train-grid-fold > button").click()
    _fill(tab, grid_weights="0.25, 0.5")
    tab.set_number("train-grid-steps", "2")
    page.locator("#train-grid-draw").click()
    expect(page.locator("#train-grid")).to_contain_text("· 0.25", timeout=TRAINING_MS)
    page.locator("#train-grid-stop").click()
    expect(page.locator("#train-grid-status")).to_contain_text("Stopped.", timeout=PATIENCE_MS)
    assert trainer.running

    page.reload()  # another page finds the run that is under way
    tab.open("Train")
    expect(page.locator("#train-status")).to_contain_text("long: step", timeout=PATIENCE_MS)
    expect(page.locator("#train-stop")).to_be_enabled(timeout=PATIENCE_MS)
    page.locator("#train-stop").click()
    expect(page.locator("#train-status")).to_contain_text("Resume goes on from step", timeout=PATIENCE_MS)
    expect(page.locator("#train-stop")).to_be_disabled()
    assert not trainer.running
    page.locator("#train-resume").click()
    expect(page.locator("#train-stop")).to_be_enabled(timeout=PATIENCE_MS)
    assert trainer.running
