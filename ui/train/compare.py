"""Checkpoints in the page: one into the library and the rack, or all of them drawn beside one another."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.generation.generate import GenerationStopped
from ui.backend.request import DrawRequest, check_settings
from ui.backend.session import Session
from ui.errors import QUICK, EventOptions, wire
from ui.generate.controls import Stops
from ui.markup import status_html
from ui.options import UiOptions
from ui.train.grid import CheckpointCell, DrawPicture, check_weights, draw_grid
from ui.train.runs import find_run, run_config, send_to_library

GUIDANCE = 4.0
GRIDS = "grids"  # their folder in the output folder


@dataclass(frozen=True)
class Compare:
    """The widgets of a run's checkpoints; `sent` holds the library name of the one that was sent last."""

    checkpoint: gr.Dropdown
    name: gr.Textbox
    send: gr.Button
    sent: gr.Textbox
    sent_line: gr.HTML
    prompt: gr.Textbox
    weights: gr.Textbox
    steps: gr.Slider
    seed: gr.Number
    draw: gr.Button
    stop: gr.Button
    status: gr.HTML
    cells: gr.Gallery
    rows: gr.State


def build_compare() -> Compare:
    """Lay out the checkpoints inside the open block."""
    with gr.Row():
        checkpoint = gr.Dropdown([], label="Checkpoint", elem_id="train-checkpoint", min_width=140)
        name = gr.Textbox(
            label="Name in the library (empty: run and step)", max_lines=1, elem_id="train-library-name", min_width=180
        )
    send = gr.Button("Send checkpoint to rack", size="sm", elem_id="train-send")
    sent = gr.Textbox(visible="hidden", elem_id="train-sent")
    sent_line = gr.HTML(elem_id="train-sent-line")
    with gr.Accordion("Checkpoints × weights", open=False, elem_id="train-grid-fold"):
        prompt = gr.Textbox(label="Prompt (empty: the run's first sample prompt)", elem_id="train-grid-prompt")
        with gr.Row():
            weights = gr.Textbox("0.5, 1", label="Weights", max_lines=1, elem_id="train-grid-weights", min_width=120)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="train-grid-seed", min_width=110)
            steps = gr.Slider(1, 100, 20, step=1, label="Steps", elem_id="train-grid-steps", min_width=160)
        with gr.Row():
            draw = gr.Button("Draw grid", size="sm", elem_id="train-grid-draw", min_width=110)
            stop = gr.Button("Stop drawing", size="sm", elem_id="train-grid-stop", min_width=110)
        status = gr.HTML(elem_id="train-grid-status")
        cells = gr.Gallery(
            label="A row for each checkpoint, the base first; pick a picture to choose its checkpoint", columns=3,
            object_fit="contain", format="png", interactive=False, elem_id="train-grid", buttons=["fullscreen"],
        )  # fmt: skip
    return Compare(
        checkpoint, name, send, sent, sent_line, prompt, weights, steps, seed, draw, stop, status, cells, gr.State(())
    )


def wire_compare(board: Compare, run: gr.Dropdown, session: Session, options: UiOptions) -> None:
    """Connect the widgets to the library and to the session's drawing."""
    _wire_send(board, run, session, options)
    stops = Stops()

    def draw(
        chosen: object, prompt: object, weights: object, steps: object, seed: object, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        folder = find_run(options.runs, chosen)
        values = check_weights(weights)
        settings = check_settings(prompt or _first_prompt(folder), "", seed, steps, GUIDANCE)
        with stops.running(str(request.session_hash)) as stop:
            yield gr.Gallery([], columns=1 + len(values)), (), status_html("Drawing the base …")
            cells: tuple[CheckpointCell, ...] = ()
            try:
                for cells in draw_grid(folder, session.library, settings, values, _drawer(session, stop)):
                    yield _shown(cells), _steps(cells), status_html(f"{cells[-1].label}: drawn")
            except GenerationStopped:
                yield gr.skip(), gr.skip(), status_html("Stopped.", kind="warn")
                return
        yield _shown(cells), _steps(cells), status_html(f"{len(cells)} pictures", kind="good")

    def pick(rows: object, event: gr.SelectData) -> Any:
        steps = rows if isinstance(rows, tuple) else ()
        known = isinstance(event.index, int) and 0 <= event.index < len(steps)
        return gr.Dropdown(value=steps[event.index]) if known else gr.skip()

    wire(
        board.draw.click,
        draw,
        [run, board.prompt, board.weights, board.steps, board.seed],
        [board.cells, board.rows, board.status],
    )
    wire(board.stop.click, stops.halt, options=QUICK)
    wire(board.cells.select, pick, board.rows, board.checkpoint)


def _wire_send(board: Compare, run: gr.Dropdown, session: Session, options: UiOptions) -> None:
    def send(chosen: object, step: object, name: object) -> Iterator[tuple[str, str]]:
        folder = find_run(options.runs, chosen)
        yield "", status_html("Copying …")  # so that the same name again is a change, too
        sent = send_to_library(folder, step, session.library, name=name)
        yield sent, status_html(f"{sent} is in the library.", kind="good")

    wire(
        board.send.click,
        send,
        [run, board.checkpoint, board.name],
        [board.sent, board.sent_line],
        options=EventOptions(concurrency_limit=1),
    )


def _drawer(session: Session, stop: threading.Event) -> DrawPicture:
    """Draws one picture, and raises GenerationStopped once it should not."""

    def draw(request: DrawRequest) -> Path:
        if stop.is_set():
            raise GenerationStopped
        (drawn,) = session.draw(request, should_stop=stop.is_set)
        return session.save(drawn, session.output / GRIDS)

    return draw


def _first_prompt(run: Path) -> str:
    config = run_config(run)
    return next((one.prompt for one in config.preview.prompts), config.data.instance_prompt or "")


def _shown(cells: tuple[CheckpointCell, ...]) -> list[tuple[str, str]]:
    return [(str(cell.picture), cell.label) for cell in cells]


def _steps(cells: tuple[CheckpointCell, ...]) -> tuple[int, ...]:
    return tuple(cell.step for cell in cells)
