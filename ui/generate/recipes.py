"""What decides pictures, apart from widgets: settings, slots, mode."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dora_diffusion.functional.blend_modes import ADDITIVE
from dora_diffusion.generation.curves import Curve, curve_text
from dora_diffusion.generation.generate import GenerationSettings
from dora_diffusion.generation.img2img import Canvas
from ui.backend.checks import MAX_STRENGTH
from ui.backend.request import BaseParts, DrawRequest, SlotValues, check_adapters

_ENCODERS, _DENOISER = "text_encoders", "denoiser"


@dataclass(frozen=True)
class DrawRecipe:
    """A state of the form and the rack.

    Attributes:
        settings: of the drawing.
        slots: of the rack.
        blend: how adapters are mixed.
    """

    settings: GenerationSettings
    slots: tuple[SlotValues, ...] = ()
    blend: str = ADDITIVE

    def request(self, parts: BaseParts, canvas: Canvas | None = None) -> DrawRequest:
        """One picture of it, checked; `ValueError` names the field that is wrong."""
        return DrawRequest(self.settings, check_adapters(self.slots, parts), self.blend, canvas=canvas)


@dataclass(frozen=True)
class Placed:
    """A slot of the rack, and what of a picture's adapter it could not hold, one line each."""

    slot: SlotValues
    notes: tuple[str, ...]


def placed(file: str, weight: float | Mapping[str, float], parts: BaseParts, *, curve: Curve | None = None) -> Placed:
    """An adapter as a slot: its strength or strengths, put to the components and blocks of the base.

    Args:
        file: its library name.
        weight: as a picture tells it; parts may be the base's own names, or "denoiser" and "text_encoders".
        parts: of the base.
        curve: over the run.
    """
    notes: list[str] = []
    if not isinstance(weight, Mapping):
        strength = _within(file, "strength", weight, notes)
        return Placed(SlotValues.of(file, strength, curve=_text(curve)), tuple(notes))
    left = _by_own_names(weight, parts)
    denoiser = _within(file, parts.denoiser, left.pop(parts.denoiser, 0.0), notes)
    text = _of_encoders(file, left, parts, notes)
    blocks = _of_blocks(file, left, denoiser, parts, notes)
    notes += [f"{file}: the base here has no part {part[:80]} to give a strength of {left[part]:g}" for part in left]
    is_apart = bool(parts.text_encoders) and denoiser != text
    slot = SlotValues.of(file, denoiser, curve=_text(curve))
    return Placed(replace(slot, apart=is_apart, text_encoders=text, blocks=blocks), tuple(notes))


def _text(curve: Curve | None) -> str:
    return "" if curve is None else curve_text(curve)


def _by_own_names(weight: Mapping[str, float], parts: BaseParts) -> dict[str, float]:
    own: Mapping[str, tuple[str, ...]] = {_DENOISER: (parts.denoiser,), _ENCODERS: parts.text_encoders}
    return {name: value for part, value in weight.items() for name in own.get(part, (part,))}


def _of_encoders(file: str, left: dict[str, float], parts: BaseParts, notes: list[str]) -> float:
    """One strength for all text encoders: the rack has no more."""
    values = [left.pop(part, 0.0) for part in parts.text_encoders]
    if len(set(values)) > 1:
        listed = ", ".join(f"{value:g}" for value in values)
        notes.append(f"{file}: its text encoders had strengths of {listed}; the first is taken for all")
    return _within(file, "text encoders", values[0], notes) if values else 0.0


def _of_blocks(
    file: str, left: dict[str, float], denoiser: float, parts: BaseParts, notes: list[str]
) -> tuple[float, ...] | None:
    """Factors on the denoiser's strength, as the rack has them; None where no block differs."""
    factors = []
    for block in parts.blocks:
        values = [left.pop(prefix, denoiser) for prefix in block.prefixes]
        factor = values[0] / denoiser if denoiser else 1.0
        if any(value != values[0] for value in values) or (not denoiser and values[0]):
            notes.append(f"{file}: the strengths inside {block.label} cannot be set in the rack; look at them")
        # a quotient of two decimals: what people typed has few places
        factors.append(_within(file, block.label, round(factor, 9), notes))
    return tuple(factors) if any(factor != 1 for factor in factors) else None


def _within(file: str, what: str, value: float, notes: list[str]) -> float:
    if -MAX_STRENGTH <= value <= MAX_STRENGTH:
        return float(value)
    nearest = max(-MAX_STRENGTH, min(MAX_STRENGTH, value)) if value == value else 0.0
    notes.append(
        f"{file}: {what} {value:g} is beyond the rack's {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}; {nearest:g} is taken"
    )
    return nearest


def cut_to_rack(recipe: DrawRecipe, most: int) -> tuple[DrawRecipe, tuple[str, ...]]:
    """As many slots as the rack has, and a line for those that are left."""
    if len(recipe.slots) <= most:
        return recipe, ()
    left = ", ".join(str(slot.file) for slot in recipe.slots[most:])
    return replace(recipe, slots=recipe.slots[:most]), (f"The rack has {most} slots; left out: {left}",)
