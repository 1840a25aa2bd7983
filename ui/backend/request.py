"""One press of Generate, checked: what a browser sends is not to be trusted, whatever the widgets allow."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dora_diffusion.functional.blend_modes import ADDITIVE, MODES
from dora_diffusion.generation.generate import Canvas, GenerationSettings
from dora_diffusion.generation.samplers import DEFAULT as DEFAULT_SAMPLER
from dora_diffusion.generation.samplers import SAMPLERS
from dora_diffusion.utils.images import read_image

MAX_STRENGTH = 2.0
MAX_STEPS = 100
MAX_GUIDANCE = 30.0
MAX_SEED = 2**32 - 1
MAX_PROMPT = 2000
MAX_COUNT = 16
MAX_CURVE_POINTS = 32
MIN_SIDE, MAX_SIDE = 64, 2048
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Curve = tuple[tuple[float, float], ...]
NAMED_CURVES: Mapping[str, Curve | None] = {
    "constant": None,
    "fade in": ((0.0, 0.0), (1.0, 1.0)),
    "fade out": ((0.0, 1.0), (1.0, 0.0)),
    "early": ((0.0, 1.0), (0.4, 1.0), (0.6, 0.0)),
    "late": ((0.4, 0.0), (0.6, 1.0)),
}


@dataclass(frozen=True)
class SlotValues:
    """The widgets of one slot of the rack, as they came from the browser.

    Attributes:
        file: a name of the library, or None for an empty slot.
        enabled: whether the slot takes part.
        strength: for all components, unless `apart`.
        apart: whether the components have strengths of their own.
        denoiser, text_encoders: those strengths.
        blocks: a factor on the denoiser's strength for each of `Parts.blocks`, 1 leaves it; None leaves all.
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


@dataclass(frozen=True)
class Block:
    """A group of the denoiser's layers: what to call it, and what the paths of its layers begin with."""

    label: str
    prefixes: tuple[str, ...]


@dataclass(frozen=True)
class Parts:
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

    def weight_on(self, paths: Collection[str], parts: Parts) -> float | dict[str, float]:
        """The strength without blocks of the base where the adapter, whose layers are `paths`, has none.

        The rack and the API name every block of the base; an adapter of text encoders, say, has nothing there.
        """
        if not isinstance(self.weight, dict):
            return self.weight
        blocks = {prefix for block in parts.blocks for prefix in block.prefixes}
        return {
            part: strength
            for part, strength in self.weight.items()
            if part not in blocks or any(path.startswith(f"{part}.") for path in paths)
        }


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
            raise ValueError(f"blend: got {shown(self.blend)}, expected one of {', '.join(MODES)}")
        check_whole("count", self.count, low=1, high=MAX_COUNT)
        check_whole("last seed", self.settings.seed + self.count - 1, low=0, high=2**63 - 1)
        moving = next((choice for choice in self.adapters if choice.draws and (choice.curve or choice.mask)), None)
        if self.blend != ADDITIVE and moving is not None:
            thing = "a curve" if moving.curve else "a mask"
            raise ValueError(
                f"{moving.file}: has {thing}, and the mode {self.blend!r} is folded into the weights before drawing; "
                "take it off or blend additively"
            )


@dataclass(frozen=True)
class DetailValues:
    """The further widgets of the form, as they came from the browser; None is the model's own."""

    sampler: Any = DEFAULT_SAMPLER
    width: Any = None
    height: Any = None
    strength: Any = None


def check_number(name: str, value: object, *, low: float, high: float) -> float:
    """The value as a float.

    Raises:
        ValueError: not a finite number of [low, high].
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
        return float(value)
    raise ValueError(f"{name}: got {shown(value)}, expected a number from {low:g} to {high:g}")


def check_whole(name: str, value: object, *, low: int, high: int) -> int:
    """The value as an int.

    Raises:
        ValueError: not a whole number of [low, high].
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high and value == int(value):
        return int(value)
    raise ValueError(f"{name}: got {shown(value)}, expected a whole number from {low} to {high}")


