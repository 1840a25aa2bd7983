"""Widgets to session: the page, its handlers, and starting it.

Nothing of the app leaves the machine: no analytics, no sharing, no history; the browser may read the output folder
and no other.
"""

import gc
import os
from dataclasses import dataclass

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads it while it is imported

import gradio as gr

from dora_diffusion.pipelines import load_pipeline
from ui.guard import guards
from ui.health import health_route, on_shutdown
from ui.look import CSS, HEAD, theme
from ui.options import UiOptions
from ui.page import TABS_AT_ONCE, Page, build_page
from ui.session import Session

MAX_UPLOAD_BYTES = 24 << 20
PREVIEW_SECONDS, PREVIEW_SWEEP_SECONDS = 24 * 3600, 3600


@dataclass(frozen=True)
class RunningApp:
    """A started app."""

    demo: gr.Blocks
    session: Session
    page: Page
    url: str

    def close(self) -> None:
        """Stop training, drawing and serving."""
        self.page.train.close()
        self.session.close()
        self.session.library.close()
        self.demo.close(verbose=False)


def build_app(session: Session, options: UiOptions) -> tuple[gr.Blocks, Page]:
    """The page, wired to the session."""
    with gr.Blocks(
        title="DoRA diffusion", analytics_enabled=False, delete_cache=(PREVIEW_SWEEP_SECONDS, PREVIEW_SECONDS)
    ) as demo:
        page = build_page(session, options, demo)
    return demo.queue(api_open=False, default_concurrency_limit=TABS_AT_ONCE), page


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
    options.output.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(options.model)
    gc.freeze()  # what has been loaded stays: looking through it again and again is what made ten thousand files slow
    session = Session(pipe, model=options.model, folder=options.adapters, output=options.output, models=options.models)
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
            allowed_paths=[str(options.output.resolve())],
            app_kwargs={"middleware": guards(options.host, most_upload_bytes=MAX_UPLOAD_BYTES)},
            theme=theme(),
            css=CSS,
            head=HEAD,
        )
    except OSError as error:
        raise ValueError(f"port {options.port} of {options.host}: {str(error).splitlines()[0]}") from error
    health_route(served, session)
    print(f"DoRA diffusion is at {url} (Ctrl+C ends it)", flush=True)
    if block:
        on_shutdown(demo, session, [page.train.close])
    return RunningApp(demo, session, page, url)
