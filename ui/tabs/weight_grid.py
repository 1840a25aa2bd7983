"""The weight map: adapters against strengths, or one adapter's strengths against another's, cell by cell."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from dora_diffusion.generation.generate import GenerationStopped
from ui.backend.request import Parts, SlotValues
from ui.backend.session import Session
from ui.backend.tags import Resolved, resolve_tags
from ui.errors import user_errors
from ui.generate.controls import Controls, Stops, Values, Variations, picture_html
from ui.generate.stage import status_html
from ui.tabs.axes import parse_range
from ui.tabs.weight_grid_cells import A_B, ADAPTER_WEIGHT, KINDS, MAPS, Axes, Cell, plan, request_of, save_sheet

MAX_FILES = 16

CSS = """
.map-scroll { overflow-x: auto; max-width: 100%; }
.map-scroll .map { border-collapse: separate; border-spacing: .25rem; width: auto; margin: 0; border: 0; }
.map-scroll .map tr { border: 0; }
.map-scroll .map th { font-weight: 600; font-size: .8rem; text-align: left; padding: .1rem .25rem; max-width: 9rem;
  overflow-wrap: break-word; color: var(--body-text-color-subdued); border: 0; }
.map tbody th { position: sticky; left: 0; background: var(--background-fill-primary); z-index: 1; }
.map-scroll .map td { padding: 0; border: 0; }
.map button, .map .pending { display: block; width: clamp(72px, 9vw, 128px); aspect-ratio: 1; padding: 0;
  border: 2px solid transparent; border-radius: .4rem; overflow: hidden; background: var(--background-fill-secondary); }
