"""A part of a picture is painted over and drawn anew; restored, it is there again and draws the same picture."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import FloatRect, Locator, expect

from dora_diffusion.generation.img2img import Canvas
from dora_diffusion.generation.png_metadata import picture_sha256
from tests.ui.served import left_as_found
from tests.ui.tab import PATIENCE_MS, PHONE, Tab
from ui.app import RunningApp
from ui.backend.request import DetailValues, DrawRequest, SlotValues, check_adapters, check_settings

_LEVEL = "(c, [x, y]) => c.getContext('2d').getImageData(x * c.width, y * c.height, 1, 1).data[3]"


@pytest.fixture
def app(shared_app: RunningApp) -> Iterator[RunningApp]:
    """One for all of these journeys, without the pictures of those before."""
    with left_as_found(shared_app) as app:
        yield app


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture wider than it is high, in no size that anything draws in."""
    rows = Image.linear_gradient("L").resize((200, 120))
    path = tmp_path / "photo.png"
    Image.merge("RGB", (rows, rows.transpose(Image.Transpose.FLIP_TOP_BOTTOM), rows)).save(path)
    return path


def _draw(tab: Tab, folder: Path, *, pictures: int) -> Path:
    """Draw; the newest of so many pictures."""
    tab.draw()
    drawn = sorted(folder.glob("*.png"), key=lambda path: path.stat().st_mtime_ns)
    assert len(drawn) == pictures
    return drawn[-1]


def _facts(path: Path) -> tuple[np.ndarray, dict[str, str]]:
    """A picture's pixels, and the hashes of what it was drawn on."""
    with Image.open(path) as picture:
        return np.asarray(picture), json.loads(picture.info["dora_diffusion"])["canvas"]


def _put_in(tab: Tab, photo: Path) -> Locator:
    """Open the fold and choose a picture; the painter's canvas over it."""
    tab.page.locator("#canvas-fold > button").click()
    tab.page.locator("#canvas input[type=file]").set_input_files(photo)
    canvas = tab.page.locator("#canvas canvas")
    expect(canvas).to_be_visible(timeout=PATIENCE_MS)
    return canvas


def _box(canvas: Locator) -> FloatRect:
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    return box


