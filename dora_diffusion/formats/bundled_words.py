"""New words that adapter files carry beside their layers: `bundle_emb.WORD.PART`, as A1111 and OneTrainer write them.

PART says which encoder a word's vectors are for: `clip_l`, `clip_g`, `clip_h`, `t5`; `string_to_param.*`, `emb_params`
or another key of an embedding file where the model has one encoder. What ends in `_out` is added behind an encoder and
not read by it. Sources: A1111 `extensions-builtin/Lora/networks.py`, OneTrainer `modules/modelSaver/*/*LoRASaver.py`.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

_PREFIX = "bundle_emb."
T = TypeVar("T")


def word_of(key: str) -> str | None:
    """The word that a key of a file belongs to; None for a key of no word."""
    word, dot, part = key.removeprefix(_PREFIX).partition(".")
    return word if key.startswith(_PREFIX) and word and dot and part else None


def words_among(keys: Iterable[str]) -> tuple[str, ...]:
    """The words that the keys of a file bundle, in order."""
    return tuple(dict.fromkeys(word for key in keys if (word := word_of(key)) is not None))


def parts_by_word(extra: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Word -> part -> what the file has under it."""
    found: dict[str, dict[str, T]] = {}
    for key, value in extra.items():
        if (word := word_of(key)) is not None:
            found.setdefault(word, {})[key.removeprefix(f"{_PREFIX}{word}.")] = value
    return found
