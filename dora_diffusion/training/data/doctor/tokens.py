"""Captions against what the text encoders read: which words are cut, by which of them.

The family's own `encode` runs, the very one that training runs, on the base's own tokenizers. In the place of each text
encoder stands one that answers with the places of the tokens that it was given, so that what comes out of `encode` says
which tokens the denoiser is told of, whatever template, limit or cut a pipeline has. No weights are read.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from dora_diffusion.families import Family, family_of_pipeline
from dora_diffusion.generation.prompts import checked_prompts
from dora_diffusion.pipelines.textual_inversion import add_words
from dora_diffusion.training.config import WordsConfig
from dora_diffusion.utils.quiet import errors_only

# So many captions are encoded at once: at their full width, as pipelines join encoders of several.
_TOGETHER = 8
# Places of one encoder's tokens end where the next one's begin; fp32 holds them exactly.
_SPAN = 1 << 16
_WHOLE = _SPAN - 1
# A language model's layers are asked for by number; there are as many as anyone asks for.
_LAYERS = 256
# More tokens than any pipeline lets through; and by how much a pipeline may lengthen a caption as it cleans it.
_LONGER_THAN_ANY = 4096
_SLACK = 1.25
_LONGEST_WORD = 24


@dataclass(frozen=True)
class Cut:
    """Words of a caption that an encoder does not read.

    Attributes:
        encoder: by its name in the pipeline.
        read: the last token that it reads, counted with those of the pipeline's template and of both ends.
        of: how many there are.
        words: that are cut.
    """

    encoder: str
    read: int
    of: int
    words: str


class TokenCounter:
    """Says what the encoders of a base leave out of captions.

    Args:
        pipe: without weights, of nobody else: its models are replaced.
        words: new ones that captions may hold.
    """

    def __init__(self, pipe: Any, words: WordsConfig) -> None:
        self.family: Family = family_of_pipeline(pipe)
        if words.starts:
            add_words(pipe, words.starts, vectors=words.vectors)
        self._pipe = pipe
        names = [part.name for part in self.family.text_encoders if getattr(pipe, part.name, None) is not None]
        self._heard: dict[str, list[_Heard]] = {name: [] for name in names}
        for number, name in enumerate(names, start=1):
            setattr(pipe, name, _Places(getattr(pipe, name), first=number * _SPAN))
            _listen(getattr(pipe, name.replace("text_encoder", "tokenizer")), self._heard[name])
        setattr(pipe, self.family.denoiser.name, _StandIn(getattr(pipe, self.family.denoiser.name)))
        self._stride = min((getattr(pipe, name).narrowest for name in names), default=1)

    @property
    def encoders(self) -> tuple[str, ...]:
        """The text encoders that the base has."""
        return tuple(self._heard)

    def said(self, caption: str) -> str:
        """A caption as it is encoded, weights and escapes done with.

        Raises:
            ValueError: a tag, or a weight where the family has none.
        """
        prompt = checked_prompts(self.family, caption, "")[0]
        return prompt.plain if self.family.embeds else prompt.text

    def may_be_cut(self, captions: Sequence[str]) -> list[bool]:
        """Which captions are worth a closer look: far quicker than that, and never False where anything is cut."""
        if not captions:
            return []
        short, long = "a", " ".join(["a"] * _LONGER_THAN_ANY)
        rooms = []
        for name in self._heard:
            list(self._cuts_of([short]))
            around = self._heard[name][0].total - self._count(name, [short])[0]
            found = {cut.encoder: cut.read for cut in next(self._cuts_of([long]))}
            rooms.append((name, found.get(name, _LONGER_THAN_ANY) - around))
        counts = [[_SLACK * count > room for count in self._count(name, captions)] for name, room in rooms]
        return [any(parts) for parts in zip(*counts, strict=True)]

    def _count(self, name: str, captions: Sequence[str]) -> list[int]:
        """How many tokens an encoder's tokenizer makes of captions alone."""
        tokenizer = _inner(getattr(self._pipe, name.replace("text_encoder", "tokenizer")))
        convert = getattr(self._pipe, "maybe_convert_prompt", lambda text, tokenizer: text)
        with _hushed(self._pipe):
            made = tokenizer([convert(caption, tokenizer) for caption in captions])
        return [len(ids) for ids in made.input_ids]

    def cuts(self, captions: Sequence[str]) -> Iterator[list[Cut]]:
        """For each caption what is cut, by encoder; nothing by those that read all of it.

        Raises:
            ValueError: as `said`.
        """
        said = [self.said(caption) for caption in captions]
        for start in range(0, len(said), _TOGETHER):
            yield from self._cuts_of(said[start : start + _TOGETHER])

    def _cuts_of(self, said: list[str]) -> Iterator[list[Cut]]:
        for heard in self._heard.values():
            heard.clear()
        with torch.no_grad(), _hushed(self._pipe):
            made = self.family.encode(self._pipe, said)
        for row, text in enumerate(said):
            places = _places_in(made, row, self._stride)
            found = (
                _cut(name, heard[row], text, _those_of(places, number))
                for number, (name, heard) in enumerate(self._heard.items(), start=1)
            )
            yield [cut for cut in found if cut is not None]