def _stroke(tab: Tab, canvas: Locator, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Paint with the mouse, places in shares of the picture."""
    box = _box(canvas)
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    tab.page.mouse.move(*places[0])
    tab.page.mouse.down()
    tab.page.mouse.move(*places[1], steps=5)
    tab.page.mouse.up()


def _expect_level(canvas: Locator, x: float, y: float, level: int) -> None:
    for _ in range(PATIENCE_MS // 100):
        if canvas.evaluate(_LEVEL, [x, y]) == level:
            return
        canvas.page.wait_for_timeout(100)
    assert canvas.evaluate(_LEVEL, [x, y]) == level


def _change_everything(tab: Tab) -> None:
    page = tab.page
    page.locator("#canvas .remove").click()
    expect(page.locator("#canvas canvas")).to_be_hidden()
    page.locator("#prompt textarea").fill("something else")
    page.locator("#seed input").fill("77")
    tab.set_number("steps", "5")
    tab.set_number("denoise", "0.2")
    tab.set_number("slot-1-strength", "-1.5")
    page.locator("#canvas-fold > button").click()


def test_what_was_painted_comes_back_and_draws_the_same(tab: Tab, app: RunningApp, photo: Path) -> None:
    page, out = tab.page, app.session.output
    page.locator("#prompt textarea").fill("a cat")
    tab.set_number("steps", "4")
    tab.pick(1, "ink")
    canvas = _put_in(tab, photo)
    tab.set_number("denoise", "0.8")
    _stroke(tab, canvas, (0.3, 0.4), (0.7, 0.6))
    _expect_level(canvas, 0.5, 0.5, 255)
    _expect_level(canvas, 0.05, 0.95, 0)
    before, origin = _facts(_draw(tab, out, pictures=1))
    assert set(origin) == {"picture", "mask", "picture_file", "mask_file"} and all(origin.values())

    _change_everything(tab)
    other, none = _facts(_draw(tab, out, pictures=2))
    assert not none and not np.array_equal(before, other)

    page.get_by_role("tab", name="History").click()
    pictures = page.locator("#history-gallery button:has(img)")
    expect(pictures).to_have_count(2, timeout=PATIENCE_MS)
    pictures.nth(1).click()
    expect(page.locator("#history-facts")).to_contain_text("a cat", timeout=PATIENCE_MS)
    page.locator("#history-restore").click()
    expect(page.locator("#prompt textarea")).to_have_value("a cat", timeout=PATIENCE_MS)
    expect(canvas).to_be_visible(timeout=PATIENCE_MS)
    _expect_level(canvas, 0.5, 0.5, 255)
    _expect_level(canvas, 0.05, 0.95, 0)
    expect(page.locator("#denoise input[type=number]")).to_have_value("0.8")
    expect(page.locator("#history-report")).not_to_contain_text("paint")
    canvas.scroll_into_view_if_needed()
    tab.snap("inpaint-restored")
    again, same = _facts(_draw(tab, out, pictures=3))
    assert same == origin
    assert np.array_equal(before, again)

    _change_everything(tab)
    page.locator("#restore-drop input[type=file]").set_input_files(min(out.glob("*.png")))
    expect(page.locator("#prompt textarea")).to_have_value("a cat", timeout=PATIENCE_MS)
    expect(canvas).to_be_visible(timeout=PATIENCE_MS)
    dropped, same = _facts(_draw(tab, out, pictures=4))
    assert same == origin
    assert np.array_equal(before, dropped)


def test_a_mask_of_any_size_survives_until_it_is_painted_on(tab: Tab, app: RunningApp, photo: Path) -> None:
    page, session = tab.page, app.session
    levels = np.random.default_rng(0).integers(0, 256, (77, 311), dtype=np.uint8)
    settings = check_settings("a cat", "", seed=5, steps=3, guidance=3.0, details=DetailValues(strength=0.73))
    with Image.open(photo) as picture:
        canvas = Canvas(picture.convert("RGB"), Image.fromarray(levels))
    ink = SlotValues.of("ink", 1.0)
    request = DrawRequest(settings, check_adapters((ink,), session.parts), canvas=canvas)
    first = list(session.start(request, owner="test").updates())[-1].picture
    assert first is not None
    before, origin = _facts(first)

    page.get_by_role("tab", name="History").click()
    page.locator("#restore-drop input[type=file]").set_input_files(first)
    painted = page.locator("#canvas canvas")
    expect(painted).to_be_visible(timeout=PATIENCE_MS)
    expect(page.locator("#slot-1-badge")).to_contain_text("88/88 keys matched", timeout=PATIENCE_MS)
    assert painted.evaluate("c => [c.width, c.height]") == [311, 77]
    alphas = "c => [...c.getContext('2d').getImageData(0, 0, 311, 77).data].filter((_, i) => i % 4 === 3)"
    assert painted.evaluate(alphas) == levels.ravel().tolist()
    again, same = _facts(_draw(tab, session.output, pictures=2))
    assert same == origin and np.array_equal(before, again)

    page.locator("#canvas [data-deed=invert]").click()
    inverted, other = _facts(_draw(tab, session.output, pictures=3))
    assert other["mask"] == picture_sha256(Image.fromarray(255 - levels))
    assert not np.array_equal(before, inverted)
    page.locator("#canvas [data-deed=undo]").click()
    undone, same = _facts(_draw(tab, session.output, pictures=4))
    assert same == origin and np.array_equal(before, undone)


def test_the_painter_erases_undoes_and_fits_a_phone(tab: Tab, app: RunningApp, photo: Path) -> None:
    page = tab.page
    tab.pick(1, "ink")
    canvas = _put_in(tab, photo)
    page.locator("#canvas [data-deed=left]").click()
    _expect_level(canvas, 0.2, 0.5, 255)
    page.locator("#canvas .erase").check()
    _stroke(tab, canvas, (0.2, 0.5), (0.3, 0.5))
    _expect_level(canvas, 0.2, 0.5, 0)
    page.locator("#canvas [data-deed=undo]").click()
    _expect_level(canvas, 0.2, 0.5, 255)
    page.locator("#canvas [data-deed=invert]").click()
    _expect_level(canvas, 0.2, 0.5, 0)
    _expect_level(canvas, 0.8, 0.5, 255)
    page.locator("#canvas [data-deed=clear]").click()
    _expect_level(canvas, 0.8, 0.5, 0)
    page.locator("#canvas [data-deed=undo]").click()
    _expect_level(canvas, 0.8, 0.5, 255)
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    page.wait_for_function(f"document.documentElement.scrollWidth === {PHONE['width']}")
    box = canvas.bounding_box()
    assert box is not None and box["width"] < PHONE["width"]
    canvas.scroll_into_view_if_needed()
    tab.snap("inpaint-phone")
    page.set_viewport_size({"width": 1280, "height": 900})

    page.locator("#canvas [data-deed=clear]").click()
    tab.set_number("steps", "2")
    _, origin = _facts(_draw(tab, app.session.output, pictures=1))
    assert origin["picture"] and not origin["mask"]


def test_pictures_are_dropped_and_pasted(tab: Tab, photo: Path) -> None:
    page = tab.page
    tab.dark()
    page.locator("#canvas-fold > button").click()
    expect(page.locator("#canvas .drop")).to_be_visible()
    hand_over = """(drop, [kind, bytes]) => {
      const held = new DataTransfer();
      held.items.add(new File([new Uint8Array(bytes)], 'photo.png', { type: 'image/png' }));
      const given = { bubbles: true, cancelable: true, dataTransfer: held, clipboardData: held };
      drop.dispatchEvent(kind === 'drop' ? new DragEvent(kind, given) : new ClipboardEvent(kind, given));
    }"""
    drop, canvas = page.locator("#canvas .drop"), page.locator("#canvas canvas")
    for kind in ("drop", "paste"):
        drop.hover()
        drop.evaluate(hand_over, [kind, list(photo.read_bytes())])
        expect(canvas).to_be_visible(timeout=PATIENCE_MS)
        assert canvas.evaluate("c => [c.width, c.height]") == [200, 120]
        tab.snap(f"inpaint-{kind}")
        page.locator("#canvas .remove").click()
        expect(canvas).to_be_hidden()
    page.locator("#canvas input[type=file]").set_input_files(
        {"name": "no.png", "mimeType": "image/png", "buffer": b"no picture"}
    )
    expect(page.locator("#canvas .said")).to_contain_text("cannot be shown", timeout=PATIENCE_MS)
