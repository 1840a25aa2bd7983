"""Widgets to session: the page, its handlers, and starting it.

Nothing of the app leaves the machine: no analytics, no sharing, no history; the browser may read the output folder
and no other.
"""

import gc
import os
from dataclasses import dataclass

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads it while it is imported
# Gradio sums up all calls so far after every call, for a page of figures that is not served: 20 ms of each.
os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", str(10**9))

import gradio as gr

from dora_diffusion.pipelines.loading import load_pipeline
from ui.backend.session import Session
from ui.layout import TABS_AT_ONCE, AppPage, build_page
from ui.options import UiOptions
from ui.server.health import health_route, on_shutdown, stop_serving
from ui.server.security import security_middleware
from ui.theme import CSS, HEAD, theme

MAX_UPLOAD_BYTES = 24 << 20
PREVIEW_SECONDS, PREVIEW_SWEEP_SECONDS = 24 * 3600, 3600


@dataclass(frozen=True)
class RunningApp:
    """A started app."""

    demo: gr.Blocks
    session: Session
    options: UiOptions
    page: AppPage
    url: str

    def close(self) -> None:
        """Stop training, drawing and serving."""
        self.page.train.close()
        self.session.close()
        stop_serving(self.demo)


def build_app(session: Session, options: UiOptions) -> tuple[gr.Blocks, AppPage]:
    """The page, wired to the session."""
    with gr.Blocks(
        title="DoRA diffusion", analytics_enabled=False, delete_cache=(PREVIEW_SWEEP_SECONDS, PREVIEW_SECONDS)
    ) as demo:
        page = build_page(session, options, demo)
    return demo.queue(api_open=False, default_concurrency_limit=TABS_AT_ONCE), page


def serve(session: Session, options: UiOptions) -> RunningApp:
    """Serve the page over a session, with its guards and /health; returns at once.

    Args:
        session: whose output folder the browser may read, and no other.
        options: where to listen; where training data and runs lie.

    Raises:
        ValueError: the port is taken.
    """
    session.output.mkdir(parents=True, exist_ok=True)
    demo, page = build_app(session, options)
    try:
        served, url, _ = demo.launch(
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
            footer_links=[],
            max_file_size=MAX_UPLOAD_BYTES,
            allowed_paths=[str(session.output.resolve())],
            app_kwargs={"middleware": security_middleware(options.host, most_upload_bytes=MAX_UPLOAD_BYTES)},
            theme=theme(),
            css=CSS,
            head=HEAD,
            # gradio's last look at its own page, which gives up after 3 s: a busy machine takes longer, and the server
            # has answered by then
            _frontend=False,
        )
    except OSError as error:
        raise ValueError(f"port {options.port} of {options.host}: {str(error).splitlines()[0]}") from error
    health_route(served, session)
    return RunningApp(demo, session, options, page, url)


def launch(options: UiOptions, *, block: bool = True) -> RunningApp:
    """Load the base and serve the app.

    Args:
        options: what to serve and where.
        block: stay until Ctrl+C; False returns at once.

    Returns:
        The app with its address; `close()` ends it.

    Raises:
        ValueError: the base cannot be loaded, or the port is taken.
    """
    pipe = load_pipeline(
        options.model,
        device=options.device,
        transformer=options.transformer,
        unet=options.unet,
        vae=options.vae,
    )
    gc.freeze()  # what has been loaded stays: looking through it again and again is what made ten thousand files slow
    session = Session(
        pipe,
        model=options.model,
        folder=options.adapters,
        output=options.output,
        models=options.models,
        files=options.files,
    )
    app = serve(session, options)
    print(f"DoRA diffusion is at {app.url} (Ctrl+C ends it)", flush=True)
    if block:
        on_shutdown(app.demo, session, [app.page.train.close])
    return app
