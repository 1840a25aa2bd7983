"""Widgets to session: the page, its handlers, and starting it.

Nothing of the app leaves the machine: no analytics, no sharing, no history; the browser may read the output folder
and no other.
"""

import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads it while it is imported

import gradio as gr
from gradio.components import Component
from starlette.middleware import Middleware

from dora_diffusion.generation import GenerationSettings
from dora_diffusion.pipelines import load_pipeline
from ui.guard import HostGuard
from ui.look import CSS, CTRL_ENTER, theme
from ui.options import UiOptions
from ui.rack import Rack, build_rack
from ui.request import MAX_GUIDANCE, MAX_SEED, MAX_STEPS, DrawRequest, check_adapters, check_settings
from ui.session import Session
from ui.stage import Screenplay, Stage, build_stage, status_html

TABS_AT_ONCE = 8
MAX_UPLOAD_BYTES = 1 << 20
PREVIEW_SECONDS, PREVIEW_SWEEP_SECONDS = 24 * 3600, 3600


@dataclass(frozen=True)
class Form:
    """The widgets above the rack."""

    prompt: gr.Textbox
    negative: gr.Textbox
    seed: gr.Number
    steps: gr.Slider
    guidance: gr.Slider
    new_seed: gr.Button
    generate: gr.Button
    stop: gr.Button

    @property
    def inputs(self) -> set[Component]:
        """The widgets that decide the picture."""
        return {self.prompt, self.negative, self.seed, self.steps, self.guidance}

    def read(self, values: Mapping[Component, Any]) -> GenerationSettings:
        """What the browser sent, checked; `ValueError` names the field that is wrong."""
        return check_settings(
            values[self.prompt],
            values[self.negative],
            seed=values[self.seed],
            steps=values[self.steps],
            guidance=values[self.guidance],
        )


@dataclass(frozen=True)
class RunningApp:
    """A started app."""

    demo: gr.Blocks
    session: Session
    url: str

    def close(self) -> None:
        """Stop drawing and serving."""
        self.session.close()
        self.demo.close(verbose=False)


def _build_prompt() -> tuple[gr.Textbox, gr.Textbox, gr.Button, gr.Button]:
    with gr.Row(equal_height=True):
        with gr.Column(scale=5, min_width=260):
            prompt = gr.Textbox(label="Prompt", lines=2, elem_id="prompt", autofocus=True)
            negative = gr.Textbox(label="Negative prompt", lines=1, elem_id="negative")
        with gr.Column(scale=1, min_width=160, elem_id="actions"):
            generate = gr.Button("Generate", variant="primary", elem_id="generate")
            stop = gr.Button("Stop", variant="stop", elem_id="stop", interactive=False)
    return prompt, negative, generate, stop


def _build_settings() -> tuple[gr.Number, gr.Slider, gr.Slider, gr.Button]:
    with gr.Row(elem_id="seed-row"):
        seed = gr.Number(
            value=0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed", min_width=110, scale=2
        )
        new_seed = gr.Button("New seed", size="sm", elem_id="new-seed", min_width=90, scale=1)
    with gr.Row():
        steps = gr.Slider(1, MAX_STEPS, value=20, step=1, label="Steps", elem_id="steps", min_width=190)
        guidance = gr.Slider(0, MAX_GUIDANCE, value=4.0, step=0.1, label="Guidance", elem_id="guidance", min_width=190)
    return seed, steps, guidance, new_seed


def build_app(session: Session, options: UiOptions) -> gr.Blocks:
    """The page, wired to the session."""
    with gr.Blocks(
        title="DoRA diffusion", analytics_enabled=False, delete_cache=(PREVIEW_SWEEP_SECONDS, PREVIEW_SECONDS)
    ) as demo:
        gr.HTML(f"<h1>DoRA diffusion</h1><p>Base: {escape(options.model)}</p>", elem_id="title")
        prompt, negative, generate, stop = _build_prompt()
        with gr.Row():
            with gr.Column(scale=6, min_width=300, elem_id="stage"):
                stage = build_stage()
            with gr.Column(scale=5, min_width=300):
                seed, steps, guidance, new_seed = _build_settings()
                rack = build_rack(session, demo)
        _wire(session, Form(prompt, negative, seed, steps, guidance, new_seed, generate, stop), rack, stage)
    return demo.queue(api_open=False, default_concurrency_limit=TABS_AT_ONCE)


def _for_the_browser(error: Exception) -> gr.Error:
    """One line: a user's mistake in full; of anything else the kind, while its traceback goes to the terminal."""
    if isinstance(error, ValueError):
        return gr.Error(str(error), print_exception=False)
    return gr.Error(f"{type(error).__name__}; the terminal that runs the app says more")


def _wire(session: Session, form: Form, rack: Rack, stage: Stage) -> None:
    def draw(values: dict[Component, Any], request: gr.Request) -> Iterator[dict[Component, Any]]:
        try:
            wanted = DrawRequest(form.read(values), check_adapters(rack.read(values), session.parts))
            screenplay = Screenplay(stage)
            run = session.start(wanted, owner=str(request.session_hash))
            for update in run.updates():
                yield screenplay.changes(update) | {form.stop: gr.Button(interactive=not update.is_last)}
        except Exception as error:
            yield {form.stop: gr.Button(interactive=False), stage.status: status_html("Nothing was drawn.")}
            raise _for_the_browser(error) from error

    def stop(request: gr.Request) -> None:
        session.stop(str(request.session_hash))

    form.generate.click(
        draw,
        form.inputs | rack.inputs,
        [*stage.outputs, form.stop],
        show_progress="hidden",
        concurrency_limit=TABS_AT_ONCE,
        api_visibility="private",
    )
    form.stop.click(stop, queue=False, api_visibility="private")
    form.new_seed.click(lambda: random.randint(0, MAX_SEED), outputs=form.seed, queue=False, api_visibility="private")


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
    session = Session(pipe, model=options.model, folder=options.adapters, output=options.output)
    demo = build_app(session, options)
    try:
        _, url, _ = demo.launch(
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
            app_kwargs={"middleware": [Middleware(HostGuard, host=options.host)]},
            theme=theme(),
            css=CSS,
            head=CTRL_ENTER,
        )
    except OSError as error:
        raise ValueError(f"port {options.port} of {options.host}: {str(error).splitlines()[0]}") from error
    print(f"DoRA diffusion is at {url} (Ctrl+C ends it)", flush=True)
    if block:
        demo.block_thread()
    return RunningApp(demo, session, url)
