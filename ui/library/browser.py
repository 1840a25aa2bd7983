"""The adapter browser: search, filters, cards; a click on a card picks it, a click on a trigger word offers it.

Every tab looks at the same library; what it asks for is checked, and names and words are looked up on the server.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.events import Dependency

from ui.errors import user_errors
from ui.library.cards import CSS, ON_LOAD, cards_html, status_html
from ui.library.catalogue import ORDERS, Query, check_query, choices_of, shown_of
from ui.library.library import AdapterLibrary
from ui.library.thumbnails import Thumbnails

__all__ = ["CSS", "Browser", "add_word", "build_browser"]

ANY = ("any", "")
LOOK_EVERY = 2.0  # seconds
TABS_AT_ONCE = 8


@dataclass(frozen=True)
class Browser:
    """What the rest of the page needs of it.

    Attributes:
        picked: hidden; the library name of the card that was chosen last, checked.
        when_picked: `when_picked.success(f, [browser.picked], ...)` runs f at every choice, also of the same card.
        word: hidden; the trigger word that was chosen last, as the file has it.
        when_word: as `when_picked`; `add_word` puts the word into a prompt.
    """

    picked: gr.Textbox
    when_picked: Dependency
    word: gr.Textbox
    when_word: Dependency


@dataclass(frozen=True)
class _Widgets:
    """The widgets of the browser.

    Attributes:
        page: from 0. It and `seen` are hidden by CSS only: what is not in the page tells of no change.
        seen: which state of the library is shown; cards are drawn again when it changes.
        filters: what the cards on show were asked by: a page is of these, others begin at the first.
        waiting: how many pictures were not ready.
    """

    text: gr.Textbox
    family: gr.Dropdown
    kind: gr.Dropdown
    tag: gr.Dropdown
    only_fitting: gr.Checkbox
    order: gr.Dropdown
    page: gr.Number
    status: gr.HTML
    cards: gr.HTML
    before: gr.Button
    after: gr.Button
    refresh: gr.Button
    seen: gr.Textbox
    filters: gr.Textbox
    waiting: gr.Number

    @property
    def asked(self) -> list[Component]:
        """What decides which cards are shown, in the order of `Query`."""
        return [self.text, self.family, self.kind, self.tag, self.only_fitting, self.order, self.page]

    @property
    def answered(self) -> list[Component]:
        """What a look changes."""
        return [self.cards, self.status, self.page, self.before, self.after]

    @property
    def choices(self) -> list[Component]:
        """The filters whose choices come from the files."""
        return [self.family, self.kind, self.tag]


class BrowserHandlers:
    """What the handlers do, without widgets: the library, its pictures, the family of the app's base."""

    def __init__(self, library: AdapterLibrary, family: Callable[[], str]) -> None:
        self.library = library
        self._family = family
        self._thumbnails = Thumbnails()

    def look(self, *asked: Any) -> tuple[list[Any], int]:
        """Cards, status, page and the buttons beside it, as `_Widgets.answered`; and how many pictures are not ready.

        Raises:
            ValueError: the browser asks for something that it may not.
        """
        query, family = check_query(_query(asked)), self._family()
        shown = shown_of(self.library, query, family=family)
        cards, waiting = cards_html(shown, self._thumbnails, family=family)
        library = self.library
        status = status_html(
            shown,
            total=len(library.files),
            broken=len(library.broken),
            unread=library.unread,
            notice=library.notice,
        )
        pager = [gr.Button(interactive=shown.page > 0), gr.Button(interactive=shown.page + 1 < shown.pages)]
        return [cards, status, shown.page, *pager], waiting

    def state(self) -> str:
        """What changes when cards have to be drawn again: the library, or the app's base."""
        return f"{self._family()} {self.library.version}"

    def choices(self, *chosen: Any) -> list[Any]:
        """The filters with what the files offer now; a choice that nothing has any more stays to be taken back."""
        found = choices_of(self.library.files)
        offered = (found.families, found.kinds, found.tags)
        return [
            gr.Dropdown([ANY, *dict.fromkeys((*names, *([value] if isinstance(value, str) and value else [])))])
            for names, value in zip(offered, chosen, strict=True)
        ]

    def pick(self, name: Any) -> str:
        """The name, if it is an adapter's that can be used.

        Raises:
            ValueError: it is not in the library, or broken.
        """
        return self.library.find(name).name

    def word(self, name: Any, number: Any) -> str:
        """A trigger word of an adapter.

        Raises:
            ValueError: there is no such adapter, or it has no such word.
        """
        triggers = self.library.find(name).triggers
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(triggers):
            raise ValueError(f"{name}: it has {len(triggers)} trigger words, and not the one asked for; press Refresh")
        return triggers[number]


def add_word(prompt: str, word: str) -> str:
    """A prompt with a word at its end, unless it is in it already."""
    parts = [part.strip() for part in prompt.split(",")]
    if not word or word in parts:
        return prompt
    return f"{prompt.rstrip().rstrip(',')}, {word}" if prompt.strip() else word


def build_browser(session: Any, demo: gr.Blocks) -> Browser:
    """Lay out the browser inside the open block and wire it.

    Args:
        session: its `library`, and `family`, the name of its base's family.
        demo: the page, whose loading fills the browser.
    """
    handlers = BrowserHandlers(session.library, lambda: str(session.family))
    widgets = _lay_out()
    picked = gr.Textbox(visible=False, elem_id="browser-picked")
    word = gr.Textbox(visible=False, elem_id="browser-word")
    _wire_looks(widgets, handlers, demo)

    def pick(event: gr.EventData) -> str:
        with user_errors():
            return handlers.pick(_sent(event, "name"))

    def offer(event: gr.EventData) -> str:
        with user_errors():
            return handlers.word(_sent(event, "name"), _sent(event, "word"))

    when_picked = widgets.cards.pick(pick, None, picked, show_progress="hidden", api_visibility="private")
    when_word = widgets.cards.word(offer, None, word, show_progress="hidden", api_visibility="private")
    return Browser(picked, when_picked, word, when_word)


