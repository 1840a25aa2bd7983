"""`<lora:name:0.8>` tags of a prompt as adapters of the library, beside those of the rack."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dora_diffusion.functional.strengths import strength_at
from dora_diffusion.generation.prompts import LoraTag, parse_prompt
from dora_diffusion.utils.text import shown_value
from ui.backend.checks import check_strength_number
from ui.backend.request import AdapterChoice, BaseParts, DrawRequest


@dataclass(frozen=True)
class Resolved:
    """A request whose tags have become adapters.

    Attributes:
        request: without tags in its prompt, with the adapters that draw: the rack's, then those of the tags.
        tags: as the prompt had them.
        tagged: their adapters, each once, with those for which the rack counts.
    """

    request: DrawRequest
    tags: tuple[LoraTag, ...]
    tagged: tuple[AdapterChoice, ...] = ()


def resolve_tags(request: DrawRequest, names: Sequence[str], parts: BaseParts) -> Resolved:
    """Let `<lora:name:0.8>` tags of the prompt become adapters; what is at strength 0 is left out.

    The strengths of several tags of one adapter are added.

    Args:
        request: as the form gave it.
        names: of the library.
        parts: of the base.

    Raises:
        ValueError: a tag in the negative prompt, a name that the library does not have, or a strength outside -2..2,
            that of several tags together, too.
    """
    if parse_prompt(request.settings.negative_prompt).tags:
        raise ValueError("negative prompt: holds a <lora:...> tag; write it into the prompt, with a negative strength")
    prompt = parse_prompt(request.settings.prompt)
    by_file: dict[str, list[LoraTag]] = {}
    for tag in prompt.tags:
        by_file.setdefault(_file_of_tag(tag.name, names), []).append(tag)
    tagged = tuple(AdapterChoice(file, _checked_weight(file, tags, parts)) for file, tags in by_file.items())
    settings = replace(request.settings, prompt=prompt.text)
    drawn = replace(request, settings=settings, adapters=with_tagged(request.adapters, tagged))
    return Resolved(drawn, prompt.tags, tagged)


def with_tagged(rack: Sequence[AdapterChoice], tagged: Sequence[AdapterChoice]) -> tuple[AdapterChoice, ...]:
    """The rack's adapters and the tags', without those at strength 0.

    Where a slot that takes part has the adapter, that slot counts, at strength 0 too.
    """
    choices: dict[str, AdapterChoice] = {}
    for choice in (*rack, *tagged):
        choices.setdefault(choice.file, choice)
    return tuple(choice for choice in choices.values() if choice.draws)


def _file_of_tag(name: str, names: Sequence[str]) -> str:
    """The library's name for a tag's: itself, whatever the case, or without its folder if only one is called so."""
    if name in names:
        return name
    lower = name.lower()
    for alike in (
        [other for other in names if other.lower() == lower],
        [other for other in names if other.rpartition("/")[2].lower() == lower],
    ):
        if len(alike) == 1:
            return alike[0]
        if alike:
            raise ValueError(f"prompt: <lora:{name}> may be any of {', '.join(alike[:5])}; write one of these")
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"; nearest: {', '.join(nearest)}" if nearest else f"; there are {len(names)} adapters"
    raise ValueError(f"prompt: no adapter named {shown_value(name)} for <lora:...>{hint}")


def weight_of_tags(tags: Sequence[LoraTag], parts: BaseParts) -> float | dict[str, float]:
    """What tags of one adapter ask for together: their strengths added, part by part."""
    weights = [_weight_of_tag(tag, parts) for tag in tags]
    if all(isinstance(weight, float) for weight in weights):
        return sum(strength_at("", weight) for weight in weights)
    named = dict[str, None]()
    for weight in weights:
        named |= dict.fromkeys(weight if isinstance(weight, dict) else (parts.denoiser, *parts.text_encoders))
    return {part: sum(strength_at(part, weight) for weight in weights) for part in named}


def _checked_weight(file: str, tags: Sequence[LoraTag], parts: BaseParts) -> float | dict[str, float]:
    for tag in tags:
        _check_weight(f"prompt, <lora:{tag.name}>", tag.weight)
        _check_parts(tag, parts)
    weight = weight_of_tags(tags, parts)
    _check_weight(f"prompt, the {len(tags)} tags of {file} together", weight)
    return weight


def _check_weight(label: str, weight: float | Mapping[str, float]) -> None:
    if not isinstance(weight, Mapping):
        check_strength_number(label, weight)
        return
    for part, value in weight.items():
        check_strength_number(f"{label}, {part}", value)


def _check_parts(tag: LoraTag, parts: BaseParts) -> None:
    seen = set[str]()
    for part in tag.weight if isinstance(tag.weight, Mapping) else ():
        own = _own_names(part, parts)
        if twice := seen.intersection(own):
            raise ValueError(f"prompt, <lora:{tag.name}>: {part!r} is {min(twice)!r} again; expected each part once")
        seen.update(own)


def _own_names(part: str, parts: BaseParts) -> tuple[str, ...]:
    """What the base calls a part of a tag."""
    return {"denoiser": (parts.denoiser,), "text_encoders": parts.text_encoders}.get(part, (part,))


def _weight_of_tag(tag: LoraTag, parts: BaseParts) -> float | dict[str, float]:
    """With the base's own names of its parts."""
    if not isinstance(tag.weight, Mapping):
        return tag.weight
    return {name: value for part, value in tag.weight.items() for name in _own_names(part, parts)}
