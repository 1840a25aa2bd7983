"""What does each adapter do? The same mix and seed, drawn without each in turn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image, ImageChops, ImageStat

from dora_diffusion.generation.generate import GenerationStopped
from ui.backend.request import DrawRequest, SlotValues, taking_part
from ui.backend.session import Session
from ui.backend.tags import resolve_tags
from ui.errors import user_errors
from ui.generate.controls import Controls, Stops, Variations, picture_html
from ui.generate.stage import status_html

WITHOUT = "without"  # the folder of these pictures in the output folder

CSS = """
.leave-out { display: flex; gap: .6rem; overflow-x: auto; padding-bottom: .3rem; }
.leave-out figure { flex: 0 0 clamp(110px, 22%, 190px); margin: 0; }
.leave-out img { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: .4rem; margin: 0; }
.leave-out figcaption { font-size: .8rem; overflow-wrap: anywhere; }
.leave-out figcaption small { color: var(--body-text-color-subdued); display: block; }
"""


@dataclass(frozen=True)
class LeaveOneOut:
    """The widgets of the row."""

    draw: gr.Button
    stop: gr.Button
    status: gr.HTML
    row: gr.HTML


@dataclass(frozen=True)
class Without:
    """One picture of the row: its caption, and how far it is from the whole mix (None for the mix itself)."""

    caption: str
    picture: Path
    difference: float | None


def build_leave_one_out() -> LeaveOneOut:
    """Lay out the row inside the open block."""
    with gr.Row():
        draw = gr.Button("What does each adapter do?", size="sm", elem_id="leave-out", min_width=190)
        stop = gr.Button("Stop", size="sm", elem_id="leave-out-stop", min_width=70, visible=False)
    status = gr.HTML(elem_id="leave-out-status")
    return LeaveOneOut(draw, stop, status, gr.HTML(elem_id="leave-out-row"))


def mean_difference(one: Path, other: Path) -> float:
    """Mean absolute difference of two pictures of one size, over pixels and colours, 0 to 255."""
    with Image.open(one) as first, Image.open(other) as second:
        apart = ImageChops.difference(first.convert("RGB"), second.convert("RGB"))
    return sum(ImageStat.Stat(apart).mean) / 3


def leave_each_out(request: DrawRequest, names: Sequence[str], draw: Variations) -> Iterator[tuple[Without, ...]]:
    """The mix, then the mix without each adapter: the row so far, after each.

    Args:
        request: the mix; its adapters in order.
        names: what to call them.
        draw: draws and saves.

    Raises:
        ValueError: there is no adapter to leave out.
        GenerationStopped: a stop was asked for.
    """
    if not request.adapters:
        raise ValueError("nothing to leave out: the mix has no adapter at a strength other than 0; add one to the rack")
    whole = draw.draw(request)
    row: tuple[Without, ...] = (Without("all of them", whole, None),)
    yield row
    for index, name in enumerate(names):
        rest = (*request.adapters[:index], *request.adapters[index + 1 :])
        picture = draw.draw(replace(request, adapters=rest))
        row += (Without(f"without {name}", picture, mean_difference(whole, picture)),)
        yield row


def names_in(request: DrawRequest, slots: Sequence[SlotValues]) -> list[str]:
    """ "#2 lego" for an adapter of the rack's second slot; those of the prompt's tags by name alone."""
    heard = [id(slot) for slot in taking_part(slots)]
    places = {slot.file: number for number, slot in enumerate(slots, start=1) if id(slot) in heard}
    return [
        f"#{places[choice.file]} {choice.file}" if choice.file in places else f"{choice.file} (of the prompt)"
        for choice in request.adapters
    ]


def row_html(row: Sequence[Without]) -> str:
    """The pictures with their captions."""
    figures = "".join(
        f"<figure>{picture_html(entry.picture, entry.caption)}<figcaption>{escape(entry.caption)}"
        f"<small>{_told(entry.difference)}</small></figcaption></figure>"
        for entry in row
    )
    return f'<div class="leave-out" tabindex="0" role="region" aria-label="leave one out">{figures}</div>'


def _told(difference: float | None) -> str:
    if difference is None:
        return "the mix"
    return f"mean difference {difference:.1f} of 255" if difference else "no difference"


def wire_leave_one_out(board: LeaveOneOut, session: Session, controls: Controls) -> None:
    """Connect the row to the session's drawing."""
    stops = Stops()

    def draw(values: dict[Component, Any], request: gr.Request) -> Iterator[dict[Component, Any]]:
        with user_errors(), stops.running(str(request.session_hash)) as stop:
            asked = replace(controls.request(values), count=1)
            wanted = resolve_tags(asked, session.library.usable, session.parts).request
            yield from _drawing(
                board, wanted, names_in(wanted, controls.slots(values)),
                Variations(session, session.output / WITHOUT, stop),
            )  # fmt: skip

    def halt(request: gr.Request) -> None:
        stops.stop(str(request.session_hash))

    board.draw.click(
        draw,
        {*controls.inputs},
        [board.stop, board.status, board.row],
        show_progress="hidden",
        api_visibility="private",
    ).then(lambda: gr.Button(visible=False), outputs=board.stop, queue=False, api_visibility="private")
    board.stop.click(halt, queue=False, api_visibility="private")


def _drawing(
    board: LeaveOneOut, wanted: DrawRequest, names: Sequence[str], draw: Variations
) -> Iterator[dict[Component, Any]]:
    total = len(names) + 1
    row: tuple[Without, ...] = ()
    yield {board.status: status_html("Drawing …", share=0.0), board.stop: gr.Button(visible=True), board.row: ""}
    try:
        for row in leave_each_out(wanted, names, draw):
            line = status_html(f"Picture {len(row)} of {total}", share=len(row) / total)
            yield {board.status: line, board.row: row_html(row)}
    except GenerationStopped:
        yield {board.status: status_html("Stopped.", kind="warn")}
        return
    except Exception:
        yield {board.status: status_html(f"Nothing more was drawn: {len(row)} of {total} pictures", kind="bad")}
        raise
    furthest = max(row[1:], key=lambda entry: entry.difference or 0)
    yield {board.status: status_html(f"The mix changes most {furthest.caption}.", kind="good")}
