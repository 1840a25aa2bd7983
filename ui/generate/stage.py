"""The stage: base beside blend or one over the other, what is going on, the batch, and the picture's metadata."""

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from dora_diffusion.generation.png_metadata import metadata_text
from ui.backend.run import Update

IDLE = "Ctrl + Enter draws."
PHASES = {
    "waiting": "Waiting for another picture …",
    "loading": "Loading adapters …",
    "blend": "Blend",
    "base": "Base",
    "done": "Done",
    "stopped": "Stopped",
}
BESIDE, OVER = "Side by side", "Slider"
BLEND = "Blend"

CSS = """
#view { margin: 0; }
#view .wrap { flex-wrap: nowrap; }
#compare { aspect-ratio: 1; }
#compare .image-container, #compare .slider-wrap { height: 100%; }
#compare img { width: 100%; height: 100%; object-fit: contain; }
#batch .grid-wrap, #batch .gallery-container { min-height: 0; height: auto; }
#batch .grid-container { padding-top: 1.9rem; grid-template-columns: repeat(auto-fill, minmax(84px, 1fr));
  grid-template-rows: none; }
#batch .thumbnail-lg { aspect-ratio: 1; height: auto; }
"""


@dataclass(frozen=True)
class Stage:
    """The widgets that show a run. `shown` holds the paths of the batch's pictures, `batch` shows them."""

    status: gr.HTML
    base: gr.Image
    blend: gr.Image
    metadata: gr.Textbox
    compare: gr.ImageSlider
    batch: gr.Gallery
    shown: gr.State

    @property
    def outputs(self) -> set[Component]:
        """What a run changes."""
        return {self.status, self.base, self.blend, self.metadata, self.compare, self.batch, self.shown}


def status_html(text: str, *, share: float | None = None, kind: str = "") -> str:
    """A line of text, with a progress bar when `share` (0..1) is given."""
    bar = "" if share is None else f'<progress max="1" value="{share:.3f}" aria-label="progress"></progress>'
    return f'<div class="status {kind}" role="status" aria-live="polite"><span>{escape(text)}</span>{bar}</div>'


def status_of(update: Update) -> str:
    """One line on a run, with its times when it is done."""
    if update.phase in ("blend", "base"):
        number = f" {len(update.pictures) + 1} of {update.count}" if update.count > len(update.pictures) > 0 else ""
        text = f"{PHASES[update.phase]}{number}: step {update.step} of {update.total}"
        return status_html(text, share=update.step / max(update.total, 1))
    if update.phase == "done":
        assert update.picture is not None
        text = f"Done in {update.seconds:.1f} s{_times(update)}, saved as {update.picture}"
        return status_html(text + _others(update), kind="good")
    if update.phase == "stopped":
        where = f" at step {update.step} of {update.total}" if update.total else ""
        kept = f"; the blend is saved as {update.picture}" if update.picture else ""
        return status_html(f"Stopped{where} after {update.seconds:.1f} s{kept}{_others(update)}", kind="warn")
    if update.phase == "waiting" and update.ahead:
        drawings = "1 drawing is" if update.ahead == 1 else f"{update.ahead} drawings are"
        return status_html(f"Waiting: {drawings} before this one …", share=0.0)
    return status_html(PHASES[update.phase], share=0.0)


def _times(update: Update) -> str:
    parts = {"load": update.load_seconds, "re-weight": update.mix_seconds, "draw": update.draw_seconds}
    spent = [f"{name} {seconds:.2g} s" for name, seconds in parts.items() if seconds >= 0.0005]
    return f" ({', '.join(spent)})" if spent else ""


def _others(update: Update) -> str:
    return f" and {len(update.pictures) - 1} beside it" if len(update.pictures) > 1 else ""


def build_stage() -> Stage:
    """Lay out the stage inside the open block, and wire what needs no session."""
    status = gr.HTML(status_html(IDLE), elem_id="status")
    view = gr.Radio([BESIDE, OVER], value=BESIDE, show_label=False, container=False, elem_id="view")
    with gr.Row(elem_id="pictures") as beside:
        base = _picture("Base", "base", "Drawn without adapters")
        blend = _picture(BLEND, "blend", "Drawn with the rack's adapters")
    compare = gr.ImageSlider(
        label="Base | Blend", format="png", type="filepath", interactive=False, slider_position=50, max_height=1600,
        buttons=["fullscreen"], visible=False, elem_id="compare",
    )  # fmt: skip
    batch = gr.Gallery(
        label="All seeds; pick one to see it large", columns=6, height="auto", object_fit="cover", format="png",
        interactive=False, allow_preview=False, visible=False, elem_id="batch", buttons=[],
    )  # fmt: skip
    with gr.Accordion("Metadata in the picture's file", open=False, elem_id="metadata-fold"):
        metadata = gr.Textbox(
            show_label=False, container=False, interactive=False, lines=6, max_lines=24, buttons=["copy"],
            elem_id="metadata", placeholder="Appears with the picture.",
        )  # fmt: skip
    stage = Stage(status, base, blend, metadata, compare, batch, gr.State(()))
    _wire(stage, view, beside)
    return stage


