"""`<lora:name:0.8>` tags of a prompt as adapters of the library, beside those of the rack."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dora_diffusion.generation.prompts import LoraTag, parse_prompt
from ui.backend.request import MAX_STRENGTH, AdapterChoice, DrawRequest, Parts, check_number, shown


@dataclass(frozen=True)
class Resolved:
    """A request whose tags have become adapters.

    Attributes:
        request: without tags in its prompt, with the adapters that draw: the rack's, then those of the tags.
        tags: as the prompt had them.
        tagged: their adapters, with those for which the rack counts.
    """

    request: DrawRequest
    tags: tuple[LoraTag, ...]
    tagged: tuple[AdapterChoice, ...] = ()


def resolve_tags(request: DrawRequest, names: Sequence[str], parts: Parts) -> Resolved:
    """Let `<lora:name:0.8>` tags of the prompt become adapters; what is at strength 0 is left out.

    Args:
        request: as the form gave it.
        names: of the library.
        parts: of the base.

    Raises:
        ValueError: a tag in the negative prompt, a name that the library does not have, or a strength outside -2..2.
    """
    if parse_prompt(request.settings.negative_prompt).tags:
        raise ValueError("negative prompt: holds a <lora:...> tag; write it into the prompt, with a negative strength")
    prompt = parse_prompt(request.settings.prompt)
    tagged = tuple(AdapterChoice(_file_of_tag(tag.name, names), _weight_of_tag(tag, parts)) for tag in prompt.tags)
    settings = replace(request.settings, prompt=prompt.text)
    drawn = replace(request, settings=settings, adapters=with_tagged(request.adapters, tagged))
    return Resolved(drawn, prompt.tags, tagged)


def with_tagged(rack: Sequence[AdapterChoice], tagged: Sequence[AdapterChoice]) -> tuple[AdapterChoice, ...]:
    """The rack's adapters and the tags', without those at strength 0.

    Where a slot that takes part has the adapter, that slot counts, at strength 0 too; of several tags the first.
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
    raise ValueError(f"prompt: no adapter named {shown(name)} for <lora:...>{hint}")


def _weight_of_tag(tag: LoraTag, parts: Parts) -> float | dict[str, float]:
    if not isinstance(tag.weight, Mapping):
        return check_number(f"prompt, <lora:{tag.name}>", tag.weight, low=-MAX_STRENGTH, high=MAX_STRENGTH)
    weights: dict[str, float] = {}
    for part, value in tag.weight.items():
        strength = check_number(f"prompt, <lora:{tag.name}>, {part}", value, low=-MAX_STRENGTH, high=MAX_STRENGTH)
        own = {"denoiser": (parts.denoiser,), "text_encoders": parts.text_encoders}.get(part, (part,))
        weights |= dict.fromkeys(own, strength)
    return weights
