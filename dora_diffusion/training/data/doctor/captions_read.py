"""What is known of a base before its weights: the sizes that it is trained at, and how it reads captions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dora_diffusion.training.base.meta import load_skeleton
from dora_diffusion.training.base.sizes import Sizes, sizes_of
from dora_diffusion.training.config import CaptionsConfig, DataConfig, WordsConfig, as_resolutions
from dora_diffusion.training.data.captions import longest_choice
from dora_diffusion.training.data.doctor.findings import Finding
from dora_diffusion.training.data.doctor.shapes import Sizing
from dora_diffusion.training.data.doctor.tokens import Cut, TokenCounter
from dora_diffusion.training.data.examples import Example
from dora_diffusion.utils.text import shown

# Sides of buckets are multiples of this where no base says of what; many bases' are, and no base's are of less.
_MULTIPLE = 8
_LONGEST_QUOTE = 160


@dataclass(frozen=True)
class Reading:
    """How captions are read.

    Attributes:
        counter: of the base's tokens.
        rules: what is done to captions first.
    """

    counter: TokenCounter
    rules: CaptionsConfig

    def findings(self, examples: Sequence[Example]) -> Iterator[Finding]:
        """Captions that training refuses, and those of which words are cut."""
        faults, cuts = self._of_each({caption for example in examples for caption in example.captions})
        for example in examples:
            for caption in example.captions:
                of = f" (of {shown(caption, 40)!r})" if example.others else ""
                if caption in faults:
                    yield Finding("bad-caption", example.path, faults[caption] + of)
                elif cuts.get(caption):
                    yield self._finding(example, cuts[caption], of)

    def _of_each(self, captions: set[str]) -> tuple[dict[str, str], dict[str, list[Cut]]]:
        """Caption -> what is wrong with it, and caption -> what is cut."""
        faults: dict[str, str] = {}
        texts: dict[str, str] = {}
        for caption in sorted(captions):
            text = longest_choice(caption) if self.rules.wildcards else caption
            try:
                self.counter.said(text)
                texts[caption] = text
            except ValueError as error:
                faults[caption] = str(error).removeprefix("prompt: ")
        long = [caption for caption, may in zip(texts, self.counter.may_be_cut([*texts.values()]), strict=True) if may]
        cuts = self.counter.cuts([texts[caption] for caption in long])
        return faults, dict(zip(long, cuts, strict=True))

    def _finding(self, example: Example, cuts: list[Cut], of: str) -> Finding:
        """Lost is what no encoder reads."""
        readers = [name for name in self.counter.encoders if name not in {cut.encoder for cut in cuts}]
        least = min(cuts, key=lambda cut: len(cut.words))
        counts = ", ".join(f"{cut.encoder} reads {cut.read} of {cut.of} tokens" for cut in cuts)
        others = "; shuffled, each time others" if self.rules.shuffle else ""
        if readers:
            message = f"{counts}, not {_quoted(least)}{others}; {' and '.join(readers)} all{of}"
            return Finding("partly-read", example.path, message)
        return Finding("cut-caption", example.path, f"{counts}; cut: {_quoted(least)}{others}{of}")


def _quoted(cut: Cut) -> str:
    return repr(shown(cut.words, _LONGEST_QUOTE))


def base_of(model: str, data: DataConfig, words: WordsConfig | None = None) -> tuple[Sizing, Reading]:
    """Of a base by its name or place.

    Raises:
        ValueError: no such base, or a resolution that it cannot be trained at.
    """
    pipe = load_skeleton(model, dtype=torch.float32)
    sizing = Sizing(data, sizes_of(pipe), model)
    sizing.sizes.resolutions(data)
    return sizing, Reading(TokenCounter(pipe, words or WordsConfig()), data.captions)


def without_base(data: DataConfig) -> tuple[Sizing, None]:
    """Of no base, at the resolutions that were asked for."""
    return Sizing(data, Sizes(max(as_resolutions(data.resolution)), _MULTIPLE, "any base"), "any base"), None
