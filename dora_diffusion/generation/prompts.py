"""Prompts as people write them: `(more:1.2)`, `[less]` and `<lora:name:0.8>` tags; words weighed by A1111's rule."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.families import Family
from dora_diffusion.utils.text import shown

STEP = 1.1
LARGEST_WEIGHT = 10.0

_TAG = re.compile(r"<\s*(?:lora|lyco)\s*:((?:\\[:<>]|\\(?![:<>])|[^<>\\])*)>", re.IGNORECASE)
_TAG_BEGINS = re.compile(r"<\s*(?:lora|lyco)\s*:", re.IGNORECASE)
# As A1111 takes them out of a prompt: `<hypernet:ink:1>`, `<segment:face>` of others.
_FOREIGN = re.compile(r"<(?!(?:lora|lyco)\s*:)([A-Za-z]\w*)\s*:[^<>]+>", re.IGNORECASE)
_OWN_SIGN = r"a :, < or > of the name itself is written \:, \< or \>"
_TOKEN = re.compile(r"\\[()\[\]\\]|\\|\(|\[|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|\)|\]|[^\\()\[\]:]+|:")


@dataclass(frozen=True)
class LoraTag:
    """`<lora:name:0.8>`: an adapter by name, and its strength, or one strength for each of its parts.

    `<lora:name:0.5:1>` has two, for "text_encoders" and "denoiser"; `<lora:name:unet=1/text_encoder=0.5>` names them.
    The case of `lora` is nothing, `lyco` is the same; a `:`, `<` or `>` of the name itself has a backslash before it.
    """

    name: str
    weight: float | Mapping[str, float] = 1.0


@dataclass(frozen=True)
class Prompt:
    """A prompt taken apart.

    Attributes:
        text: as it was written, without its tags.
        tags: the adapters that it names, in order.
        fragments: (text, weight) pairs that together are all that is said, brackets and escapes done with.
        has_numbers: whether a weight is written out, as in `(red:1.2)`; brackets alone may be just brackets.
    """

    text: str
    tags: tuple[LoraTag, ...]
    fragments: tuple[tuple[str, float], ...]
    has_numbers: bool

    @property
    def plain(self) -> str:
        """What is said, without weights."""
        return "".join(text for text, _ in self.fragments)

    @property
    def is_weighted(self) -> bool:
        """Whether any fragment counts more or less than another prompt's would."""
        return any(weight != 1 for _, weight in self.fragments)


def parse_prompt(text: str) -> Prompt:
    """Take a prompt apart.

    `(a)` is 1.1 times as strong, `[a]` 1.1 times weaker, `(a:1.3)` 1.3 times as strong, brackets multiply; a backslash
    makes a bracket just a bracket, and a bracket without its partner counts to the end of the prompt, as in A1111.

    Raises:
        ValueError: a tag without a name or an end, or whose strengths are no numbers or too many, a tag of another tool
            or kind (`<hypernet:ink:1>`), or a weight beyond -10..10.
    """
    tags = tuple(_tag(match) for match in _TAG.finditer(text))
    bare = re.sub(r"\s{2,}", " ", _TAG.sub("", text)).strip() if tags else text
    if (begun := _TAG_BEGINS.search(bare)) is not None:
        rest = shown(bare[begun.start() :], 60)
        raise ValueError(f"prompt: {rest!r} is no whole tag; expected <lora:NAME:STRENGTH>, where {_OWN_SIGN}")
    if (foreign := _FOREIGN.search(bare)) is not None:
        raise ValueError(f"prompt: {_foreign_in_words(foreign)}; leave it out")
    fragments, has_numbers = _fragments(bare)
    return Prompt(bare, tags, fragments, has_numbers)


def without_foreign_tags(text: str) -> tuple[str, tuple[str, ...]]:
    """A prompt without the tags that are not understood here, and a line for each."""
    lines = tuple(_foreign_in_words(found) for found in _FOREIGN.finditer(text))
    return (re.sub(r"\s{2,}", " ", _FOREIGN.sub("", text)).strip() if lines else text), lines


def _foreign_in_words(tag: re.Match[str]) -> str:
    kind = shown(tag[1], 30)
    return f"{shown(tag[0], 60)} is a tag for {kind!r}, which is not done here: <lora:NAME:STRENGTH> alone is"


def written_name(name: str) -> str:
    """An adapter's name as it stands in a tag."""
    return re.sub("[:<>]", r"\\\g<0>", name)


