"""Names and texts that a terminal, a locale or UTF-8 cannot hold: shown anyhow, or told in one line."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import NoReturn

from dora_diffusion.utils.text import shown


class OneLineParser(argparse.ArgumentParser):
    """A parser of arguments whose mistakes, and its commands', are one line: what is wrong, and where help is."""

    def error(self, message: str) -> NoReturn:
        """Say it on stderr, and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {shown(message, 1000)}; see {self.prog} --help\n")


@contextmanager
def printing_anything() -> Iterator[None]:
    r"""Let what is printed never fail: what the terminal's encoding has no sign for is shown as `\xe9` or `\udcff`."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            if not stream.closed:
                stream.reconfigure(errors=errors)


def typed_text(text: str) -> str:
    """An argument of the command line as text: UTF-8 also where the locale is C, whose bytes Python takes for no text.

    What is no UTF-8 comes back as it was. For text alone: a path stays as Python gives it, or it is no file's any more.
    """
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


def line_of_unicode_error(error: UnicodeError) -> str:
    """One line that says which name or text it was, and what helps."""
    if isinstance(error, UnicodeEncodeError):
        what = f"'{shown(error.object)}'"
        if any("\ud800" <= sign <= "\udfff" for sign in error.object[error.start : error.end]):
            return f"{what} holds bytes that are no UTF-8 text; rename the file, or write it otherwise"
        return f"{what}: got signs that this locale's {error.encoding} has not; set PYTHONUTF8=1, or use plain letters"
    if isinstance(error, UnicodeDecodeError):
        return (
            f"got bytes that are no {error.encoding} text ({ascii(bytes(error.object[error.start : error.end][:20]))})"
        )
    return str(error)
