"""`<lora:name:0.8>` tags of a prompt as adapters of the library, beside those of the rack."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dora_diffusion.prompts import LoraTag, parse_prompt
from ui.request import MAX_STRENGTH, AdapterChoice, DrawRequest, Parts, check_number, shown


@dataclass(frozen=True)
class Resolved:
    """A request whose tags have become adapters.

    Attributes:
        request: without tags in its prompt, with their adapters after the rack's.
        tags: as the prompt had them.
    """

    request: DrawRequest
    tags: tuple[LoraTag, ...]


def resolve_tags(request: DrawRequest, names: Sequence[str], parts: Parts) -> Resolved:
    """Let `<lora:name:0.8>` tags of the prompt become adapters; where the rack has the adapter, the rack counts.

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
    if not prompt.tags:
        return Resolved(request, ())
    choices = {choice.file: choice for choice in request.adapters}
    for tag in prompt.tags:
        file = _file_of_tag(tag.name, names)
        choice = AdapterChoice(file, _weight_of_tag(tag, parts))
        is_something = any(choice.weight.values()) if isinstance(choice.weight, dict) else choice.weight
        if is_something:
            choices.setdefault(file, choice)
    settings = replace(request.settings, prompt=prompt.text)
    return Resolved(replace(request, settings=settings, adapters=tuple(choices.values())), prompt.tags)


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
    told = f"; nearest: {', '.join(nearest)}" if nearest else f"; there are {len(names)} adapters"
    raise ValueError(f"prompt: no adapter named {shown(name)} for <lora:...>{told}")


def _weight_of_tag(tag: LoraTag, parts: Parts) -> float | dict[str, float]:
    if not isinstance(tag.weight, Mapping):
        return check_number(f"prompt, <lora:{tag.name}>", tag.weight, low=-MAX_STRENGTH, high=MAX_STRENGTH)
    weights: dict[str, float] = {}
    for part, value in tag.weight.items():
        strength = check_number(f"prompt, <lora:{tag.name}>, {part}", value, low=-MAX_STRENGTH, high=MAX_STRENGTH)
        own = {"denoiser": (parts.denoiser,), "text_encoders": parts.text_encoders}.get(part, (part,))
        weights |= dict.fromkeys(own, strength)
    return weights