def _tag(match: re.Match[str]) -> LoraTag:
    first, *values = (part.strip() for part in re.split(r"(?<!\\):", match[1]))
    name = re.sub(r"\\([:<>])", r"\1", first)
    if not name:
        raise ValueError(f"prompt: {shown(match[0], 60)} names no adapter; expected <lora:NAME:STRENGTH>")
    if len(values) > 2:
        raise ValueError(
            f"prompt: {shown(match[0], 60)} has {len(values)} strengths, expected one, or two: of text encoders and "
            f"denoiser; {_OWN_SIGN}"
        )
    if len(values) == 2:
        return LoraTag(name, {"text_encoders": _number(name, values[0]), "denoiser": _number(name, values[1])})
    if values and "=" in values[0]:
        return LoraTag(name, _by_part(name, values[0]))
    return LoraTag(name, _number(name, values[0]) if values else 1.0)


def _by_part(name: str, text: str) -> dict[str, float]:
    pairs = [(part.strip(), value) for part, _, value in (piece.partition("=") for piece in text.split("/"))]
    parts = [part for part, _ in pairs]
    if twice := [part for part in parts if parts.count(part) > 1]:
        raise ValueError(f"prompt: <lora:{name}:{text}> names {twice[0]!r} twice; expected one strength for each part")
    return {part: _number(name, value) for part, value in pairs}


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"prompt: <lora:{name}:{text}> has no number for strength; write <lora:{name}:0.8>") from None


def _fragments(text: str) -> tuple[tuple[tuple[str, float], ...], bool]:
    """(text, weight) pairs, neighbours of one weight joined; and whether a weight was written out."""
    pieces: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []
    has_numbers = False
    for match in _TOKEN.finditer(text):
        piece, number = match[0], match[1]
        closes = {")": "(", "]": "["}.get(piece[-1]) if piece in (")", "]") or number is not None else None
        start = _start_of(opened, closes)
        if piece.startswith("\\"):
            pieces.append((piece[1:], 1.0))
        elif piece in ("(", "["):
            opened.append((piece, len(pieces)))
        elif start is not None:
            has_numbers = has_numbers or number is not None
            factor = {"(": STEP, "[": 1 / STEP}[str(closes)] if number is None else float(number)
            pieces = _multiplied(pieces, start, factor)
        else:
            pieces.append((piece, 1.0))
    for bracket, start in opened:
        pieces = _multiplied(pieces, start, STEP if bracket == "(" else 1 / STEP)
    return _joined(pieces), has_numbers


def _start_of(opened: list[tuple[str, int]], bracket: str | None) -> int | None:
    """Where the innermost open bracket of this kind stands, which is closed hereby; None when none is open."""
    for index in reversed(range(len(opened))):
        if opened[index][0] == bracket:
            return opened.pop(index)[1]
    return None


def _multiplied(pieces: list[tuple[str, float]], start: int, factor: float) -> list[tuple[str, float]]:
    return pieces[:start] + [(text, weight * factor) for text, weight in pieces[start:]]


