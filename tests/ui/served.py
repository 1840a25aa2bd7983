"""The app on a free port over a session of the tests, its documented endpoints and guards included."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import httpx

from ui.api import add_api
from ui.app import MAX_UPLOAD_BYTES, build_app
from ui.guard import guards
from ui.health import health_route
from ui.options import UiOptions
from ui.session import Session


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
    output = session.output
    output.mkdir(parents=True, exist_ok=True)
    options = UiOptions(
        model="random",
        adapters=session.library.folder,
        output=output,
        port=free_port(),
        datasets=(folder / "datasets",),
        runs=folder / "runs",
    )
    demo, page = build_app(session, options)
    if not any(fn.api_name == "generate" for fn in demo.fns.values()):
        with demo:
            add_api(session, demo)
    app, url, _ = demo.launch(
        server_name=options.host,
        server_port=options.port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        show_error=False,
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        max_file_size=MAX_UPLOAD_BYTES,
        allowed_paths=[str(output.resolve())],
        app_kwargs={"middleware": guards(options.host, most_upload_bytes=MAX_UPLOAD_BYTES)},
    )
    health_route(app, session)
    try:
        # no connection is kept: the server hangs up on idle ones while a test waits for another answer
        limits = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=url, timeout=30, verify=False, limits=limits) as http:
            yield Served(demo, session, url, http)
    finally:
        page.train.close()
        session.close()
        demo.close(verbose=False)
