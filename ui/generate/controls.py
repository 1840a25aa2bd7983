"""The form and the rack, read and filled together; and the drawing of variations of what they hold."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gradio.components import Component

from dora_diffusion.generation.generate import GenerationStopped
from ui.backend.request import AdapterChoice, DrawRequest, SlotValues
from ui.backend.session import Session
from ui.generate.form import Form
from ui.generate.rack import Rack
from ui.generate.recipes import Recipe

Values = Mapping[Component, Any]


@dataclass(frozen=True)
class Controls:
    """What decides the picture on one page.

    Attributes:
        session: whose base draws.
        model: holds the base that the page shows.
        form, rack: the widgets.
    """

    session: Session
    model: Component
    form: Form
    rack: Rack

    @property
    def inputs(self) -> set[Component]:
        """The widgets that decide the picture."""
        return self.form.inputs | self.rack.inputs | {self.model}

    @property
    def outputs(self) -> set[Any]:
        """The widgets that `updates` and a restored canvas change."""
        # told apart from `updates`, which makes widgets: inside an open block they would become part of the page
        return {*self.form.shown, self.form.canvas, self.form.strength, self.form.fold, *self.rack.outputs}

    def slots(self, values: Values) -> tuple[SlotValues, ...]:
        """The rack's slots, unchecked."""
        return self.rack.read(values)

    def request(self, values: Values) -> DrawRequest:
        """What the browser asks for, checked; a ValueError of one line when that cannot be drawn."""
        if values[self.model] != self.session.model:  # its blocks and samplers are not those on this page
            raise ValueError(
                f"the base is {self.session.model} now: another tab has switched it; choose it as this page's base, too"
            )
        asked = self._recipe(values).request(self.session.parts, self.form.canvas_of(values))
        return replace(asked, count=self.form.count_of(values))

    def recipe(self, values: Values) -> Recipe:
        """What can be kept and brought back: without empty slots. What cannot be drawn is refused as by `request`."""
        self.request(values)
        recipe = self._recipe(values)
        return replace(recipe, slots=tuple(slot for slot in recipe.slots if slot.file))

    def updates(self, recipe: Recipe) -> dict[Any, Any]:
        """What shows a recipe."""
        return {**self.form.updates(recipe.settings), **self.rack.updates(recipe.slots, recipe.blend)}

    def _recipe(self, values: Values) -> Recipe:
        return Recipe(self.form.read(values), self.slots(values), self.rack.blend(values))


@dataclass
class Variations:
    """Draws variations of one request, the same one once, into one folder; a stop ends it within a step."""

    session: Session
    folder: Path
    stop: threading.Event
    _known: dict[tuple[tuple[str, str], ...], Path] = field(default_factory=dict)

    def draw(self, request: DrawRequest) -> Path:
        """The picture with this request's adapters; requests may differ in their adapters' strengths only.

        Raises:
            ValueError: it cannot be drawn.
            GenerationStopped: `stop` was set.
        """
        if self.stop.is_set():
            raise GenerationStopped
        key = tuple(_key(choice) for choice in request.adapters)
        if key not in self._known:
            drawn = self.session.draw(request, should_stop=self.stop.is_set)[0]
            self._known[key] = self.session.save(drawn, self.folder)
        return self._known[key]


def _key(choice: AdapterChoice) -> tuple[str, str]:
    weight = choice.weight
    return choice.file, repr(sorted(weight.items()) if isinstance(weight, dict) else float(weight))


class Stops:
    """One drawing per tab, and the way to stop it."""

    def __init__(self) -> None:
        self._events: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    @contextmanager
    def running(self, owner: str) -> Iterator[threading.Event]:
        """The owner's event, set once it should stop; one that still draws for the owner is stopped."""
        event = threading.Event()
        with self._lock:
            self._set(owner)
            self._events[owner] = event
        try:
            yield event
        finally:
            event.set()  # of a closed tab, too
            with self._lock:
                if self._events.get(owner) is event:
                    del self._events[owner]

    def stop(self, owner: str) -> None:
        """Stop what the owner draws; nothing when there is none."""
        with self._lock:
            self._set(owner)

    def _set(self, owner: str) -> None:
        if (event := self._events.get(owner)) is not None:
            event.set()


def picture_html(path: Path, alt: str) -> str:
    """A saved picture as an <img>, fetched by its path; it must lie in the output folder."""
    address = f"gradio_api/file={quote(str(path.resolve()))}"
    return f'<img src="{escape(address)}" alt="{escape(alt)}" loading="lazy">'