def check_text(name: str, value: object) -> str:
    """The value as text without surrounding blanks; None counts as empty.

    Raises:
        ValueError: not text, or longer than MAX_PROMPT.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{name}: got {shown(value)}, expected text")
    if len(value) > MAX_PROMPT:
        raise ValueError(f"{name}: got {len(value)} characters, expected at most {MAX_PROMPT}")
    return value.strip()


def check_name(what: str, value: object) -> str:
    """A name that can be a file's, without folders.

    Raises:
        ValueError: it is not of letters, digits, `.`, `_` and `-`, or too long.
    """
    if isinstance(value, str) and _NAME.fullmatch(value.strip()):
        return value.strip()
    got = "nothing" if value in (None, "") else repr(value)[:60]
    raise ValueError(f"{what}: got {got}, expected up to 64 letters, digits, dots, - and _, a letter or digit first")


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
        width=_check_side("width", details.width),
        height=_check_side("height", details.height),
        sampler=_check_sampler(details.sampler),
        strength=None
        if details.strength is None
        else check_number("denoising strength", details.strength, low=0.01, high=1.0),
    )


def _check_side(name: str, value: object) -> int | None:
    side = None if value in (None, 0) else check_whole(name, value, low=MIN_SIDE, high=MAX_SIDE)
    if side is not None and side % 8:
        raise ValueError(f"{name}: got {side}, expected a multiple of 8 from {MIN_SIDE} to {MAX_SIDE}")
    return side


def _check_sampler(value: object) -> str:
    if value is None or value == "":
        return DEFAULT_SAMPLER
    if not isinstance(value, str) or value not in SAMPLERS:
        raise ValueError(f"sampler: got {shown(value)}, expected one of {', '.join(SAMPLERS)}")
    return value


def check_canvas(image: object, mask: object = None) -> Canvas | None:
    """A picture to start from, and where it is drawn anew; None without a picture. Masks are white there.

    Raises:
        ValueError: not a picture, or a mask without a picture to draw in.
    """
    picture, area = check_picture("picture", image), check_picture("mask", mask)
    if picture is None and area is not None:
        raise ValueError("mask: there is no picture to draw in; give one, or take the mask off")
    if picture is None:
        return None
    return Canvas(picture.convert("RGB"), None if area is None else area.convert("L"))


def check_picture(name: str, value: object) -> Image.Image | None:
    """A picture out of a widget: PIL, or a path that Gradio gave to an upload. None stays None.

    Raises:
        ValueError: not a picture, or one with more pixels than are drawn here at most.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str | Path):
        try:
            with Image.open(value, formats=["PNG", "JPEG", "WEBP"]) as opened:
                size = opened.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{name}: not a picture that can be read ({type(error).__name__})") from None
        _check_pixels(name, size)
        try:
            return read_image(value)  # turned and laid on white as everywhere
        except ValueError as error:
            reason = str(error).rpartition(f"{Path(value).name}: ")[2]
            raise ValueError(f"{name}: not a picture that can be read ({reason})") from None
    if not isinstance(value, Image.Image):
        raise ValueError(f"{name}: got {shown(value)}, expected a picture")
    _check_pixels(name, value.size)
    return value


def _check_pixels(name: str, size: tuple[int, int]) -> None:
    most = 4 * MAX_SIDE
    if not all(0 < side <= most for side in size):
        raise ValueError(f"{name}: got {size[0]} x {size[1]} pixels, expected at most {most} a side")