@dataclass(frozen=True)
class _Heard:
    """What a tokenizer was given, and made of it.

    Attributes:
        text: with the pipeline's template around the caption.
        offsets: of each token that it let through, (first, last) in the text; (n, n) of those that are no text.
        total: how many tokens there would be without a limit.
    """

    text: str
    offsets: Sequence[tuple[int, int]]
    total: int


def _listen(tokenizer: Any, heard: list[_Heard]) -> None:
    """Keep what a tokenizer is asked to cut to a length; what it answers is as before."""
    inner = _inner(tokenizer)
    kind = type(inner)

    def spoken(self: Any, text: Any = None, *arguments: Any, **settings: Any) -> Any:
        answer = kind.__call__(self, text, *arguments, **settings)
        if settings.get("truncation"):
            texts = [text] if isinstance(text, str) else text
            for one, encoding in zip(texts, answer.encodings, strict=True):
                is_cut = bool(encoding.overflowing)
                total = len(kind.__call__(self, one).input_ids) if is_cut else sum(encoding.attention_mask)
                heard.append(_Heard(one, encoding.offsets, total))
        return answer

    inner.__class__ = type(kind.__name__, (kind,), {"__call__": spoken})


def _inner(tokenizer: Any) -> Any:
    """A tokenizer; some stand in a processor of pictures and text."""
    return getattr(tokenizer, "tokenizer", tokenizer)


@contextmanager
def _hushed(pipe: Any) -> Iterator[None]:
    """Without lines of the pipeline and its tokenizers that a caption is cut, which is said here."""
    with errors_only(type(pipe).__module__), errors_only("transformers.tokenization_utils_base"):
        yield


class _StandIn(nn.Module):
    """A model that says of itself what it is, and is on the CPU."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.config = model.config
        self.dtype, self.device = torch.float32, torch.device("cpu")


class _Places(_StandIn):
    """A text encoder whose every answer is the places of the tokens that it is given, counted from `first`."""

    def __init__(self, encoder: nn.Module, *, first: int) -> None:
        super().__init__(encoder)
        config: Any = getattr(encoder.config, "text_config", None) or encoder.config
        self._first, self._width = first, int(config.hidden_size)
        self._projected = int(config.projection_dim) if type(encoder).__name__.endswith("WithProjection") else None
        self.narrowest = min(self._width, self._projected or self._width)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        use_cache: bool = False,
    ) -> BaseModelOutputWithPooling | CLIPTextModelOutput:
        """As CLIP, T5, BERT and language models answer."""
        count, length = input_ids.shape
        hidden = (self._first + torch.arange(length, dtype=torch.float32))[None, :, None].expand(
            count, length, self._width
        )
        whole = torch.tensor(float(self._first + _WHOLE))
        layers: Any = (hidden,) * _LAYERS
        if self._projected is not None:
            pooled = whole.expand(count, self._projected)
            return CLIPTextModelOutput(text_embeds=pooled, last_hidden_state=hidden, hidden_states=layers)
        pooled = whole.expand(count, self._width)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled, hidden_states=layers)


def _places_in(made: Mapping[str, Tensor], row: int, stride: int) -> Tensor:
    """All places that are told of in one caption's conditioning, once each."""
    parts = [tensor[row, ..., ::stride].reshape(-1).float() for tensor in made.values()]
    return torch.cat(parts).unique()


def _those_of(places: Tensor, number: int) -> set[int]:
    """The places of one encoder's tokens."""
    return {int(place) - number * _SPAN for place in places.tolist() if number * _SPAN <= place < (number + 1) * _SPAN}


def _cut(name: str, heard: _Heard, said: str, places: Iterable[int]) -> Cut | None:
    """What is cut, if anything; what is pooled stands for all that was let through."""
    told = set(places)
    read = [place for place in range(len(heard.offsets)) if place in told or _WHOLE in told]
    spans = [heard.offsets[place] for place in read]
    end = max((last for first, last in spans if first < last), default=0)
    place = heard.text.casefold().rfind(said.strip().casefold())
    whole = place + len(said.strip()) if place >= 0 else len(heard.text)
    words = heard.text[_start_of_word(heard.text, end) : whole].strip() if end < whole else ""
    return Cut(name, max(read, default=-1) + 1, heard.total, words) if words else None


def _start_of_word(text: str, place: int) -> int:
    """Where the word begins that is cut at a place, unless it is so long that it is none, as in Chinese."""
    start = place
    while 0 < start < len(text) and text[start - 1].isalnum() and text[start].isalnum():
        start -= 1
    return start if place - start < _LONGEST_WORD else place
