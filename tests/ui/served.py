"""The app as users get it, on a free port, over a session of the tests."""

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import httpx

from tests.ui.scripted import PATIENCE, until
from ui.app import RunningApp, serve
from ui.backend.session import Session
from ui.options import UiOptions


@dataclass(frozen=True)
class Served:
    """A served app, and how to ask it as a browser or a stranger would."""

    demo: gr.Blocks
    session: Session
    url: str
    http: httpx.Client

    def ask(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """One request to a path of the app."""
        return self.http.request(method, path, **arguments)

    def alive(self) -> bool:
        """Whether it still answers."""
        return self.ask("GET", "health").json()["status"] == "ok"


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def served(session: Session, folder: Path) -> Iterator[Served]:
    """Serve until the end of the block."""
    options = UiOptions(
        model="random",
        adapters=session.library.folder,
        output=session.output,
        port=free_port(),
        datasets=(folder / "datasets",),
        runs=folder / "runs",
    )
    running = serve(session, options)
    try:
        # no connection is kept: the server hangs up on idle ones while a test waits for another answer
        limits = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=running.url, timeout=PATIENCE, verify=False, limits=limits) as http:
            yield Served(running.demo, session, running.url, http)
    finally:
        running.close()


@contextmanager
def left_as_found(app: RunningApp) -> Iterator[RunningApp]:
    """Lend a shared app: afterwards nothing draws, its adapters are those of before, and its output folder is empty."""
    session, folder = app.session, app.session.library.folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    yield app
    until(lambda: not session.busy)
    for path in {path for path in folder.rglob("*") if path.is_file()} - before.keys():
        path.unlink()
    for path, content in before.items():
        if not path.is_file() or path.read_bytes() != content:
            path.write_bytes(content)
    session.library.refresh()
    shutil.rmtree(session.output)
    session.output.mkdir()
