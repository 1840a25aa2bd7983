"""The Inspect page: a file's facts, what it does to the base block by block, and how two adapters get on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.formats import load_adapter
from dora_diffusion.inspection.plots import plot_adapters
from dora_diffusion.inspection.report import inspect_adapter
from ui.backend.interference import interference_html, measure
from ui.backend.session import Session
from ui.errors import user_errors
from ui.generate.stage import status_html
from ui.tabs.inspect_html import CSS, facts_html

__all__ = ["CSS", "InspectPage", "build_inspect_page"]

PLOTS = "plots"  # their folder in the output folder


@dataclass(frozen=True)
class InspectPage:
    """The widgets of the page."""

    file: gr.Dropdown
    beside: gr.Dropdown
    refresh: gr.Button
    plot: gr.Button
    compare: gr.Button
    status: gr.HTML
    facts: gr.HTML
    picture: gr.Image
    interference: gr.HTML


def build_inspect_page(session: Session) -> InspectPage:
    """Lay out the page inside the open block and wire it to the session."""
    names = list(session.library.usable)
    with gr.Row():
        file = gr.Dropdown(names, value=None, label="Adapter", elem_id="inspect-file", min_width=200)
        beside = gr.Dropdown(names, value=None, label="Beside it", elem_id="inspect-beside", min_width=200)
    with gr.Row():
        plot = gr.Button("Plot its changes", size="sm", elem_id="inspect-plot", min_width=120)
        compare = gr.Button("Measure interference", size="sm", elem_id="inspect-compare", min_width=120)
        refresh = gr.Button("Refresh", size="sm", elem_id="inspect-refresh", min_width=90)
    status = gr.HTML(elem_id="inspect-status")
    facts = gr.HTML(elem_id="inspect-facts")
    picture = gr.Image(
        label="Turned and stretched, by block", show_label=False, format="png", type="filepath", interactive=False,
        visible=False, elem_id="inspect-picture", buttons=["download", "fullscreen"],
    )  # fmt: skip
    interference = gr.HTML(elem_id="inspect-meter")
    page = InspectPage(file, beside, refresh, plot, compare, status, facts, picture, interference)
    _wire(page, session)
    return page


def facts_of(session: Session, name: object) -> str:
    """A library file's facts as HTML, matched against the base; a ValueError of one line when it is broken."""
    file = session.library.find(name)  # type: ignore[arg-type]  # it refuses what is no name
    with session.weights() as base:
        return facts_html(file.name, inspect_adapter(file.path, base=base))


def plot_of(session: Session, names: tuple[str, ...]) -> Path:
    """A picture of what library files do to the base, as a PNG in the output folder.

    Raises:
        ValueError: a file that is broken or not for this base, or no matplotlib.
    """
    files = [session.library.find(name) for name in names]
    folder = session.output / PLOTS
    folder.mkdir(parents=True, exist_ok=True)
    stem = "+".join(file.name.rstrip("/").replace("/", "_") for file in files)[:100]
    with session.weights() as base:
        states = {file.name: load_adapter(file.path, base=base) for file in files}
        return plot_adapters(states, base, folder / f"{stem}.png")


def interference_of(session: Session, names: tuple[str, ...]) -> str:
    """The interference of library files on the base, as HTML.

    Raises:
        ValueError: not two different files, or one that is broken or not for this base.
    """
    if len(set(names)) < 2:
        raise ValueError("interference: got one adapter, expected two; pick another one beside it")
    return interference_html(measure(session, names))


def _wire(page: InspectPage, session: Session) -> None:
    def show(file: object) -> Iterator[tuple[str, str, Any, str]]:
        with user_errors():
            yield status_html("Reading …"), "", gr.Image(value=None, visible=False), ""
            yield "", facts_of(session, file) if file else "", gr.skip(), gr.skip()

    def plot(file: object, beside: object) -> Iterator[tuple[str, Any]]:
        with user_errors():
            names = _names(file, beside)
            yield status_html("Measuring every row …"), gr.skip()
            picture = plot_of(session, names)
            yield "", gr.Image(str(picture), visible=True)

    def compare(file: object, beside: object) -> Iterator[tuple[str, str]]:
        with user_errors():
            names = _names(file, beside)
            yield status_html("Measuring every layer …"), ""
            yield "", interference_of(session, names)

    def look_again() -> tuple[gr.Dropdown, gr.Dropdown]:
        session.library.refresh()
        names = list(session.library.usable)
        return gr.Dropdown(names), gr.Dropdown(names)

    pair = [page.file, page.beside]
    page.file.input(
        show, page.file, [page.status, page.facts, page.picture, page.interference], show_progress="hidden",
        trigger_mode="always_last", api_visibility="private",
    ).then(lambda: "", outputs=page.status, queue=False, api_visibility="private")  # fmt: skip
    for button, handler, output in ((page.plot, plot, page.picture), (page.compare, compare, page.interference)):
        button.click(
            handler, pair, [page.status, output], show_progress="hidden", concurrency_limit=1,
            api_visibility="private",
        ).then(lambda: "", outputs=page.status, queue=False, api_visibility="private")  # fmt: skip
    page.refresh.click(look_again, outputs=pair, show_progress="hidden", queue=False, api_visibility="private")


def _names(file: object, beside: object) -> tuple[str, ...]:
    """The picked names; that they are names of the library is for the library to say."""
    names = tuple(dict.fromkeys(str(name) for name in (file, beside) if name))
    if not names:
        raise ValueError("pick an adapter first")
    return names
