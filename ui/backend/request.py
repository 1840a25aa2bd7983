"""One press of Generate, checked: what a browser sends is not to be trusted, whatever the widgets allow."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from PIL import Image

from dora_diffusion.adapters.mixing import without_empty_blocks
from dora_diffusion.functional.blend_modes import ADDITIVE, MODES
from dora_diffusion.generation.curves import Curve, parse_curve
from dora_diffusion.generation.generate import Canvas, GenerationSettings
from dora_diffusion.generation.samplers import DEFAULT as DEFAULT_SAMPLER
from dora_diffusion.utils.text import shown_value
from ui.backend.checks import (
    MAX_COUNT,
    MAX_GUIDANCE,
    MAX_SEED,
    MAX_STEPS,
    check_number,
    check_sampler,
    check_side,
    check_strength_number,
    check_text,
    check_whole,
)
from ui.backend.picture_checks import check_picture


@dataclass(frozen=True, kw_only=True)
class SlotValues:
    """The widgets of one slot of the rack, as they came from the browser.

    Attributes:
        file: a name of the library, or None for an empty slot.
        enabled: whether the slot takes part.
        strength: for all components, unless `apart`.
        apart: whether the components have strengths of their own.
        denoiser, text_encoders: those strengths.
        blocks: a factor on the denoiser's strength for each of `BaseParts.blocks`, 1 leaves it; None leaves all.
        curve: over the run, as `parse_curve` takes it; "" is constant.
        mask: white where the adapter draws; a picture, a path to one that the app itself wrote, or None for everywhere.
        solo: while any slot that takes part is solo, only such slots do.
    """

    file: str | None
    enabled: bool
    strength: float
    apart: bool
    denoiser: float
    text_encoders: float
    blocks: tuple[float, ...] | None = None
    curve: str = ""
    mask: Image.Image | Path | str | None = None
    solo: bool = False

    @classmethod
    def of(cls, file: str | None, strength: float, *, curve: str = "") -> Self:
        """A slot that is on, with one strength for all components, everywhere in the picture."""
        return cls(
            file=file,
            enabled=True,
            strength=strength,
            apart=False,
            denoiser=strength,
            text_encoders=strength,
            curve=curve,
        )


@dataclass(frozen=True)
class Block:
    """A group of the denoiser's layers: what to call it, and what the paths of its layers begin with."""

    label: str
    prefixes: tuple[str, ...]


@dataclass(frozen=True)
class BaseParts:
    """What the base calls its components: `unet` or `transformer`, its text encoders, and the denoiser's blocks."""

    denoiser: str
    text_encoders: tuple[str, ...]
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter that takes part.

    Attributes:
        file: its library name.
        weight: its strength, or one strength per component and block.
        curve: (progress, factor) points over the run; None is constant.
        mask: L, white where it draws; None is everywhere.
    """

    file: str
    weight: float | dict[str, float]
    curve: Curve | None = None
    mask: Image.Image | None = None

    @property
    def draws(self) -> bool:
        """Whether any of its strengths is other than 0."""
        return any(self.weight.values()) if isinstance(self.weight, dict) else bool(self.weight)

    def weight_on(self, paths: Collection[str], parts: BaseParts) -> float | dict[str, float]:
        """The strength without blocks of the base where the adapter, whose layers are `paths`, has none.

        The rack and the API name every block of the base; an adapter of text encoders, say, has nothing there.
        """
        blocks = {prefix for block in parts.blocks for prefix in block.prefixes}
        return without_empty_blocks(self.weight, paths, blocks)


@dataclass(frozen=True)
class DrawRequest:
    """Everything that decides pictures, apart from the base.

    Attributes:
        settings: of the first picture; its prompt may hold `<lora:name:0.8>` tags.
        adapters: who takes part, in an order that counts for some modes; one at strength 0 is not drawn, and keeps the
            prompt's tags from drawing it.
        blend: a key of `blend_modes.MODES`.
        count: how many pictures; each has the seed after the one before.
        canvas: a picture to start from, or None.
    """

    settings: GenerationSettings
    adapters: tuple[AdapterChoice, ...] = ()
    blend: str = ADDITIVE
    count: int = 1
    canvas: Canvas | None = None

    def __post_init__(self) -> None:
        """A ValueError of one line for a mode, a number of pictures or a mixture that cannot be."""
        if self.blend not in MODES:
            raise ValueError(f"blend: got {shown_value(self.blend)}, expected one of {', '.join(MODES)}")
        check_whole("count", self.count, low=1, high=MAX_COUNT)
        check_whole("last seed", self.settings.seed + self.count - 1, low=0, high=2**63 - 1)
        moving = next((choice for choice in self.adapters if choice.draws and (choice.curve or choice.mask)), None)
        if self.blend != ADDITIVE and moving is not None:
            thing = "a curve" if moving.curve else "a mask"
            raise ValueError(
                f"{moving.file}: has {thing}, and the mode {self.blend!r} is folded into the weights before drawing; "
                "take it off or blend additively"
            )


@dataclass(frozen=True, kw_only=True)
class DetailValues:
    """The further widgets of the form, as they came from the browser; None is the model's own."""

    sampler: Any = DEFAULT_SAMPLER
    width: Any = None
    height: Any = None
    strength: Any = None


