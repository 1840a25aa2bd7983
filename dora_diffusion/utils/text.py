"""What comes from outside, as it may stand in a message of one line."""

import re

LONGEST_PATH = 300
# what breaks a line, moves the cursor, turns the direction of writing or cannot be encoded
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: object, limit: int = 100) -> str:
    """`text` for a message: on one line, without control characters, the middle left out when it is long."""
    line = str(text)
    if len(line) > limit:
        line = f"{line[: limit // 2]}...{line[-(limit - limit // 2) :]}"
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], line)


def encodable(text: str) -> str:
    r"""Text that UTF-8 can hold: a byte of a file's name that is no text stands as `\udcff`, as JSON writes it."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def check_unicode(label: str, text: str) -> None:
    """A ValueError of one line for text that holds bytes or halves of signs, which no tokenizer and no file takes."""
    if encodable(text) != text:
        raise ValueError(f"{label}: got {ascii(text[:60])}, which is no Unicode text; expected text in UTF-8")


def shown_path(path: object) -> str:
    """A path, or the name of a file, for a message."""
    return shown(path, LONGEST_PATH)


def shown_value(value: object) -> str:
    """A value that was sent, in quotes if it is text, short enough for one line."""
    return "nothing" if value is None else repr(value)[:40]


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
