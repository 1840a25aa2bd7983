"""The `parameters` text of A1111 and its kin, taken apart.

a cat (red:1.2) <lora:ink:0.8>
Negative prompt: dog
Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1, Size: 512x512, Lora hashes: "ink: 0123456789"
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from dora_diffusion.generation.generate import GenerationSettings
from dora_diffusion.generation.prompts import LoraTag, parse_prompt, without_foreign_tags
from dora_diffusion.generation.samplers import DEFAULT as DEFAULT_SAMPLER
from dora_diffusion.generation.samplers import sampler_of_title
from dora_diffusion.utils.checks import check_number, check_whole

MAX_CHARACTERS = 100_000
MIN_SIDE = 64
Value = TypeVar("Value")
_NEGATIVE = "Negative prompt:"
_FACT = re.compile(r'(\w[\w \-/]{0,60}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_ALL_HASHES = re.compile(r"\bHashes: ?(\{[^{}]{0,8000}\})")
_SIZE = re.compile(r"(\d{1,5})\s*x\s*(\d{1,5})")
# Settings of other tools that change pictures and that nothing here does.
_NOT_DONE_HERE = ("Clip skip", "Hires upscale", "Refiner", "ControlNet 0", "ADetailer model", "Variation seed", "VAE")


@dataclass(frozen=True)
class Parameters:
    """A text, taken apart.

    Attributes:
        prompt: without tags.
        negative: as it stands.
        tags: of the prompt, in order.
        facts: "Steps" -> "20" and so on, as written.
        hashes: an adapter's name -> its hash, as written.
        notes: what could not be read, one line each.
    """

    prompt: str
    negative: str = ""
    tags: tuple[LoraTag, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def parse_infotext(text: str) -> Parameters:
    """Take a `parameters` text apart; whatever it is, something comes of it.

    Raises:
        ValueError: longer than any such text is.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"parameters: got {len(text)} characters, expected at most {MAX_CHARACTERS}")
    lines = text.strip().splitlines()
    last = lines[-1] if lines else ""
    hashes = _civitai_hashes(last)
    facts = {key: _unquoted(value) for key, value in _FACT.findall(_ALL_HASHES.sub("", " ".join(last.split())))}
    if "Steps" in facts or len(facts) >= 3:
        lines = lines[:-1]
    else:
        facts, hashes = {}, {}
    start = next((index for index, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    positive = "\n".join(lines[:start]).strip()
    negative = "\n".join(lines[start:]).removeprefix(_NEGATIVE).strip()
    hashes |= _pairs(facts.get("Lora hashes", ""))
    positive, foreign = without_foreign_tags(positive)
    negative, more = without_foreign_tags(negative)
    try:
        prompt = parse_prompt(positive)
        return Parameters(prompt.text, negative, prompt.tags, facts, hashes, (*foreign, *more))
    except ValueError as error:
        return Parameters(positive, negative, (), facts, hashes, (*foreign, *more, str(error)))


@dataclass(frozen=True)
class Limits:
    """The most that may be drawn: of steps, guidance, seed, pixels a side, characters of a prompt."""

    steps: int = 1000
    guidance: float = 100.0
    seed: int = 2**63 - 1
    side: int = 4096
    prompt: int = MAX_CHARACTERS


LIBRARY = Limits()


def settings_of(parameters: Parameters, limits: Limits = LIBRARY) -> tuple[GenerationSettings, tuple[str, ...]]:
    """What can be drawn here of it, and a line for everything that cannot."""
    facts, notes = parameters.facts, [*parameters.notes]

    def taken(check: Callable[[], Value], instead: Value) -> Value:
        try:
            return check()
        except ValueError as error:
            notes.append(f"{error}; {instead if instead not in (None, '') else 'nothing'} is taken instead")
            return instead

    def whole(key: str, high: int, instead: int, *, low: int = 0) -> int:
        if key not in facts:
            return instead
        return taken(lambda: check_whole(key, _number(facts[key]), low=low, high=high), instead)

    width, height = (taken(lambda side=side: _check_side(side, limits.side), None) for side in _sides(facts))  # type: ignore[misc]
    guidance = 4.0
    if "CFG scale" in facts:
        value = _number(facts["CFG scale"])
        guidance = taken(lambda: check_number("CFG scale", value, low=0.0, high=limits.guidance), guidance)
    settings = GenerationSettings(
        taken(lambda: _check_length("prompt", parameters.prompt, limits.prompt), ""),
        taken(lambda: _check_length("negative prompt", parameters.negative, limits.prompt), ""),
        seed=whole("Seed", limits.seed, 0),
        steps=whole("Steps", limits.steps, 20, low=1),
        guidance_scale=guidance,
        sampler=_sampler(facts, notes),
        width=width,
        height=height,
    )
    notes += [f"{key}: {facts[key][:60]} is not done here" for key in _NOT_DONE_HERE if key in facts]
    return settings, tuple(notes)


def _sampler(facts: Mapping[str, str], notes: list[str]) -> str:
    title, schedule = facts.get("Sampler", ""), facts.get("Schedule type", "")
    if not title:
        return DEFAULT_SAMPLER
    titles = [f"{title} {schedule}"] if schedule.lower() not in ("", "automatic") else []
    found = next((name for one in (*titles, title) if (name := sampler_of_title(one)) is not None), None)
    if found is None:
        notes.append(f"Sampler: {title[:60]} is not known here; the model's own is taken instead")
    elif titles and sampler_of_title(titles[0]) is None and schedule.lower() not in ("uniform", "normal"):
        notes.append(f"Schedule type: {schedule[:60]} is not known here; {title} without it is taken instead")
    return DEFAULT_SAMPLER if found is None else found


def _sides(facts: Mapping[str, str]) -> tuple[tuple[str, int] | None, tuple[str, int] | None]:
    match = _SIZE.fullmatch(facts.get("Size", "").strip())
    return (None, None) if match is None else (("width", int(match[1])), ("height", int(match[2])))


def _check_length(name: str, text: str, most: int) -> str:
    if len(text) > most:
        raise ValueError(f"{name}: got {len(text)} characters, expected at most {most}")
    return text


def _check_side(side: tuple[str, int] | None, most: int) -> int | None:
    if side is None:
        return None
    name, pixels = side
    if pixels % 8 or not MIN_SIDE <= pixels <= most:
        raise ValueError(f"{name}: got {pixels}, expected a multiple of 8 from {MIN_SIDE} to {most}")
    return pixels


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _unquoted(value: str) -> str:
    if not (len(value) > 1 and value.startswith('"') and value.endswith('"')):
        return value.strip()
    try:
        return str(json.loads(value))
    except ValueError:
        return value.strip('"')


def _pairs(text: str) -> dict[str, str]:
    """ "ink: 0123456789, lego: abcdef0123" by name."""
    pieces = (piece.rpartition(":") for piece in text.split(","))
    return {name.strip(): hash.strip() for name, colon, hash in pieces if colon}


def _civitai_hashes(line: str) -> dict[str, str]:
    """`Hashes: {"model": "...", "lora:ink": "..."}` by the names of the adapters."""
    match = _ALL_HASHES.search(line)
    try:
        found = json.loads(match[1]) if match else {}
    except ValueError:
        return {}
    kinds = ("lora:", "LORA:", "lyco:")
    return {
        key.partition(":")[2]: value for key, value in found.items() if key.startswith(kinds) and isinstance(value, str)
    }
