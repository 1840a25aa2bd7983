"""What a real browser makes of the page over hostile files."""

import shutil
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SWITCHES = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
SETTLE_MS = 3000  # what load events bring comes after the page


@dataclass(frozen=True)
class Seen:
    """What happened on the page.

    Attributes:
        dialogs: what scripts said by `alert`: all that the payloads' scripts do.
        errors: of scripts.
        hosts: that were asked for anything.
        handlers: elements with an attribute that runs a script.
    """

    dialogs: tuple[str, ...]
    errors: tuple[str, ...]
    hosts: tuple[str, ...]
    handlers: int

    def faults(self) -> list[str]:
        """What broke the promise that nothing of the files runs."""
        faults = [f"ran a script: {said}" for said in self.dialogs] + [f"script error: {said}" for said in self.errors]
        faults += [f"asked {host}" for host in self.hosts if host != "127.0.0.1"]
        return faults + ([f"{self.handlers} elements with handlers"] if self.handlers else [])

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def seen_by_browser(url: str) -> Seen | None:
    """Open the page and wait for what it loads; None without a Chromium, or without playwright to drive it."""
    try:
        from playwright.sync_api import Dialog, sync_playwright
    except ImportError:
        return None
    if CHROMIUM is None:
        return None
    dialogs: list[str] = []
    errors: list[str] = []
    urls: list[str] = []

    def dismiss(dialog: Dialog) -> None:
        dialogs.append(dialog.message)
        dialog.dismiss()

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(SWITCHES))
        page = browser.new_page()
        page.on("dialog", dismiss)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: urls.append(request.url))
        page.goto(url)
        page.locator("#prompt textarea").wait_for(timeout=60_000)
        page.wait_for_timeout(SETTLE_MS)
        handlers = page.locator("[onerror], [onmouseover], [onload]").count()
        browser.close()
    hosts = {str(urlsplit(url).hostname) for url in urls if urlsplit(url).scheme not in ("data", "blob")}
    return Seen(tuple(dialogs), tuple(errors), tuple(sorted(hosts)), handlers)
