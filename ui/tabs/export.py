"""Merge and export: the rack as one adapter file, or as a whole model; what was written is drawn and compared."""

from collections.abc import Iterator
from dataclasses import dataclass

import gradio as gr

from dora_diffusion.blending import BLEND_SENTENCES
from dora_diffusion.conversion import TOOLS
from dora_diffusion.formats import FORMATS
from dora_diffusion.generation.generate import GenerationStopped
from ui.backend.checks import check_number, check_whole
from ui.backend.session import Session
from ui.errors import QUICK, EventOptions, wire
from ui.generate.controls import Controls, Stops
from ui.generate.values import Updates, Values
from ui.markup import paragraph, status_html
from ui.tabs.export_files import AS_DRAWN, TARGETS, Exported, ExportOptions, check_options, export_mix

__all__ = ["Export", "ExportOptions", "Exported", "build_export", "export_mix"]

_AS_DRAWN_LABEL = "as in the rack"
_FOR = "for:"  # before a tool among the formats


@dataclass(frozen=True)
class Export:
    """The tab.

    Attributes:
        go, stop: begin and end an export.
        exported: a hidden widget that holds the library name of the adapter written last; its `change` tells of one.
        status: what is going on, and what came of it.
        live, again: the rack's own picture, and the one drawn with what was written.
    """

    go: gr.Button
    stop: gr.Button
    exported: gr.Textbox
    status: gr.HTML
    live: gr.Image
    again: gr.Image


@dataclass(frozen=True)
class _Fields:
    name: gr.Textbox
    target: gr.Radio
    mode: gr.Dropdown
    format: gr.Dropdown
    rank: gr.Number
    density: gr.Slider

    def read(self, values: Values) -> ExportOptions:
        chosen = str(values[self.format])
        is_tool = chosen.startswith(_FOR)
        return check_options(
            ExportOptions(
                name=values[self.name],
                target=values[self.target],
                mode=values[self.mode],
                format="diffusers" if is_tool else chosen,
                tool=chosen.removeprefix(_FOR) if is_tool else "",
                rank=check_whole("rank", values[self.rank] or 0, low=0, high=4096) or None,
                density=check_number("density", values[self.density], low=0.01, high=1.0),
            )
        )


def build_export(session: Session, controls: Controls) -> Export:
    """Lay out the tab inside the open block and wire it."""
    fields = _build_fields()
    sentence = gr.HTML(_sentence(AS_DRAWN), elem_id="export-sentence")
    wire(fields.mode.input, _sentence, fields.mode, sentence, options=QUICK)
    with gr.Row():  # always enabled: gradio may lose an update that follows another closely
        go = gr.Button("Export", variant="primary", elem_id="export-go", min_width=160)
        stop = gr.Button("Stop export", variant="stop", elem_id="export-stop", min_width=110)
    status = gr.HTML(elem_id="export-status")
    with gr.Row():
        live, again = (
            gr.Image(
                label=label, format="png", type="filepath", interactive=False, elem_id=elem_id, min_width=140,
                buttons=["download", "fullscreen"],
            )
            for label, elem_id in (("The rack", "export-live"), ("What was written", "export-again"))
        )  # fmt: skip
    export = Export(go, stop, gr.Textbox(visible=False, elem_id="exported"), status, live, again)
    _wire(export, fields, session, controls)
    return export


def _wire(export: Export, fields: _Fields, session: Session, controls: Controls) -> None:
    stops = Stops()

    def run(values: Values, request: gr.Request) -> Iterator[Updates]:
        yield {
            export.status: status_html("Drawing, writing, and drawing with what was written …"),
            **{export.live: None, export.again: None},
        }
        try:
            with stops.running(str(request.session_hash)) as stop:
                done = export_mix(session, controls.request(values), fields.read(values), should_stop=stop.is_set)
        except GenerationStopped:
            yield {export.status: status_html("Stopped; nothing was exported.", kind="warn")}
            return
        except Exception:
            yield {export.status: status_html("Nothing was exported.")}
            raise
        live, again = (str(path) for path in done.pictures)
        changes = {export.status: status_html(done.sentence, kind="good"), export.live: live, export.again: again}
        yield changes | ({export.exported: done.name} if done.name else {})

    wire(
        export.go.click,
        run,
        controls.inputs | {getattr(fields, name) for name in fields.__dataclass_fields__},
        [export.status, export.live, export.again, export.exported],
        options=EventOptions(concurrency_limit=2),
    )
    wire(export.stop.click, stops.halt, options=QUICK)


def _build_fields() -> _Fields:
    with gr.Row():
        name = gr.Textbox(label="Name", placeholder="ink-and-lego", elem_id="export-name", min_width=160)
        target = gr.Radio(list(TARGETS), value=TARGETS[0], label="Write", elem_id="export-target", min_width=200)
    with gr.Row():
        modes = [(_AS_DRAWN_LABEL, AS_DRAWN), *((mode, mode) for mode in BLEND_SENTENCES)]
        mode = gr.Dropdown(modes, value=AS_DRAWN, label="Mode", elem_id="export-mode", min_width=160)
        tools = [(f"for {tool.title}", f"{_FOR}{name}") for name, tool in TOOLS.items()]
        formats = [(name, name) for name in FORMATS]
        format = gr.Dropdown(
            [*formats, *tools], value="diffusers", label="Format, or tool", elem_id="export-format", min_width=140
        )
        rank = gr.Number(
            value=0, precision=0, minimum=0, label="Rank (0: the sum)", elem_id="export-rank", min_width=120
        )
        density = gr.Slider(
            0.05, 1.0, value=0.5, step=0.05, label="Density (ties, dare, pruning)", elem_id="export-density",
            min_width=180,
        )  # fmt: skip
    return _Fields(name, target, mode, format, rank, density)


def _sentence(mode: object) -> str:
    return paragraph(BLEND_SENTENCES.get(str(mode), "Writes the mode that the rack draws with."), "kept")
