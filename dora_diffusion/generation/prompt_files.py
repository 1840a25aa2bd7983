"""Files of prompts, one a line, with settings at a line's end as kohya's scripts write them.

a cat on a hill --w 768 --h 512 --s 30 --l 7.5 --d 42 --n dog, bird
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dora_diffusion.generation.generate import GenerationSettings
from dora_diffusion.utils.text import first_line, shown, shown_path

_SETTING = re.compile(r"(?:^|\s)--(?=\w)")


@dataclass(frozen=True)
class _Kind:
    """A setting of a line: its name in GenerationSettings, how it is read, and what it is in words."""

    field: str
    read: Callable[[str], Any]
    words: str


_KINDS: Mapping[str, _Kind] = {
    "w": _Kind("width", int, "a whole number"),
    "h": _Kind("height", int, "a whole number"),
    "s": _Kind("steps", int, "a whole number"),
    "l": _Kind("guidance_scale", float, "a number"),
    "d": _Kind("seed", int, "a whole number"),
    "n": _Kind("negative_prompt", str, "text"),
}


@dataclass(frozen=True)
class PromptLine:
    """What a line asks for, and which line of which file it is, for messages: `prompts.txt, line 3`."""

    place: str
    settings: GenerationSettings


def read_prompts(path: Path, defaults: GenerationSettings) -> tuple[PromptLine, ...]:
    """The prompts of a file in order; blank lines, and those that begin with `#`, are left out.

    Args:
        path: UTF-8 text.
        defaults: what a line says nothing of.

    Raises:
        ValueError: no such file, no prompt in it, or a line that is not understood: one line that names both.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"{shown_path(path)}: cannot be read ({error.strerror or type(error).__name__})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{shown_path(path)}: not UTF-8; save it as plain text in UTF-8") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    wanted = [(number, line) for number, line in numbered if line and not line.startswith("#")]
    if not wanted:
        raise ValueError(f"{shown_path(path)}: holds no prompt; expected one a line")
    return tuple(_prompt_line(f"{shown_path(path)}, line {number}", line, defaults) for number, line in wanted)


def _prompt_line(place: str, line: str, defaults: GenerationSettings) -> PromptLine:
    prompt, *pieces = _SETTING.split(line)
    try:
        if not prompt.strip():
            raise ValueError("no prompt before the settings; write it at the line's beginning")
        given: dict[str, Any] = {"prompt": prompt.strip()}
        for piece in pieces:
            field, value = _setting(piece)
            if field in given:
                raise ValueError(f"--{piece.split()[0]} is given twice; leave one")
            given[field] = value
        return PromptLine(place, replace(defaults, **given))
    except ValueError as error:
        raise ValueError(f"{place}: {first_line(error)}") from None


def _setting(piece: str) -> tuple[str, Any]:
    """`w 768` -> ("width", 768)."""
    name, _, text = piece.strip().partition(" ")
    kind = _KINDS.get(name.lower())
    if kind is None:
        known = ", ".join(f"--{known}" for known in _KINDS)
        raise ValueError(f"--{shown(name, 40)} is no setting; expected {known}, or a space after the dashes")
    try:
        return kind.field, kind.read(text.strip())
    except ValueError:
        raise ValueError(f"--{name}: got {shown(text.strip(), 40)!r}, expected {kind.words}") from None
