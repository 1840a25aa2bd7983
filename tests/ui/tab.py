"""A page of the app in a real Chromium, for journeys: what a person can do with it, and what may not happen."""

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Page, expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PATIENCE_MS = 60_000  # a machine that does other things as well
PHONE = {"width": 390, "height": 844}

expect.set_options(timeout=20_000)


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

    def pick(self, slot: int, name: str) -> None:
        """Choose an adapter and wait for its badge."""
        self.page.locator(f"#slot-{slot}-file input").click()
        self.page.locator(f"#slot-{slot}-file").get_by_role("option", name=name, exact=True).click()
        expect(self.page.locator(f"#slot-{slot}-badge")).to_contain_text("88/88 keys matched", timeout=PATIENCE_MS)

    def set_number(self, elem_id: str, value: str) -> None:
        """Type into the number box of a slider."""
        box = self.page.locator(f"#{elem_id} input[type=number]")
        box.fill(value)
        box.press("Tab")

    def snap(self, name: str) -> Path:
        """Keep a screenshot of the whole page; SCREENSHOTS says where (default: a temporary folder)."""
        folder = Path(os.environ.get("SCREENSHOTS", Path(tempfile.gettempdir()) / "dora-screenshots"))
        folder.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=folder / f"{name}.png", full_page=True)
        return folder / f"{name}.png"

    def dark(self) -> None:
        """Reload in the dark theme."""
        self.page.goto(self.page.url.split("?")[0] + "?__theme=dark")
        expect(self.page.locator("#prompt textarea")).to_be_visible(timeout=PATIENCE_MS)

    def press_on_slider(self, elem_id: str, key: str, times: int) -> None:
        """Move a slider by the keyboard."""
        slider = self.page.locator(f"#{elem_id} input[type=range]")
        slider.focus()
        for _ in range(times):
            slider.press(key)
