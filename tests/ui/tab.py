"""A page of the app in a real Chromium, for journeys: what a person can do with it, and what may not happen."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Page, ViewportSize, expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PATIENCE_MS = 120_000  # a machine that does other things as well
DRAWN_MS = 3 * PATIENCE_MS
DESKTOP: ViewportSize = {"width": 1280, "height": 900}
PHONE: ViewportSize = {"width": 390, "height": 844}

expect.set_options(timeout=PATIENCE_MS)


@dataclass
class Tab:
    """A page and what it did."""

    page: Page
    hosts: set[str | None] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)

    def watch(self) -> None:
        """Note every host that is asked and every script error."""
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self._note(request.url))

    def _note(self, url: str) -> None:
        if urlsplit(url).scheme not in ("data", "blob"):
            self.hosts.add(urlsplit(url).hostname)

    def expect_loaded(self) -> None:
        """Wait until the page has its cards and its history, which come after it has begun to show."""
        expect(self.page.locator("#prompt textarea")).to_be_visible(timeout=PATIENCE_MS)
        expect(self.page.locator("#browser-cards .card").first).to_be_visible(timeout=PATIENCE_MS)
        expect(self.page.locator("#history-place")).to_contain_text(re.compile("drawn yet|page"), timeout=PATIENCE_MS)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Start a drawing in the block, the History open: at its end the page has heard that the drawing is through.

        "Done" in the status is not enough: gradio drops a press of Generate while the one before is under way, and it
        is for a moment after its last news. The history looks again after that, and then it has another picture.
        """
        place = self.page.locator("#history-place .kept")
        before = place.inner_text()
        yield
        expect(place).not_to_have_text(before, timeout=DRAWN_MS)
        expect(self.page.locator("#status")).to_contain_text("Done in")

    def draw(self) -> None:
        """Press Generate and wait as `drawing` does."""
        with self.drawing():
            self.page.locator("#generate").click()

    def open(self, name: str) -> None:
        """Go to one of the page's tabs."""
        self.page.get_by_role("tab", name=name, exact=True).click()
        expect(self.page.get_by_role("tab", name=name, exact=True)).to_have_attribute("aria-selected", "true")

    def choose(self, elem_id: str, name: str) -> None:
        """Choose from a dropdown, and wait until it shows the choice."""
        self.page.locator(f"#{elem_id} input").click()
        self.page.locator(f"#{elem_id}").get_by_role("option", name=name, exact=True).click()
        expect(self.page.locator(f"#{elem_id} input")).to_have_value(name)

    def expect_toast(self, text: str) -> None:
        """Wait for one that says so, and put it away."""
        toast = self.page.get_by_test_id("toast-body").filter(has_text=text)
        expect(toast).to_be_visible(timeout=PATIENCE_MS)
        expect(toast).not_to_contain_text("Traceback")
        toast.get_by_test_id("toast-close").click()
        expect(toast).to_have_count(0)

    def expect_fits_phone(self) -> None:
        """Make the page as narrow as a phone: nothing may stick out."""
        self.page.set_viewport_size(PHONE)
        self.page.wait_for_timeout(300)
        self.page.wait_for_function(f"document.documentElement.scrollWidth === {PHONE['width']}")

    def pick(self, slot: int, name: str) -> None:
        """Choose an adapter and wait for its badge."""
        self.choose(f"slot-{slot}-file", name)
        expect(self.page.locator(f"#slot-{slot}-badge")).to_contain_text("88/88 keys matched", timeout=PATIENCE_MS)

    def set_number(self, elem_id: str, value: str) -> None:
        """Type into the number box of a slider."""
        box = self.page.locator(f"#{elem_id} input[type=number]")
        box.fill(value)
        box.press("Tab")
        expect(self.page.locator(f"#{elem_id} input[type=range]")).to_have_value(value)

    def snap(self, name: str) -> None:
        """Keep a screenshot of the whole page in the folder that SCREENSHOTS names; without it nobody would look."""
        if folder := os.environ.get("SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)

    def dark(self) -> None:
        """Reload in the dark theme."""
        self.page.goto(self.page.url.split("?")[0] + "?__theme=dark")
        self.expect_loaded()

    def press_on_slider(self, elem_id: str, key: str, times: int) -> None:
        """Move a slider by the keyboard."""
        slider = self.page.locator(f"#{elem_id} input[type=range]")
        slider.focus()
        for _ in range(times):
            slider.press(key)