def parse_curve(text: object, *, name: str = "curve") -> Curve | None:
    """A strength's factor over the run: "0:0, 0.3:1" or a name of NAMED_CURVES; None is constant.

    Raises:
        ValueError: neither, progress that does not rise in 0..1, or a factor outside -2..2.
    """
    if text is None or (isinstance(text, str) and not text.strip()):
        return None
    if not isinstance(text, str):
        raise ValueError(f"{name}: got {shown(text)}, expected text such as '0:0, 0.3:1'")
    if text.strip().lower() in NAMED_CURVES:
        return NAMED_CURVES[text.strip().lower()]
    pieces = [piece for piece in text.split(",") if piece.strip()]
    if not 1 <= len(pieces) <= MAX_CURVE_POINTS:
        raise ValueError(f"{name}: got {len(pieces)} points, expected 1 to {MAX_CURVE_POINTS}")
    points = tuple(_curve_point(piece, name) for piece in pieces)
    for before, after in zip(points, points[1:], strict=False):
        if after[0] < before[0]:
            raise ValueError(f"{name}: progress falls from {before[0]:g} to {after[0]:g}; expected it to rise")
    return points


def _curve_point(piece: str, name: str) -> tuple[float, float]:
    progress, _, factor = piece.partition(":")
    try:
        point = float(progress), float(factor)
    except ValueError:
        raise ValueError(
            f"{name}: got {shown(piece.strip())}, expected points such as '0:0, 0.3:1' or one of "
            f"{', '.join(NAMED_CURVES)}"
        ) from None
    check_number(f"{name}, progress", point[0], low=0.0, high=1.0)
    check_number(f"{name}, factor", point[1], low=-MAX_STRENGTH, high=MAX_STRENGTH)
    return point


def curve_text(curve: Sequence[Sequence[float]] | None) -> str:
    """What `parse_curve` reads back as this curve: its name, or its points."""
    points = None if curve is None else tuple((float(progress), float(factor)) for progress, factor in curve)
    for name, named in NAMED_CURVES.items():
        if named == points:
            return name
    return ", ".join(f"{_shortest(progress)}:{_shortest(factor)}" for progress, factor in points or ())


def _shortest(value: float) -> str:
    """As few digits as read back as the very same number."""
    return repr(value).removesuffix(".0")


def taking_part(slots: Sequence[SlotValues]) -> list[SlotValues]:
    """Slots that are filled and on, or of these the solo ones where any is solo; whatever their strengths."""
    filled = [slot for slot in slots if slot.file and slot.enabled]
    return [slot for slot in filled if slot.solo] or filled


def check_adapters(slots: Sequence[SlotValues], parts: Parts) -> tuple[AdapterChoice, ...]:
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


def _check_weight(number: int, slot: SlotValues, parts: Parts) -> float | dict[str, float]:
    factors = _check_blocks(number, slot.blocks, parts)
    if not slot.apart:
        strength = check_number(f"slot {number}, strength", slot.strength, low=-MAX_STRENGTH, high=MAX_STRENGTH)
        if not factors:
            return strength
        return {part: strength for part in (parts.denoiser, *parts.text_encoders)} | _times(strength, factors)
    wanted = {parts.denoiser: slot.denoiser} | dict.fromkeys(parts.text_encoders, slot.text_encoders)
    strengths = {
        part: check_number(f"slot {number}, {part} strength", value, low=-MAX_STRENGTH, high=MAX_STRENGTH)
        for part, value in wanted.items()
    }
    return strengths | _times(strengths[parts.denoiser], factors)


def _check_blocks(number: int, blocks: Sequence[float] | None, parts: Parts) -> dict[str, float]:
    """Prefix -> factor of the blocks that differ from 1."""
    if blocks is None:
        return {}
    if len(blocks) != len(parts.blocks):
        raise ValueError(f"slot {number}, blocks: got {len(blocks)} factors, expected {len(parts.blocks)}")
    factors: dict[str, float] = {}
    for block, value in zip(parts.blocks, blocks, strict=True):
        factor = check_number(f"slot {number}, {block.label}", value, low=-MAX_STRENGTH, high=MAX_STRENGTH)
        if factor != 1:
            factors |= dict.fromkeys(block.prefixes, factor)
    return factors


def _times(strength: float, factors: Mapping[str, float]) -> dict[str, float]:
    return {prefix: strength * factor for prefix, factor in factors.items()}


def shown(value: object) -> str:
    """A value that was sent, short enough for one line."""
    return "nothing" if value is None else repr(value)[:40]
