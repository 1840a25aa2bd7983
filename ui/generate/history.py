"""What was drawn: the output folder as a gallery, newest first; a picture brings back its recipe, or meets another."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image

from dora_diffusion.generation.png_metadata import metadata_text, read_metadata
from ui.backend.picture_difference import largest_difference
from ui.backend.request import check_whole
from ui.backend.session import Session
from ui.errors import user_errors
from ui.generate.controls import Controls
from ui.generate.restore import restore_from, restored_updates

PAGE = 24
MAX_PAGE = 1_000_000
CSS = """
#history-gallery { min-height: 14rem; }
#history-nav { align-items: center; flex-wrap: wrap; }
#history-compare { max-width: 640px; }
#history-place { flex: 1 1 180px !important; min-width: 180px !important; }
"""


@dataclass(frozen=True)
class Page:
    """A part of the output folder.

    Attributes:
        names: of its pictures, newest first.
        number: the page's, from 0, never beyond the last.
        pages: how many there are, at least 1.
        found: how many pictures there are on all of them.
    """

    names: tuple[str, ...]
    number: int
    pages: int
    found: int

    def sentence(self) -> str:
        """Where one is."""
        if not self.found:
            return "Nothing is drawn yet."
        return f"{self.found} picture{'' if self.found == 1 else 's'}, page {self.number + 1} of {self.pages}"


def list_pictures(output: Path, page: object = 0) -> Page:
    """The PNGs of the output folder itself, newest first; hidden ones and links are left out.

    Raises:
        ValueError: the page is no whole number from 0.
    """
    number = check_whole("page", page, low=0, high=MAX_PAGE)
    found: list[tuple[int, str]] = []
    try:
        with os.scandir(output) as items:
            for item in items:
                is_shown = item.name.lower().endswith(".png") and not item.name.startswith(".")
                if is_shown and item.is_file(follow_symlinks=False):
                    found.append((item.stat().st_mtime_ns, item.name))
    except FileNotFoundError:
        pass
    found.sort(reverse=True)
    pages = max(1, -(-len(found) // PAGE))
    number = min(number, pages - 1)
    names = tuple(name for _, name in found[number * PAGE : (number + 1) * PAGE])
    return Page(names, number, pages, len(found))


def find_picture(output: Path, name: object) -> Path:
    """A picture of the output folder by its name.

    Raises:
        ValueError: a name with a folder in it, or of no PNG that is there.
    """
    is_name = isinstance(name, str) and name == os.path.basename(name) and name.lower().endswith(".png")
    if not is_name or str(name).startswith(".") or "\x00" in str(name):
        raise ValueError(f"picture: got {str(name)[:60]!r}, expected one of the history")
    path = output / str(name)
    if not path.is_file() or path.is_symlink():
        raise ValueError(f"{name}: the picture is gone; look again")
    return path


def described(path: Path) -> str:
    """A picture's adapters and settings in a few lines, as HTML; what its file does not say is told as such."""
    try:
        record = read_metadata(path)
    except ValueError as error:
        return f'<p class="kept">{escape(str(error))}</p>'
    if record is None:
        return f'<p class="kept"><b>{escape(path.name)}</b> does not tell what it was made of.</p>'
    adapters = "".join(
        f'<span class="chip">{escape(use.name)} {escape(_weight_text(use.weight))}</span>' for use in record.adapters
    )
    settings = record.settings
    told_of = f"seed {settings.seed}, {settings.steps} steps, guidance {settings.guidance_scale:g}, {settings.sampler}"
    return (
        f'<div class="kept"><p><b>{escape(path.name)}</b> · {escape(record.model)} · {escape(record.blend)}</p>'
        f"<p>{escape(settings.prompt)}</p><p>{escape(told_of)}</p>{adapters}</div>"
    )


def _weight_text(weight: float | Mapping[str, float]) -> str:
    if isinstance(weight, Mapping):
        return ", ".join(f"{part} {value:g}" for part, value in weight.items())
    return f"{weight:g}"


@dataclass(frozen=True)
class History:
    """The widgets of the history. `names` and `chosen` stay on the server, so no browser can name a file."""

    gallery: gr.Gallery
    page: gr.Number
    place: gr.HTML
    facts: gr.HTML
    report: gr.HTML
    metadata: gr.Textbox
    compare: gr.ImageSlider
    names: gr.State
    chosen: gr.State
    pinned: gr.State