def check_settings(
    prompt: object,
    negative: object,
    seed: object,
    steps: object,
    guidance: object,
    details: DetailValues = DetailValues(),  # noqa: B008  (frozen)
) -> GenerationSettings:
    """The form above the rack; `ValueError` names the field that is wrong."""
    return GenerationSettings(
        prompt=check_text("prompt", prompt),
        negative_prompt=check_text("negative prompt", negative),
        seed=check_whole("seed", seed, low=0, high=MAX_SEED),
        steps=check_whole("steps", steps, low=1, high=MAX_STEPS),
        guidance_scale=check_number("guidance", guidance, low=0.0, high=MAX_GUIDANCE),
        width=check_side("width", details.width),
        height=check_side("height", details.height),
        sampler=check_sampler(details.sampler),
        strength=None
        if details.strength is None
        else check_number("denoising strength", details.strength, low=0.01, high=1.0),
    )


def taking_part(slots: Sequence[SlotValues]) -> list[SlotValues]:
    """Slots that are filled and on, or of these the solo ones where any is solo; whatever their strengths."""
    filled = [slot for slot in slots if slot.file and slot.enabled]
    return [slot for slot in filled if slot.solo] or filled


def check_adapters(slots: Sequence[SlotValues], parts: BaseParts) -> tuple[AdapterChoice, ...]:
    """Slots that take part, those at strength 0 too, in the rack's order; strengths by the base's own parts.

    Raises:
        ValueError: a strength outside -2..2, a curve or mask that is none, or one file in two slots.
    """
    chosen: dict[str, int] = {}
    choices = []
    active = [(number, slot) for number, slot in enumerate(slots, start=1) if slot.file and slot.enabled]
    alone = any(slot.solo for _, slot in active)
    for number, slot in active:
        file = check_text(f"slot {number}, adapter", slot.file)
        if file in chosen:
            raise ValueError(f"{file}: in slots {chosen[file]} and {number}, expected each adapter once")
        chosen[file] = number
        weight = _check_weight(number, slot, parts)
        curve = parse_curve(slot.curve, name=f"slot {number}, curve")
        mask = check_picture(f"slot {number}, mask", slot.mask)
        if slot.solo or not alone:
            choices.append(AdapterChoice(file, weight, curve, None if mask is None else mask.convert("L")))
    return tuple(choices)


def _check_weight(number: int, slot: SlotValues, parts: BaseParts) -> float | dict[str, float]:
    factors = _check_blocks(number, slot.blocks, parts)
    if not slot.apart:
        strength = check_strength_number(f"slot {number}, strength", slot.strength)
        if not factors:
            return strength
        return {part: strength for part in (parts.denoiser, *parts.text_encoders)} | _times(strength, factors)
    wanted = {parts.denoiser: slot.denoiser} | dict.fromkeys(parts.text_encoders, slot.text_encoders)
    strengths = {
        part: check_strength_number(f"slot {number}, {part} strength", value) for part, value in wanted.items()
    }
    return strengths | _times(strengths[parts.denoiser], factors)


def _check_blocks(number: int, blocks: Sequence[float] | None, parts: BaseParts) -> dict[str, float]:
    """Prefix -> factor of the blocks that differ from 1."""
    if blocks is None:
        return {}
    if len(blocks) != len(parts.blocks):
        raise ValueError(f"slot {number}, blocks: got {len(blocks)} factors, expected {len(parts.blocks)}")
    factors: dict[str, float] = {}
    for block, value in zip(parts.blocks, blocks, strict=True):
        factor = check_strength_number(f"slot {number}, {block.label}", value)
        if factor != 1:
            factors |= dict.fromkeys(block.prefixes, factor)
    return factors


def _times(strength: float, factors: Mapping[str, float]) -> dict[str, float]:
    return {prefix: strength * factor for prefix, factor in factors.items()}
