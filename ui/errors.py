"""How a mistake reaches whoever made it: as one line, in a toast of the page or in an answer of the API."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape

import gradio as gr

from dora_diffusion.formats.safetensors_reader import shown

LONGEST_PATH = 300


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
        text = escape(line, quote=False) if is_markup else line
        raise gr.Error(text, print_exception=not is_foreseen) from error


def line_of(error: Exception) -> str:
    """A user's mistake in full, a file that cannot be used with its name, of anything else the kind."""
    if isinstance(error, ValueError):
        return " ".join(str(error).splitlines())
    if isinstance(error, OSError) and _names_file(error):
        reason = error.strerror or type(error).__name__
        return f"{shown(os.fsdecode(error.filename), LONGEST_PATH)}: cannot be read or written ({reason})"
    return f"{type(error).__name__}; the terminal that runs the app says more"


def _names_file(error: Exception) -> bool:
    return isinstance(error, OSError) and isinstance(error.filename, str | bytes)