def _query(asked: Sequence[Any]) -> Query:
    """What the widgets hold; an emptied dropdown asks for any."""
    text, family, kind, tag, only_fitting, order, page = asked
    return Query(text or "", family or "", kind or "", tag or "", only_fitting, order or "", page or 0)


def _sent(event: gr.EventData, field: str) -> Any:
    """A field of what a click told; None where the browser sent something else."""
    return event._data.get(field) if isinstance(event._data, dict) else None


def _lay_out() -> _Widgets:
    with gr.Row(elem_id="browser-head"):
        text = gr.Textbox(
            label="Search", placeholder="name, trigger word, tag …", elem_id="browser-search", scale=4, min_width=180
        )
        refresh = gr.Button("Refresh", size="sm", elem_id="browser-refresh", scale=0, min_width=90)
    with gr.Row(elem_id="browser-filters"):
        family, kind, tag = (
            gr.Dropdown([ANY], value="", label=label, elem_id=f"browser-{name}", min_width=105)
            for label, name in (("Base", "family"), ("Type", "kind"), ("Tag", "tag"))
        )
        order = gr.Dropdown(list(ORDERS), value="name", label="Order", elem_id="browser-order", min_width=105)
    only_fitting = gr.Checkbox(True, label="Only those that fit this base", elem_id="browser-fitting", container=False)
    status = gr.HTML(elem_id="browser-status")
    cards = gr.HTML(elem_id="browser-cards", js_on_load=ON_LOAD, apply_default_css=False)
    with gr.Row(elem_id="browser-pages"):
        before = gr.Button("‹ Before", size="sm", interactive=False, elem_id="browser-before", min_width=80)
        after = gr.Button("Next ›", size="sm", interactive=False, elem_id="browser-after", min_width=80)
    return _Widgets(
        text,
        family,
        kind,
        tag,
        only_fitting,
        order,
        page=gr.Number(0, elem_id="browser-page", elem_classes="unseen"),
        status=status,
        cards=cards,
        before=before,
        after=after,
        refresh=refresh,
        seen=gr.Textbox(elem_id="browser-seen", elem_classes="unseen"),
        filters=gr.Textbox(elem_id="browser-asked", elem_classes="unseen"),
        waiting=gr.Number(0, elem_id="browser-waiting", elem_classes="unseen"),
    )


def _wire_looks(widgets: _Widgets, handlers: BrowserHandlers, demo: gr.Blocks) -> None:
    """Whatever changes, one handler draws the cards, one call at a time: an older answer never comes after a newer."""

    def show(had: Any, *asked: Any) -> list[Any]:
        filters = json.dumps(asked[:-1])
        with user_errors():
            answered, waiting = handlers.look(*asked[:-1], asked[-1] if filters == had else 0)
        return [*answered, filters, waiting]

    def look_again(*chosen: Any) -> list[Any]:
        handlers.library.refresh()
        return [handlers.state(), *handlers.choices(*chosen)]

    def watch(seen: Any, waiting: Any, *chosen: Any) -> list[Any]:
        handlers.library.watch(LOOK_EVERY)
        state = handlers.state()
        if seen != state:
            return [state, *handlers.choices(*chosen)]
        more = f"{state} and pictures" if waiting else gr.skip()
        return [more, *[gr.skip()] * len(widgets.choices)]

    asked = (widgets.text, widgets.family, widgets.kind, widgets.tag, widgets.only_fitting, widgets.order)
    gr.on(
        [changed.change for changed in (*asked, widgets.page, widgets.seen)],
        show,
        [widgets.filters, *widgets.asked],
        [*widgets.answered, widgets.filters, widgets.waiting],
        show_progress="hidden",
        trigger_mode="always_last",
        queue=False,
        api_visibility="private",
    )
    known = [widgets.seen, *widgets.choices]
    _on(widgets.refresh.click, look_again, widgets.choices, known)
    _on(demo.load, look_again, widgets.choices, known)
    _on(gr.Timer(LOOK_EVERY).tick, watch, [widgets.seen, widgets.waiting, *widgets.choices], known)
    _on(widgets.before.click, lambda page: max(0, _number(page) - 1), [widgets.page], [widgets.page])
    _on(widgets.after.click, lambda page: _number(page) + 1, [widgets.page], [widgets.page])
    _on(widgets.cards.tag, _chosen_tag, [], [widgets.tag])


def _chosen_tag(event: gr.EventData) -> gr.Dropdown:
    """The filter, set to the tag of the chip that was clicked."""
    tag = str(_sent(event, "tag") or "").lower()[:100]
    return gr.Dropdown([ANY, tag], value=tag)


def _number(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and 0 <= value < 1 << 30 else 0


def _on(
    event: Callable[..., Dependency],
    handler: Callable[..., Any],
    inputs: Sequence[Component],
    outputs: Sequence[Component],
) -> None:
    event(
        handler,
        list(inputs),
        list(outputs),
        show_progress="hidden",
        trigger_mode="always_last",
        queue=False,
        api_visibility="private",
    )
