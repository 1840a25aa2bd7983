"""The app as a user gets it, on a free port, and a tab that shows it. Journeys are skipped aloud without a Chromium.

`app` is one for each journey. A module whose journeys leave one another alone overrides it with `shared_app`, and one
whose journeys draw, count and remove files with what `served.left_as_found` lends of it.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from dora_diffusion.pretrain.scenes import background
from ui.options import UiOptions

pytest.importorskip("gradio", reason="gradio is not installed: pip install dora-diffusion[ui]")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

from playwright.sync_api import BrowserContext, sync_playwright  # noqa: E402  (after the skips above)

from tests.ui.served import free_port  # noqa: E402
from tests.ui.tab import CHROMIUM, DESKTOP, PATIENCE_MS, SWITCHES, Tab  # noqa: E402
from ui.app import RunningApp, launch  # noqa: E402

CATS = ("red", "blue", "meadow")  # pictures to train on


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


@contextmanager
def _started(base: Path, folder: Path) -> Iterator[RunningApp]:
    """The app over `folder`: its adapters, its pictures to train on, its runs, its output."""
    (folder / "sets" / "cats").mkdir(parents=True)
    for name in CATS:
        background(name, 64).save(folder / "sets" / "cats" / f"{name}.png")
    options = UiOptions(
        model=str(base),
        adapters=folder / "adapters",
        output=folder / "out",
        port=free_port(),
        datasets=(folder / "sets",),
        runs=folder / "runs",
    )
    running = launch(options, block=False)
    try:
        yield running
    finally:
        running.close()


@pytest.fixture
def app(base: Path, adapters: Path, tmp_path: Path) -> Iterator[RunningApp]:
    """An app of one journey's own."""
    assert adapters == tmp_path / "adapters"
    with _started(base, tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def shared_app(
    base: Path, make_adapters: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningApp]:
    """One app for a module: for `app` in a module whose journeys leave one another alone."""
    folder = tmp_path_factory.mktemp("app")
    make_adapters(folder)
    with _started(base, folder) as running:
        yield running


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    """A browser for a module: its tabs share what they have fetched of the page, and nothing else.

    With a folder for it: only so does Chromium keep the scripts as it has compiled them, a third of a page's cost.
    """
    profile = tmp_path_factory.mktemp("chromium")
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, args=SWITCHES, viewport=DESKTOP
        )
        context.set_default_timeout(PATIENCE_MS)
        yield context
        context.close()
    shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture
def tab(app: RunningApp, chromium: BrowserContext) -> Iterator[Tab]:
    """A fresh tab that shows the app; at the end nothing may have left loopback or gone wrong in the page."""
    tab = Tab(chromium.new_page())
    tab.watch()
    tab.page.goto(app.url)
    tab.expect_loaded()
    yield tab
    tab.page.close()
    assert tab.hosts == {"127.0.0.1"}
    assert tab.errors == []
