"""What stands on the page, for the parts that draw variations of it: the form and the rack, read together."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gradio.components import Component

from dora_diffusion.generation import GenerationStopped
from ui.request import AdapterChoice, DrawRequest, SlotValues
from ui.session import Session

Values = Mapping[Component, Any]


@dataclass(frozen=True)
class Desk:
    """How to read the page.

    Attributes:
        inputs: the widgets that decide the picture.
        request: what they ask for, checked; a ValueError of one line when that cannot be.
        slots: the rack's slots, unchecked.
    """

    inputs: set[Component]
    request: Callable[[Values], DrawRequest]
    slots: Callable[[Values], tuple[SlotValues, ...]]


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