def _joined(pieces: Sequence[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    joined: list[tuple[str, float]] = []
    most = LARGEST_WEIGHT
    for text, weight in pieces:
        if abs(weight) > most:
            raise ValueError(f"prompt: {text[:40]!r} has weight {weight:g}, expected -{most:g}..{most:g}")
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        elif text:
            joined.append((text, weight))
    return tuple(joined)


def prompt_arguments(pipe: Any, family: Family, prompt: str, negative: str) -> tuple[str, str, dict[str, Tensor]]:
    """Both prompts as the pipeline is to be given them, and the embeddings that replace them when any word is weighed.

    Args:
        pipe: the pipeline, its adapters' strengths set.
        family: its family.
        prompt, negative: as people write them.

    Returns:
        The prompt and the negative prompt in plain words, and embeddings by the names of the pipeline's arguments; none
        for prompts without weights, which so take the pipeline's own path.

    Raises:
        ValueError: a tag, which only the app can load, or a weight in a family that has none.
    """
    wanted, avoided = checked_prompts(family, prompt, negative)
    if not family.embeds:
        return wanted.text, avoided.text, {}
    if not (wanted.is_weighted or avoided.is_weighted):
        return wanted.plain, avoided.plain, {}
    embeddings = _embeddings(pipe, family, wanted)
    negatives = {f"negative_{name}": value for name, value in _embeddings(pipe, family, avoided).items()}
    return wanted.plain, avoided.plain, {**embeddings, **negatives}


def checked_prompts(family: Family, prompt: str, negative: str) -> tuple[Prompt, Prompt]:
    """Both prompts taken apart; ValueErrors as `prompt_arguments`."""
    wanted, avoided = parse_prompt(prompt), parse_prompt(negative)
    for parsed in (wanted, avoided):
        if parsed.tags:
            raise ValueError(
                f"prompt: <lora:{parsed.tags[0].name}> names an adapter, which drawing does not load; load it with "
                "AdapterManager and leave the tag out"
            )
    if not family.embeds:
        _refuse_numbers(family, (wanted, avoided))
    return wanted, avoided


def _refuse_numbers(family: Family, prompts: Sequence[Prompt]) -> None:
    """Brackets alone are just brackets in a family without weights; a number cannot be meant so."""
    for prompt in prompts:
        if prompt.has_numbers:
            text, weight = next((pair for pair in prompt.fragments if pair[1] != 1), prompt.fragments[0])
            raise ValueError(
                f"prompt: {family.name} cannot weigh words, got ({text[:40]}:{weight:g}); say it in words instead"
            )


def encode_captions(pipe: Any, family: Family, captions: Sequence[str]) -> dict[str, Tensor]:
    """Captions -> conditioning as `Family.encode` gives it, each word weighed as it is where the caption is drawn.

    Differentiable through the text encoders.

    Raises:
        ValueError: a tag, or a weight in a family that has none.
    """
    prompts = [checked_prompts(family, caption, "")[0] for caption in captions]
    if not family.embeds:
        return dict(family.encode(pipe, [prompt.text for prompt in prompts]))
    made = dict(family.encode(pipe, [prompt.plain for prompt in prompts]))
    if any(prompt.is_weighted for prompt in prompts):
        tokens = next(iter(family.embeds))
        rows = [
            _weighed(pipe, family, row[None], prompt) if prompt.is_weighted else row[None]
            for row, prompt in zip(made[tokens], prompts, strict=True)
        ]
        made[tokens] = torch.cat(rows)
    return made


@torch.no_grad()
def _embeddings(pipe: Any, family: Family, prompt: Prompt) -> dict[str, Tensor]:
    """What the pipeline makes of a prompt, its tokens weighed, by the names of the pipeline's arguments."""
    made = dict(family.encode(pipe, [prompt.plain]))
    tokens = next(iter(family.embeds))
    if prompt.is_weighted:
        made[tokens] = _weighed(pipe, family, made[tokens], prompt)
    return {argument: made[name] for name, argument in family.embeds.items() if name in made}


def _weighed(pipe: Any, family: Family, hidden: Tensor, prompt: Prompt) -> Tensor:
    """Each encoder's part of (1, tokens, width), encoders side by side, multiplied token by token."""
    names = [part.name for part in family.text_encoders if getattr(pipe, part.name, None) is not None]
    widths = [getattr(pipe, name).config.hidden_size for name in names]
    tokenizers = [getattr(pipe, name.replace("text_encoder", "tokenizer")) for name in names]
    parts = [
        scaled_by_weights(part, token_weights(pipe, tokenizer, prompt))
        for part, tokenizer in zip(hidden.split(widths, dim=-1), tokenizers, strict=True)
    ]
    return torch.cat(parts, dim=-1)


def scaled_by_weights(hidden: Tensor, weights: Tensor) -> Tensor:
    """A1111's rule: z' = w z, then z' mean(z) / mean(z'), the mean over everything.

    Args:
        hidden: z, (1, tokens, width).
        weights: w, (tokens,) fp32.
    """
    plain = hidden.float()
    scaled = plain * weights.to(plain.device)[None, :, None]
    mean = scaled.mean()
    is_none = mean == 0  # which has no ratio to restore; whether it is stays on the device
    ratio = plain.mean() / mean.masked_fill(is_none, 1)
    return (scaled * ratio.masked_fill(is_none, 1)).to(hidden.dtype)


def token_weights(pipe: Any, tokenizer: Any, prompt: Prompt) -> Tensor:
    """The weight of every token of a prompt, (tokens,) fp32; 1 for those that are not text, and for padding."""
    convert = getattr(pipe, "maybe_convert_prompt", lambda text, tokenizer: text)
    pieces = [(convert(text, tokenizer), weight) for text, weight in prompt.fragments]
    ends = list(accumulate(len(text) for text, _ in pieces))
    spoken = tokenizer(
        "".join(text for text, _ in pieces),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_offsets_mapping=True,
    )
    weights = []
    for start, end in spoken["offset_mapping"]:
        inside = (weight for (_, weight), last in zip(pieces, ends, strict=True) if start < last)
        weights.append(1.0 if start == end else next(inside))
    return torch.tensor(weights)
