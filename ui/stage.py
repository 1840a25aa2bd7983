"""The stage: base beside blend, a line that says what is going on, and the picture's metadata."""

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from ui.metadata import metadata_text
from ui.run import Update

IDLE = "Ctrl + Enter draws."
PHASES = {
    "waiting": "Waiting for another picture …",
    "loading": "Loading adapters …",
    "blend": "Blend",
    "base": "Base",
    "done": "Done",
    "stopped": "Stopped",
}


@dataclass(frozen=True)
class Stage:
    """The widgets that show a run."""

    status: gr.HTML
    base: gr.Image
    blend: gr.Image
    metadata: gr.Textbox

    @property
    def outputs(self) -> set[Component]:
        """What a run changes."""
        return {self.status, self.base, self.blend, self.metadata}


def status_html(text: str, *, share: float | None = None, kind: str = "") -> str:
    """A line of text, with a progress bar when `share` (0..1) is given."""
    bar = "" if share is None else f'<progress max="1" value="{share:.3f}" aria-label="progress"></progress>'
    return f'<div class="status {kind}" role="status" aria-live="polite"><span>{escape(text)}</span>{bar}</div>'


def _status_of(update: Update) -> str:
    if update.phase in ("blend", "base"):
        text = f"{PHASES[update.phase]}: step {update.step} of {update.total}"
        return status_html(text, share=update.step / max(update.total, 1))
    if update.phase == "done":
        assert update.picture is not None
        return status_html(f"Done in {update.seconds:.1f} s, saved as {update.picture}", kind="good")
    if update.phase == "stopped":
        where = f" at step {update.step} of {update.total}" if update.total else ""
        kept = f"; the blend is saved as {update.picture}" if update.picture else ""
        return status_html(f"Stopped{where} after {update.seconds:.1f} s{kept}", kind="warn")
    return status_html(PHASES[update.phase], share=0.0)


def build_stage() -> Stage:
    """Lay out the stage inside the open block."""
    status = gr.HTML(status_html(IDLE), elem_id="status")
    with gr.Row(elem_id="pictures"):
        base = _picture("Base", "base", "Drawn without adapters")
        blend = _picture("Blend", "blend", "Drawn with the rack's adapters")
    with gr.Accordion("Metadata in the picture's file", open=False, elem_id="metadata-fold"):
        metadata = gr.Textbox(
            show_label=False, container=False, interactive=False, lines=6, max_lines=24, buttons=["copy"],
            elem_id="metadata", placeholder="Appears with the picture.",
        )  # fmt: skip
    return Stage(status, base, blend, metadata)


def _picture(label: str, elem_id: str, alt: str) -> gr.Image:
    # finished pictures are sent as paths and so arrive as the very PNG on disk; previews are encoded anew
    return gr.Image(
        label=label, format="png", type="filepath", interactive=False, buttons=["download", "fullscreen"],
        elem_id=elem_id, min_width=140, alt_text=alt,
    )  # fmt: skip


class Screenplay:
    """Turns the updates of one run into changes of widgets, sending each finished picture once."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._shown: dict[str, Path] = {}

    def changes(self, update: Update) -> dict[Component, Any]:
        """What to send to the browser for this update."""
        stage = self._stage
        changes: dict[Component, Any] = {stage.status: _status_of(update)}
        if update.phase == "loading":
            changes |= {stage.blend: None, stage.metadata: ""} | ({} if update.base else {stage.base: None})
        if update.preview is not None:
            changes[stage.blend if update.phase == "blend" else stage.base] = update.preview
        if self._is_new("base", update.base):
            changes[stage.base] = str(update.base)
        if self._is_new("picture", update.picture):
            changes[stage.blend] = str(update.picture)
            changes[stage.metadata] = metadata_text(update.picture)  # type: ignore[arg-type]
        return changes

    def _is_new(self, name: str, path: Path | None) -> bool:
        if path is None or self._shown.get(name) == path:
            return False
        self._shown[name] = path
        return True
