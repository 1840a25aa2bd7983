"""One press of Generate, checked: what a browser sends is not to be trusted, whatever the widgets allow."""

from collections.abc import Sequence
from dataclasses import dataclass

from dora_diffusion.generation import GenerationSettings

MAX_STRENGTH = 2.0
MAX_STEPS = 100
MAX_GUIDANCE = 30.0
MAX_SEED = 2**32 - 1
MAX_PROMPT = 2000


@dataclass(frozen=True)
class SlotValues:
    """The widgets of one slot of the rack, as they came from the browser.

    Attributes:
        file: a name of the library, or None for an empty slot.
        enabled: whether the slot takes part.
        strength: for all components, unless `apart`.
        apart: whether the components have strengths of their own.
        denoiser, text_encoders: those strengths.
    """

    file: str | None
    enabled: bool
    strength: float
    apart: bool
    denoiser: float
    text_encoders: float


@dataclass(frozen=True)
class Parts:
    """What the base calls its components: `unet` or `transformer`, and its text encoders."""

    denoiser: str
    text_encoders: tuple[str, ...]


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter that takes part: its library name and its strength, or one strength per component."""

    file: str
    weight: float | dict[str, float]


@dataclass(frozen=True)
class DrawRequest:
    """Everything that decides a picture, apart from the base."""

    settings: GenerationSettings
    adapters: tuple[AdapterChoice, ...]


def check_number(name: str, value: object, *, low: float, high: float) -> float:
    """The value as a float.

    Raises:
        ValueError: not a finite number of [low, high].
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
        return float(value)
    raise ValueError(f"{name}: got {_shown(value)}, expected a number from {low:g} to {high:g}")


def check_whole(name: str, value: object, *, low: int, high: int) -> int:
    """The value as an int.

    Raises:
        ValueError: not a whole number of [low, high].
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high and value == int(value):
        return int(value)
    raise ValueError(f"{name}: got {_shown(value)}, expected a whole number from {low} to {high}")


def check_text(name: str, value: object) -> str:
    """The value as text without surrounding blanks; None counts as empty.

    Raises:
        ValueError: not text, or longer than MAX_PROMPT.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{name}: got {_shown(value)}, expected text")
    if len(value) > MAX_PROMPT:
        raise ValueError(f"{name}: got {len(value)} characters, expected at most {MAX_PROMPT}")
    return value.strip()


def check_settings(
    prompt: object, negative: object, seed: object, steps: object, guidance: object
) -> GenerationSettings:
    """The form above the rack; `ValueError` names the field that is wrong."""
    return GenerationSettings(
        prompt=check_text("prompt", prompt),
        negative_prompt=check_text("negative prompt", negative),
        seed=check_whole("seed", seed, low=0, high=MAX_SEED),
        steps=check_whole("steps", steps, low=1, high=MAX_STEPS),
        guidance_scale=check_number("guidance", guidance, low=0.0, high=MAX_GUIDANCE),
    )


def check_adapters(slots: Sequence[SlotValues], parts: Parts) -> tuple[AdapterChoice, ...]:
    """Slots that are filled, enabled and not at strength 0, in the rack's order; strengths by the base's own parts.

    Raises:
        ValueError: a strength outside -2..2, or one file in two slots.
    """
    chosen: dict[str, int] = {}
    choices = []
    for number, slot in enumerate(slots, start=1):
        if not slot.file or not slot.enabled:
            continue
        if slot.file in chosen:
            raise ValueError(f"{slot.file}: in slots {chosen[slot.file]} and {number}, expected each adapter once")
        chosen[slot.file] = number
        weight = _check_weight(number, slot, parts)
        if any(weight.values()) if isinstance(weight, dict) else weight:
            choices.append(AdapterChoice(slot.file, weight))
    return tuple(choices)


def _check_weight(number: int, slot: SlotValues, parts: Parts) -> float | dict[str, float]:
    if not slot.apart:
        return check_number(f"slot {number}, strength", slot.strength, low=-MAX_STRENGTH, high=MAX_STRENGTH)
    wanted = {parts.denoiser: slot.denoiser} | dict.fromkeys(parts.text_encoders, slot.text_encoders)
    return {
        part: check_number(f"slot {number}, {part} strength", value, low=-MAX_STRENGTH, high=MAX_STRENGTH)
        for part, value in wanted.items()
    }


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)[:40]