.map button { cursor: pointer; }
.map button:hover, .map button:focus-visible { border-color: var(--color-accent); outline: none; }
.map td.baseline button { border-color: var(--border-color-primary); border-style: dashed; }
.map img { width: 100%; height: 100%; object-fit: contain; display: block; margin: 0; }
"""
_IDLE = "Each cell is drawn with the form's seed; a click on one loads it into the rack."
_PICK = """
element.addEventListener("click", (event) => {
  const cell = event.target.closest("button[data-cell]");
  if (cell) trigger("click", { cell: Number(cell.dataset.cell) });
});
"""


@dataclass(frozen=True)
class WeightGrid:
    """The widgets of the map.

    `picked` changes when a cell is clicked; `picked_slots(picked, cells)` says then what the rack should hold.
    """

    kind: gr.Radio
    files: gr.Dropdown
    across: gr.Textbox
    down: gr.Textbox
    alone: gr.Checkbox
    draw: gr.Button
    stop: gr.Button
    status: gr.HTML
    sheet: gr.HTML
    file: gr.DownloadButton
    cells: gr.State
    picked: gr.Textbox

    @property
    def inputs(self) -> set[Component]:
        """What decides the axes."""
        return {self.kind, self.files, self.across, self.down, self.alone}

    def read(self, values: Values) -> Axes:
        """What the browser sent, checked; names of adapters are checked by whoever loads them."""
        files = values[self.files] or []
        if not isinstance(files, list) or len(files) > MAX_FILES or not all(isinstance(file, str) for file in files):
            raise ValueError(f"weight map, adapters: got {files!r:.40}, expected at most {MAX_FILES} names")
        kind = values[self.kind]
        down = parse_range(values[self.down], name="weights of A") if kind == A_B else ()
        return Axes(kind, tuple(files), parse_range(values[self.across]), down, bool(values[self.alone]))


def build_weight_grid(session: Session) -> WeightGrid:
    """Lay out the map inside the open block."""
    with gr.Row():
        kind = gr.Radio(list(KINDS), value=ADAPTER_WEIGHT, label="Map", elem_id="map-kind", min_width=220)
        files = gr.Dropdown(
            list(session.library.usable), value=[], multiselect=True, max_choices=MAX_FILES, elem_id="map-files",
            label="Adapters (none: the rack's)", min_width=240,
        )  # fmt: skip
    with gr.Row():
        across = gr.Textbox(
            "-1..1/0.5", label="Weights", info="-1..1/0.25 or 0, .5, 1", max_lines=1, elem_id="map-across",
            min_width=160,
        )  # fmt: skip
        down = gr.Textbox(
            "0.5, 1", label="Weights of A", info="down, while B goes across", max_lines=1, visible=False,
            elem_id="map-down", min_width=160,
        )  # fmt: skip
        alone = gr.Checkbox(False, label="Without the rack's others", elem_id="map-alone", min_width=160)
    with gr.Row():
        draw = gr.Button("Draw map", variant="primary", size="sm", elem_id="map-draw", min_width=110)
        stop = gr.Button("Stop map", variant="stop", size="sm", elem_id="map-stop", min_width=110, interactive=False)
        file = gr.DownloadButton("Save sheet", size="sm", elem_id="map-file", min_width=110, interactive=False)
    status = gr.HTML(status_html(_IDLE), elem_id="map-status")
    sheet = gr.HTML(elem_id="map", js_on_load=_PICK)
    picked = gr.Textbox(visible="hidden", elem_id="map-picked")
    files.focus(
        lambda: gr.Dropdown(list(session.library.usable)), None, files, queue=False, show_progress="hidden",
        api_visibility="private",
    )  # fmt: skip
    return WeightGrid(kind, files, across, down, alone, draw, stop, status, sheet, file, gr.State(()), picked)


def map_html(rows: Sequence[Sequence[Cell]], pictures: Sequence[Path]) -> str:
    """The map as a table; cells that have no picture yet are empty."""
    heads = "".join(f'<th scope="col">{escape(cell.column)}</th>' for cell in rows[0])
    lines, number = [], 0
    for row in rows:
        cells = ""
        for cell in row:
            kind = ' class="baseline"' if cell.is_baseline else ""
            cells += f"<td{kind}>{_cell_html(cell, number, pictures)}</td>"
            number += 1
        lines.append(f'<tr><th scope="row">{escape(row[0].row)}</th>{cells}</tr>')
    return (
        f'<div class="map-scroll" tabindex="0" role="region" aria-label="weight map"><table class="map">'
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell_html(cell: Cell, number: int, pictures: Sequence[Path]) -> str:
    if number >= len(pictures):
        return '<span class="pending"></span>'
    label = escape(f"{cell.label}: load into the rack")
    picture = picture_html(pictures[number], cell.label)
    return f'<button type="button" data-cell="{number}" title="{label}" aria-label="{label}">{picture}</button>'


def picked_slots(picked: object, cells: object) -> tuple[SlotValues, ...]:
    """The rack of the cell that was clicked.

    Args:
        picked: the value of `WeightGrid.picked`.
        cells: that of `WeightGrid.cells`.

    Raises:
        ValueError: no cell of the map that is shown.
    """
    text = picked.partition(":")[0] if isinstance(picked, str) else ""
    known: tuple[tuple[SlotValues, ...], ...] = cells if isinstance(cells, tuple) else ()
    if not (text.isascii() and text.isdigit() and len(text) < 4 and int(text) < len(known)):
        raise ValueError(f"weight map: got {picked!r:.40}, expected one of its {len(known)} cells; draw it again")
    return known[int(text)]


@dataclass(frozen=True)
class _Plan:
    """What will be drawn."""

    axes: Axes
    rows: list[list[Cell]]
    resolved: Resolved
    parts: Parts

    @property
    def cells(self) -> list[Cell]:
        return [cell for row in self.rows for cell in row]

    def pictures(self, draw: Variations) -> Iterator[tuple[Path, ...]]:
        """The cells so far, after each."""
        done: tuple[Path, ...] = ()
        for cell in self.cells:
            done += (draw.draw(request_of(cell, self.resolved, self.parts, alone=self.axes.alone)),)
            yield done


def _planned(board: WeightGrid, session: Session, controls: Controls, values: Mapping[Component, Any]) -> _Plan:
    axes, parts = board.read(values), session.parts
    resolved = resolve_tags(controls.request(values), session.library.usable, parts)
    return _Plan(axes, plan(axes, controls.slots(values)), resolved, parts)


def wire_weight_grid(board: WeightGrid, session: Session, controls: Controls) -> None:
    """Connect the map to the session's drawing."""
    stops = Stops()

    def draw(values: dict[Component, Any], request: gr.Request) -> Iterator[dict[Component, Any]]:
        with user_errors():
            wanted = _planned(board, session, controls, values)
            with stops.running(str(request.session_hash)) as stop:
                yield from _drawing(board, session, wanted, Variations(session, session.output / MAPS, stop))

    def pick(cells: object, event: gr.EventData) -> str:
        with user_errors():
            picked = f"{getattr(event, 'cell', None)}:{time.monotonic_ns()}"  # the same cell again is a change, too
            picked_slots(picked, cells)
            return picked

    def halt(request: gr.Request) -> None:
        stops.stop(str(request.session_hash))

    board.draw.click(
        draw,
        controls.inputs | board.inputs,
        [board.status, board.sheet, board.file, board.cells, board.stop],
        show_progress="hidden",
        api_visibility="private",
    ).then(lambda: gr.Button(interactive=False), outputs=board.stop, queue=False, api_visibility="private")
    board.stop.click(halt, queue=False, api_visibility="private")
    board.sheet.click(pick, board.cells, board.picked, show_progress="hidden", queue=False, api_visibility="private")
    board.kind.input(
        lambda kind: gr.Textbox(visible=kind == A_B), board.kind, board.down, show_progress="hidden", queue=False,
        api_visibility="private",
    )  # fmt: skip


def _drawing(board: WeightGrid, session: Session, wanted: _Plan, draw: Variations) -> Iterator[dict[Component, Any]]:
    """What to send to the browser, cell by cell."""
    started, total = time.monotonic(), len(wanted.cells)
    pictures: tuple[Path, ...] = ()
    yield {
        board.status: status_html(f"Drawing {total} cells …", share=0.0),
        board.sheet: map_html(wanted.rows, ()),
        board.cells: tuple(cell.slots for cell in wanted.cells),
        board.file: gr.DownloadButton(interactive=False),
        board.stop: gr.Button(interactive=True),
    }
    try:
        for pictures in wanted.pictures(draw):
            yield {
                board.status: status_html(f"Cell {len(pictures)} of {total}", share=len(pictures) / total),
                board.sheet: map_html(wanted.rows, pictures),
            }
        file = save_sheet(wanted.rows, pictures, wanted.resolved, wanted.axes, session)
    except GenerationStopped:
        yield {board.status: status_html(f"Stopped after {len(pictures)} of {total} cells", kind="warn")}
        return
    except Exception:
        line = f"Nothing more was drawn: {len(pictures)} of {total} cells are there, and no sheet"
        yield {board.status: status_html(line, kind="bad")}
        raise
    yield {
        board.status: status_html(
            f"{total} cells in {time.monotonic() - started:.1f} s, the sheet is saved as {file}", kind="good"
        ),
        board.file: gr.DownloadButton(value=str(file), interactive=True),
    }