def _wire(stage: Stage, view: gr.Radio, beside: gr.Row) -> None:
    def look(chosen: object) -> tuple[gr.Row, gr.ImageSlider]:
        return gr.Row(visible=chosen != OVER), gr.ImageSlider(visible=chosen == OVER)

    def pick(shown: object, event: gr.SelectData) -> tuple[Any, Any]:
        paths = shown if isinstance(shown, tuple) else ()
        if not isinstance(event.index, int) or not 0 <= event.index < len(paths):
            return gr.skip(), gr.skip()
        path, is_last = Path(paths[event.index]), event.index + 1 == len(paths)
        label = BLEND if is_last else f"{BLEND} {event.index + 1} of {len(paths)}; the base has the last one's seed"
        return gr.Image(str(path), label=label), metadata_text(path)

    view.input(look, view, [beside, stage.compare], show_progress="hidden", queue=False, api_visibility="private")
    stage.batch.select(
        pick, stage.shown, [stage.blend, stage.metadata], show_progress="hidden", queue=False,
        api_visibility="private",
    )  # fmt: skip


def _picture(label: str, elem_id: str, alt: str) -> gr.Image:
    # finished pictures are sent as paths and so arrive as the very PNG on disk; previews are encoded anew
    return gr.Image(
        label=label, format="png", type="filepath", interactive=False, buttons=["download", "fullscreen"],
        elem_id=elem_id, min_width=140, alt_text=alt,
    )  # fmt: skip


class ProgressView:
    """Turns the updates of one run into changes of widgets, sending each finished picture once."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._sent: dict[str, object] = {}

    def changes(self, update: Update) -> dict[Component, Any]:
        """What to send to the browser for this update."""
        stage = self._stage
        changes: dict[Component, Any] = {stage.status: status_of(update)}
        if update.phase == "loading":
            changes |= {stage.blend: gr.Image(None, label=BLEND), stage.metadata: "", stage.compare: None}
            changes |= {stage.batch: gr.Gallery([], visible=update.count > 1), stage.shown: ()}
            changes |= {} if update.base else {stage.base: None}
        if update.preview is not None:
            changes[stage.blend if update.phase == "blend" else stage.base] = update.preview
        if update.base is not None and self._is_new("base", update.base):
            changes[stage.base] = str(update.base)
        if update.picture is not None and self._is_new("picture", update.picture):
            changes[stage.blend] = str(update.picture)
            changes[stage.metadata] = metadata_text(update.picture)
        return changes | self._at_the_end(update) | self._pair(update) | self._batch(update)

    def _at_the_end(self, update: Update) -> dict[Component, Any]:
        """Both pictures once more: the page loses one now and then that follows a preview closely (gradio 6.31)."""
        if not update.is_last:
            return {}
        stage = self._stage
        pairs = ((stage.base, update.base), (stage.blend, update.picture))
        return {widget: str(path) for widget, path in pairs if path is not None}

    def _pair(self, update: Update) -> dict[Component, Any]:
        """Both pictures for the slider, once there are both: the base is that of the last seed."""
        if not update.is_last or update.base is None or update.picture is None:
            return {}
        pair = (str(update.base), str(update.picture))
        return {self._stage.compare: pair} if self._is_new("pair", pair) else {}

    def _batch(self, update: Update) -> dict[Component, Any]:
        if update.count < 2 or not update.pictures or not self._is_new("pictures", update.pictures):
            return {}
        paths = tuple(str(path) for path in update.pictures)
        # the seed of the first picture is the form's, and each has the one after
        shown = [(path, f"{number} of {update.count}") for number, path in enumerate(paths, start=1)]
        return {self._stage.batch: gr.Gallery(shown, visible=True), self._stage.shown: paths}

    def _is_new(self, name: str, value: object) -> bool:
        if self._sent.get(name) == value:
            return False
        self._sent[name] = value
        return True
