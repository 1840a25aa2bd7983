"""The pictures of a data set in the page: the doctor's report, a gallery, and captions to write."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from dora_diffusion.training.data.doctor import examine, format_report
from dora_diffusion.utils.images import read_image
from ui.backend.checks import check_text, check_whole
from ui.errors import LATEST, wire
from ui.options import UiOptions
from ui.train.data import Captioned, find_dataset, find_picture, list_datasets, list_pictures, save_caption
from ui.train.widgets import report_html

PAGE = 48
THUMBNAIL = 256
_BROKEN_COLOUR = (220, 38, 38)


@dataclass(frozen=True)
class Pictures:
    """The widgets of a data set."""

    dataset: gr.Dropdown
    refresh: gr.Button
    report: gr.HTML
    page: gr.Number
    gallery: gr.Gallery
    picture: gr.Textbox
    caption: gr.Textbox
    save: gr.Button


def build_pictures(options: UiOptions) -> Pictures:
    """Lay out the pictures inside the open block."""
    with gr.Row(elem_classes="rack-head"):
        dataset = gr.Dropdown(
            list(list_datasets(options.datasets)), value=None, label="Pictures", elem_id="train-dataset", min_width=200
        )
        refresh = gr.Button("Refresh", size="sm", scale=0, min_width=90, elem_id="train-refresh")
    report = gr.HTML(elem_id="train-doctor")
    gallery = gr.Gallery(
        label="Pictures and captions", columns=4, height=340, object_fit="contain", allow_preview=False, format="jpeg",
        interactive=False, elem_id="train-gallery", buttons=[],
    )  # fmt: skip
    page = gr.Number(1, label="Page", precision=0, minimum=1, visible=False, elem_id="train-page")
    picture = gr.Textbox(label="Picture", interactive=False, elem_id="train-picture", placeholder="Pick one above.")
    caption = gr.Textbox(label="Caption", lines=2, elem_id="train-caption")
    save = gr.Button("Save caption", size="sm", elem_id="train-save-caption")
    return Pictures(dataset, refresh, report, page, gallery, picture, caption, save)


def wire_pictures(board: Pictures, instance_prompt: gr.Textbox, options: UiOptions) -> None:
    """Connect the widgets to the folders."""
    roots = options.datasets

    def show(dataset: object, prompt: object) -> Iterator[tuple[Any, ...]]:
        folder = find_dataset(dataset, roots)
        yield report_html("Looking …"), *_page_of(folder, 1), "", ""
        yield _doctor(folder, prompt), gr.skip(), gr.skip(), gr.skip(), gr.skip()

    def turn(dataset: object, page: object) -> tuple[Any, ...]:
        return _page_of(find_dataset(dataset, roots), page)

    def select(dataset: object, page: object, event: gr.SelectData) -> tuple[str, str]:
        pictures = list_pictures(find_dataset(dataset, roots))
        index = event.index if isinstance(event.index, int) else -1
        at = (check_whole("page", page, low=1, high=_pages(pictures)) - 1) * PAGE + index
        if not (0 <= index < PAGE and at < len(pictures)):
            raise ValueError("picture: got one that is not in the gallery; press Refresh and pick again")
        return pictures[at].name, pictures[at].caption or ""

    def write(dataset: object, page: object, picture: object, caption: object, prompt: object) -> tuple[Any, ...]:
        folder = find_dataset(dataset, roots)
        save_caption(folder, picture, caption)
        return _doctor(folder, prompt), *_page_of(folder, page), find_picture(folder, picture).caption

    def look_again() -> Any:
        return gr.Dropdown(list(list_datasets(roots)))

    def examine_again(dataset: object, prompt: object) -> Any:
        return _doctor(find_dataset(dataset, roots), prompt) if dataset else gr.skip()

    shown = [board.gallery, board.page]
    wire(instance_prompt.blur, examine_again, [board.dataset, instance_prompt], board.report)
    wire(
        board.dataset.change,
        show,
        [board.dataset, instance_prompt],
        [board.report, *shown, board.picture, board.caption],
        options=LATEST,
    )
    wire(board.page.submit, turn, [board.dataset, board.page], shown)
    wire(board.gallery.select, select, [board.dataset, board.page], [board.picture, board.caption])
    wire(
        board.save.click,
        write,
        [board.dataset, board.page, board.picture, board.caption, instance_prompt],
        [board.report, *shown, board.caption],
    )
    wire(board.refresh.click, look_again, outputs=board.dataset)


def _doctor(folder: Path, prompt: object) -> str:
    """The doctor's report as HTML."""
    try:
        report = examine(folder, instance_prompt=check_text("instance prompt", prompt) or None)
    except ValueError as error:
        return report_html(str(error), bad=True)
    return report_html(format_report(report), bad=bool(report.losses))


def _page_of(folder: Path, page: object) -> tuple[Any, Any]:
    """A page of the gallery, and the widget that turns pages."""
    pictures = list_pictures(folder)
    pages = _pages(pictures)
    number = check_whole("page", page, low=1, high=pages)
    visible = pictures[(number - 1) * PAGE : number * PAGE]
    items = [(_thumbnail(picture.path, picture.path.stat().st_mtime_ns), _label(picture)) for picture in visible]
    turner = gr.Number(value=number, label=f"Page (of {pages}; Enter turns)", maximum=pages, visible=pages > 1)
    return gr.Gallery(items, selected_index=None), turner


def _pages(pictures: list[Captioned]) -> int:
    return max(1, -(-len(pictures) // PAGE))


def _label(picture: Captioned) -> str:
    return f"{picture.name}: {picture.caption or 'no caption of its own'}"


@lru_cache(maxsize=512)
def _thumbnail(path: Path, modified_ns: int) -> Image.Image:
    """A small copy; a red square for what cannot be read, which the doctor explains. The time is the cache's key."""
    try:
        picture = read_image(path)
    except ValueError:
        return Image.new("RGB", (THUMBNAIL // 4, THUMBNAIL // 4), _BROKEN_COLOUR)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return picture