def build_history(session: Session, controls: Controls, demo: gr.Blocks) -> History:
    """Lay out the gallery inside the open block and wire it to the form and the rack."""
    with gr.Row(elem_id="history-nav"):
        look = gr.Button("Look again", size="sm", elem_id="history-refresh", min_width=100)
        newer = gr.Button("Newer", size="sm", elem_id="history-newer", min_width=70)
        older = gr.Button("Older", size="sm", elem_id="history-older", min_width=70)
        place = gr.HTML(elem_id="history-place", min_width=180)
    gallery = gr.Gallery(
        format="png", columns=6, height="auto", allow_preview=False, interactive=False, show_label=False,
        object_fit="contain", fit_columns=False, elem_id="history-gallery", buttons=[],
    )  # fmt: skip
    facts = gr.HTML(elem_id="history-facts")
    with gr.Row():
        restore = gr.Button("Restore", variant="primary", size="sm", elem_id="history-restore", min_width=100)
        pin = gr.Button("Compare the next with this", size="sm", elem_id="history-pin", min_width=180)
    report = gr.HTML(elem_id="history-report")
    compare = gr.ImageSlider(
        format="png", type="filepath", interactive=False, visible=False, label="Compare", elem_id="history-compare",
        buttons=["fullscreen"],
    )  # fmt: skip
    with gr.Accordion("Metadata in the picture's file", open=False, elem_id="history-metadata-fold"):
        metadata = gr.Textbox(
            show_label=False, container=False, interactive=False, lines=6, max_lines=24, elem_id="history-metadata"
        )
    page = gr.Number(0, visible=False, elem_id="history-page")
    names, chosen, pinned = gr.State(()), gr.State(None), gr.State(None)
    history = History(gallery, page, place, facts, report, metadata, compare, names, chosen, pinned)
    _wire_pages(history, session, [look.click, demo.load], (newer, older))
    _wire_picture(history, session, controls, restore=restore, pin=pin)
    return history


def _wire_pages(history: History, session: Session, looks: list[Any], turns: tuple[gr.Button, gr.Button]) -> None:
    def show(page: object, step: int) -> dict[Component, Any]:
        with user_errors():
            wanted = check_whole("page", page, low=0, high=MAX_PAGE) + step
            found = list_pictures(session.output, max(0, wanted))
        return {
            history.gallery: gr.Gallery([str(session.output / name) for name in found.names], selected_index=None),
            history.page: found.number,
            history.names: found.names,
            history.place: f'<p class="kept">{escape(found.sentence())}</p>',
        }

    outputs = [history.gallery, history.page, history.names, history.place]
    for look in looks:
        look(lambda page: show(page, 0), history.page, outputs, show_progress="hidden", api_visibility="private")
    for button, step in zip(turns, (-1, 1), strict=True):
        button.click(
            lambda page, step=step: show(page, step),
            history.page, outputs, show_progress="hidden", api_visibility="private",
        )  # fmt: skip


def _wire_picture(
    history: History, session: Session, controls: Controls, *, restore: gr.Button, pin: gr.Button
) -> None:
    def select(names: tuple[str, ...], pinned: str | None, event: gr.SelectData) -> dict[Component, Any]:
        with user_errors():
            index = check_whole("picture", event.index, low=0, high=max(0, len(names) - 1))
            if not names:
                raise ValueError("picture: the history is empty")
            path = find_picture(session.output, names[index])
            changes = {history.chosen: path.name, history.facts: described(path), history.metadata: metadata_text(path)}
            return changes | _compared(history, session, pinned, path)

    def bring_back(chosen: str | None) -> dict[Component, Any]:
        with user_errors():
            if chosen is None:
                raise ValueError("press a picture first")
            session.library.refresh()
            path = find_picture(session.output, chosen)
            restored = restore_from(path, session.library, session.parts, output=session.output)
            return restored_updates(restored, controls, session, history.report)

    def keep(chosen: str | None) -> tuple[str, str]:
        with user_errors():
            if chosen is None:
                raise ValueError("press a picture first")
        return chosen, f'<p class="kept">Press another picture to compare it with {escape(chosen)}.</p>'

    history.gallery.select(
        select, [history.names, history.pinned],
        [history.chosen, history.facts, history.metadata, history.compare, history.report],
        show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    restore.click(bring_back, history.chosen, [*controls.outputs, history.report], api_visibility="private")
    pin.click(keep, history.chosen, [history.pinned, history.report], queue=False, api_visibility="private")


def _compared(history: History, session: Session, pinned: str | None, path: Path) -> dict[Component, Any]:
    if pinned is None or pinned == path.name:
        return {history.compare: gr.ImageSlider(visible=False), history.report: ""}
    other = find_picture(session.output, pinned)
    with Image.open(other) as first, Image.open(path) as second:
        if first.size != second.size:
            line = "They are not of one size."
        else:
            line = f"Largest difference {largest_difference(first, second)} of 255."
    pair = gr.ImageSlider((str(other), str(path)), visible=True, label=f"{pinned} | {path.name}")
    return {history.compare: pair, history.report: f'<p class="kept" role="status">{escape(line)}</p>'}
