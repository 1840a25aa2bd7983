"""Trigger words that other tools keep in files beside an adapter: civitai's `.civitai.info`, A1111's `.json`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dora_diffusion.formats.json_metadata import json_object
from dora_diffusion.formats.safetensors_reader import shown

MOST_BYTES = 1 << 18
_MOST_WORDS, _LONGEST = 12, 80


def words_beside(note: Path) -> tuple[str, ...]:
    """The words of `trainedWords` or `activation text`; none when the file says nothing that is understood."""
    try:
        with open(note, encoding="utf-8") as file:
            found = json_object(file.read(MOST_BYTES), str(note))
    except (OSError, ValueError):  # another tool's note is no part of the adapter
        return ()
    words = found.get("trainedWords")
    return _clean(words if isinstance(words, list) else [found.get("activation text")])


def _clean(words: Iterable[Any]) -> tuple[str, ...]:
    pieces = (piece for word in words if isinstance(word, str) for piece in word[:4000].split(","))
    lines = (shown(" ".join(piece.split()), _LONGEST) for piece in pieces)
    return tuple(dict.fromkeys(line for line in lines if line))[:_MOST_WORDS]
