"""The new words that adapters bring in their files: a pipeline reads them while their adapter has a strength."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dora_diffusion.adapters.matching import Loaded
from dora_diffusion.functional.strengths import Weight, is_felt
from dora_diffusion.pipelines.textual_inversion import Words, WordState, install_on_top


class BundledWords:
    """What the text encoders of one pipeline read beside their own vocabulary, on account of its adapters."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._words: Words | None = None
        self._aside = 0

    def check(self, adapters: Mapping[str, Loaded], weights: Mapping[str, Weight]) -> None:
        """A ValueError when two adapters of a mix bring the same word."""
        whose: dict[str, str] = {}
        for name, state in _in_mix(adapters, weights):
            other = whose.setdefault(state.word.lower(), name)
            if other != name:
                raise ValueError(f"{other!r} and {name!r} both bring the new word {state.word!r}; leave one out")

    def install(self, adapters: Mapping[str, Loaded], weights: Mapping[str, Weight]) -> None:
        """Let the words of the adapters that have a strength be read, and no others.

        Raises:
            ValueError: a word that the pipeline has by now; none is read then.
        """
        self.remove()
        if states := [state for _, state in _in_mix(adapters, weights)]:
            self._words = install_on_top(self._pipe, states)

    @contextmanager
    def aside(self) -> Iterator[bool]:
        """No words are there for a while; tells whether no other such while is around it."""
        self.remove()
        self._aside += 1
        try:
            yield self._aside == 1
        finally:
            self._aside -= 1

    def remove(self) -> None:
        """Tokenizers and text encoders are again what they were."""
        if self._words is not None:
            self._words.remove()
            self._words = None


def _in_mix(adapters: Mapping[str, Loaded], weights: Mapping[str, Weight]) -> list[tuple[str, WordState]]:
    """Adapter and word, of those with a strength, in the order of loading."""
    felt = {name for name, weight in weights.items() if is_felt(weight)}
    return [(name, state) for name, loaded in adapters.items() if name in felt for state in loaded.words]
