"""The app on a free port, and a tab that shows it. Journeys are skipped aloud without a Chromium."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from ui.options import UiOptions

pytest.importorskip("gradio", reason="gradio is not installed: pip install dora-diffusion[ui]")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

from playwright.sync_api import expect, sync_playwright  # noqa: E402  (after the skips above)

from tests.ui.tab import CHROMIUM, PATIENCE_MS, SWITCHES, Tab  # noqa: E402
from ui.app import RunningApp, launch  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder drives a browser."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.browser)
            # what gradio 6.31's queue asks of pandas, pandas 3 calls deprecated
            item.add_marker(pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"))
            item.add_marker(pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"))
            item.add_marker(
                pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium")
            )


@pytest.fixture(scope="module")
def base(pipe: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random pocket as a folder."""
    folder = tmp_path_factory.mktemp("base")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def app(base: Path, adapters: Path, tmp_path: Path) -> Iterator[RunningApp]:
    """The app on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = UiOptions(model=str(base), adapters=adapters, output=tmp_path / "out", port=port)
    running = launch(options, block=False)
    yield running
    running.close()


@pytest.fixture
def tab(app: RunningApp) -> Iterator[Tab]:
    """A tab that shows the app; at the end nothing may have left loopback or gone wrong in the page."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        tab = Tab(browser.new_page(viewport={"width": 1280, "height": 900}))
        tab.watch()
        tab.page.goto(app.url)
        expect(tab.page.locator("#prompt textarea")).to_be_visible(timeout=PATIENCE_MS)
        yield tab
        browser.close()
    assert tab.hosts == {"127.0.0.1"}
    assert tab.errors == []
