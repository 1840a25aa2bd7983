"""The whole page: where its parts stand, and what they tell one another."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
from gradio.components import Component

from ui.backend.session import Session
from ui.errors import user_errors
from ui.generate.controls import Controls
from ui.generate.form import Form, build_form, build_prompt
from ui.generate.history import build_history
from ui.generate.presets import build_presets
from ui.generate.rack import Rack, build_rack
from ui.generate.restore import build_restore
from ui.generate.stage import ProgressView, Stage, build_stage, status_html
from ui.library.browser import Browser, add_word, build_browser
from ui.options import UiOptions
from ui.server.api import add_api
from ui.tabs.export import build_export
from ui.tabs.inspect_page import build_inspect_page
from ui.tabs.leave_one_out import build_leave_one_out, wire_leave_one_out
from ui.tabs.weight_grid import WeightGrid, build_weight_grid, picked_slots, wire_weight_grid
from ui.train.tab import Train, build_train

TABS_AT_ONCE = 8
NEWS_SECONDS = 3
_LOOK_AGAIN = "() => { document.querySelector('#history-refresh')?.click(); }"
Values = Mapping[Component, Any]
Updates = Mapping[Component, Any]


@dataclass(frozen=True)
class Page:
    """What the app needs of the page after it is built.

    Attributes:
        train: the tab whose process ends with the app.
    """

    train: Train


def build_page(session: Session, options: UiOptions, demo: gr.Blocks) -> Page:
    """Lay out the page inside the open block, wired to the session."""
    with gr.Sidebar(open=True, width=330, elem_id="sidebar"):
        model, news = _build_model(session)
        browser = build_browser(session, demo)
    above = build_prompt()
    with gr.Row():
        with gr.Column(scale=6, min_width=300, elem_id="stage"):
            stage = build_stage()
            leave_one_out = build_leave_one_out()
        with gr.Column(scale=5, min_width=300):
            form = build_form(session, above, demo)
            rack = build_rack(session, demo)
    controls = Controls(session, model, form, rack)
    with gr.Tabs(elem_id="tabs"):
        with gr.Tab("History", elem_id="tab-history") as history:
            build_presets(session, controls)
            build_history(session, controls, demo)
            build_restore(session, controls)
        with gr.Tab("Weight map", elem_id="tab-map"):
            board = build_weight_grid(session)
        with gr.Tab("Merge", elem_id="tab-merge"):
            export = build_export(session, controls)
        with gr.Tab("Train", elem_id="tab-train"):
            train = build_train(session, options)
        with gr.Tab("Inspect", elem_id="tab-inspect"):
            build_inspect_page(session)
    history.select(None, js=_LOOK_AGAIN, queue=False, api_visibility="private")
    _wire_draw(session, controls, stage)
    wire_leave_one_out(leave_one_out, session, controls)
    wire_weight_grid(board, session, controls)
    _wire_map(board, rack)
    _wire_browser(browser, form, rack)
    _wire_new_files(session, train.sent, export.exported, rack)
    _wire_model(session, model, news, form, rack, demo)
    add_api(session, demo)
    return Page(train)


def _build_model(session: Session) -> tuple[gr.Dropdown, gr.HTML]:
    gr.HTML("<h1>DoRA diffusion</h1>", elem_id="title")
    model = gr.Dropdown(list(session.models), value=session.model, label="Base", elem_id="model")
    return model, gr.HTML(news_html(session), elem_id="news")


def news_html(session: Session) -> str:
    """The base, and how many drawings there are, in one line."""
    waiting = session.waiting
    queue = "nothing is drawn" if not waiting else "drawing" if waiting == 1 else f"drawing, {waiting - 1} waiting"
    loaded = len(session.loaded)
    held = f"{loaded} adapter{'' if loaded == 1 else 's'} in memory"
    return f'<p class="news" role="status">{escape(session.family)} · {queue} · {held}</p>'


def _wire_draw(session: Session, controls: Controls, stage: Stage) -> None:
    def draw(values: dict[Component, Any], request: gr.Request) -> Iterator[dict[Component, Any]]:
        with user_errors():
            try:
                progress_view = ProgressView(stage)
                run = session.start(controls.request(values), owner=str(request.session_hash))
                for update in run.updates():
                    yield progress_view.changes(update)
            except Exception:
                yield {stage.status: status_html("Nothing more was drawn.")}
                raise

    def stop(request: gr.Request) -> None:
        session.stop(str(request.session_hash))

    drawn = controls.form.generate.click(
        draw,
        {*controls.inputs},
        list(stage.outputs),
        show_progress="hidden",
        concurrency_limit=TABS_AT_ONCE,
        api_visibility="private",
    )
    drawn.then(None, js=_LOOK_AGAIN, queue=False, api_visibility="private")
    controls.form.stop.click(stop, queue=False, api_visibility="private")


def _wire_map(board: WeightGrid, rack: Rack) -> None:
    def load(picked: object, cells: object) -> Updates:
        with user_errors():
            return rack.updates(picked_slots(picked, cells)) if picked else {}

    board.picked.change(
        load, [board.picked, board.cells], list(rack.outputs), show_progress="hidden", api_visibility="private"
    )


def _wire_browser(browser: Browser, form: Form, rack: Rack) -> None:
    def add(values: dict[Component, Any]) -> Updates:
        with user_errors():
            return rack.add(values, values[browser.picked])

    browser.when_picked.success(
        add, rack.inputs | {browser.picked}, list(rack.outputs), show_progress="hidden", api_visibility="private"
    )
    browser.when_word.success(
        lambda prompt, word: add_word(prompt or "", word),
        [form.prompt, browser.word],
        form.prompt,
        show_progress="hidden",
        queue=False,
        api_visibility="private",
    )


def _wire_new_files(session: Session, sent: gr.Textbox, exported: gr.Textbox, rack: Rack) -> None:
    """An adapter that was trained or merged here goes into the rack, when it is sent there."""

    def add(values: dict[Component, Any]) -> Updates:
        name = values[sent]
        if not name:  # emptied before each press, so that the same name again is a change
            return {rack.sentence: gr.skip()}  # of an empty dict gradio says that values are missing
        with user_errors():
            session.library.refresh()
            return rack.add(values, name)

    sent.change(
        add,
        rack.inputs | {sent},
        list(rack.outputs),
        show_progress="hidden",
        trigger_mode="always_last",  # the name follows the emptying at once, and must not be dropped for it
        api_visibility="private",
    )
    exported.change(lambda: session.library.refresh(), None, None, queue=False, api_visibility="private")


def _wire_model(session: Session, model: gr.Dropdown, news: gr.HTML, form: Form, rack: Rack, demo: gr.Blocks) -> None:
    def shown(values: Values) -> dict[Component, Any]:
        """The page as the present base has it."""
        samplers = list(session.samplers)
        return {
            **rack.switched(values),
            form.sampler: gr.Dropdown(samplers, value=samplers[0]),
            model: session.model,
            news: news_html(session),
        }

    def switch(values: dict[Component, Any]) -> dict[Component, Any]:
        with user_errors():
            misfits = session.switch(values[model])
        for file, reason in list(misfits.items())[:3]:
            gr.Warning(escape(f"{file}: {reason}"[:300], quote=False))
        return shown(values)

    model.input(
        switch,
        rack.inputs | {model},
        [*rack.outputs, form.sampler, model, news],
        show_progress="minimal",
        api_visibility="private",
    )

    def opened(values: dict[Component, Any]) -> dict[Component, Any]:
        """Nothing anew unless another tab has switched the base: what was chosen meanwhile would be lost."""
        return {news: news_html(session)} if values[model] == session.model else shown(values)

    demo.load(
        opened,
        rack.inputs | {model},
        [*rack.outputs, form.sampler, model, news],
        show_progress="hidden",
        queue=False,
        api_visibility="private",
    )
    timer = gr.Timer(NEWS_SECONDS)
    timer.tick(lambda: news_html(session), outputs=news, show_progress="hidden", queue=False, api_visibility="private")
