"""How a mistake reaches whoever made it: as one line, in a toast of the page or in an answer of the API.

Every event of the page is wired here, so that no handler's error takes another way.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

import gradio as gr
from gradio.components import Component
from gradio.events import Dependency

from dora_diffusion.utils.text import shown_path
from ui.markup import toast_text

Widgets = Component | Sequence[Any] | Set[Any] | None  # Any: outputs may be the layout around components, too


@dataclass(frozen=True)
class EventOptions:
    """How gradio calls a handler; the names are gradio's, and so are the defaults, but for the progress.

    Attributes:
        show_progress: "full", "minimal" or "hidden": what covers the outputs until they have come.
        queue: False for what is answered at once, and need not wait behind a drawing.
        trigger_mode: what becomes of events while an answer is awaited; None is gradio's choice for the event.
        concurrency_limit: how many calls run at once.
        preprocess: whether gradio checks and converts what the browser sends.
    """

    show_progress: Literal["full", "minimal", "hidden"] = "hidden"
    queue: bool = True
    trigger_mode: Literal["once", "multiple", "always_last"] | None = None
    concurrency_limit: int | Literal["default"] = "default"
    preprocess: bool = True


QUEUED = EventOptions()
WITH_PROGRESS = EventOptions(show_progress="full")
QUICK = EventOptions(queue=False)
LATEST = EventOptions(trigger_mode="always_last")
QUICK_LATEST = EventOptions(queue=False, trigger_mode="always_last")


def wire(
    event: Callable[..., Dependency],
    handler: Callable[..., Any],
    inputs: Widgets = None,
    outputs: Widgets = None,
    *,
    options: EventOptions = QUEUED,
) -> Dependency:
    """Let an event call a handler, whose errors go to the page as one line; it is no endpoint of the API.

    Args:
        event: of a widget, such as `button.click`.
        handler: also one that yields.
        inputs: what it is given, one after another; of a set, all in one mapping.
        outputs: what it changes.
        options: how it is called.
    """
    return event(
        _with_user_errors(handler),
        inputs,
        outputs,
        show_progress=options.show_progress,
        queue=options.queue,
        trigger_mode=options.trigger_mode,
        concurrency_limit=options.concurrency_limit,
        preprocess=options.preprocess,
        api_visibility="private",
    )


def wire_js(event: Callable[..., Dependency], js: str) -> Dependency:
    """Let an event run a script in the page."""
    return event(None, js=js, queue=False, api_visibility="private")


def _with_user_errors(handler: Callable[..., Any]) -> Callable[..., Any]:
    if not inspect.isgeneratorfunction(handler):
        return user_errors()(handler)

    @wraps(handler)
    def run(*values: Any) -> Iterator[Any]:
        with user_errors():
            yield from handler(*values)

    return run


@contextmanager
def user_errors(*, is_markup: bool = True) -> Iterator[None]:
    """Let errors inside the block go to the browser as one line.

    Args:
        is_markup: whether whoever shows the line takes it for HTML, as the page does.
    """
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        line = line_of(error)
        is_foreseen = isinstance(error, ValueError) or _names_file(error)
        text = toast_text(line) if is_markup else line
        raise gr.Error(text, print_exception=not is_foreseen) from error


def line_of(error: Exception) -> str:
    """A user's mistake in full, a file that cannot be used with its name, of anything else the kind."""
    if isinstance(error, ValueError):
        return " ".join(str(error).splitlines())
    if isinstance(error, OSError) and _names_file(error):
        reason = error.strerror or type(error).__name__
        return f"{shown_path(os.fsdecode(error.filename))}: cannot be read or written ({reason})"
    return f"{type(error).__name__}; the terminal that runs the app says more"


def _names_file(error: Exception) -> bool:
    return isinstance(error, OSError) and isinstance(error.filename, str | bytes)
