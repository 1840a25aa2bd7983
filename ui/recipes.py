"""What decides pictures, apart from widgets: settings, slots, mode; and the widgets that hold it on this page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from gradio.components import Component

from dora_diffusion.canvases import Canvas
from dora_diffusion.generation import GenerationSettings
from ui.request import ADDITIVE, MAX_STRENGTH, Curve, DrawRequest, Parts, SlotValues, check_adapters, curve_text

_ENCODERS, _DENOISER = "text_encoders", "denoiser"


@dataclass(frozen=True)
class Recipe:
    """A state of the form and the rack.

    Attributes:
        settings: of the drawing.
        slots: of the rack, those without a file left out.
        blend: how adapters are mixed.
    """

    settings: GenerationSettings
    slots: tuple[SlotValues, ...] = ()
    blend: str = ADDITIVE

    def request(self, parts: Parts, canvas: Canvas | None = None) -> DrawRequest:
        """One picture of it, checked; `ValueError` names the field that is wrong."""
        return DrawRequest(self.settings, check_adapters(self.slots, parts), self.blend, canvas=canvas)


class FormWidgets(Protocol):
    """What is needed of the form above the rack."""

    @property
    def inputs(self) -> set[Component]:
        """The widgets that decide the picture."""

    @property
    def canvas(self) -> Component:
        """The editor of the picture to start from."""

    @property
    def strength(self) -> Component:
        """How much of that is drawn anew."""

    def read(self, values: Mapping[Component, Any]) -> GenerationSettings:
        """What the browser sent, checked."""

    def canvas_of(self, values: Mapping[Component, Any]) -> Canvas | None:
        """The picture to start from."""

    @property
    def shown(self) -> Sequence[Component]:
        """The widgets that `updates` changes."""

    def updates(self, settings: GenerationSettings) -> dict[Component, Any]:
        """What shows these settings."""


class RackWidgets(Protocol):
    """What is needed of the rack."""

    @property
    def slots(self) -> Sequence[Any]:
        """As many as there are."""

    @property
    def inputs(self) -> set[Component]:
        """The widgets that decide the picture."""

    @property
    def outputs(self) -> set[Any]:
        """The widgets that `updates` changes."""

    def read(self, values: Mapping[Component, Any]) -> tuple[SlotValues, ...]:
        """What the browser sent for each slot, unchecked."""

    def blend(self, values: Mapping[Component, Any]) -> str:
        """The mode that the browser sent, unchecked."""

    def updates(self, slots: Sequence[SlotValues], blend: str) -> Mapping[Component, Any]:
        """What shows these slots."""


@dataclass(frozen=True)
class RecipeWidgets:
    """The form and the rack, as the parts of the page see them that keep things and bring them back."""

    form: FormWidgets
    rack: RackWidgets

    @property
    def inputs(self) -> set[Component]:
        """The widgets that decide the picture."""
        return self.form.inputs | self.rack.inputs

    @property
    def outputs(self) -> set[Component]:
        """The widgets that `updates` changes."""
        # told apart from `updates`, which makes widgets: inside an open block they would become part of the page
        return {*self.form.shown, self.form.canvas, self.form.strength, *self.rack.outputs}

    def read(self, values: Mapping[Component, Any]) -> Recipe:
        """What the browser sent; settings are checked, slots are checked when they are drawn."""
        slots = tuple(slot for slot in self.rack.read(values) if slot.file)
        return Recipe(self.form.read(values), slots, self.rack.blend(values))

    def updates(self, recipe: Recipe) -> dict[Component, Any]:
        """What shows a recipe."""
        return {**self.form.updates(recipe.settings), **self.rack.updates(recipe.slots, recipe.blend)}


@dataclass(frozen=True)
class Placed:
    """A slot of the rack, and what of a picture's adapter it could not hold, one line each."""

    slot: SlotValues
    notes: tuple[str, ...]


def placed(file: str, weight: float | Mapping[str, float], parts: Parts, *, curve: Curve | None = None) -> Placed:
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
        return Placed(SlotValues(file, True, strength, False, strength, strength, curve=_text(curve)), tuple(notes))
    left = _by_own_names(weight, parts)
    denoiser = _within(file, parts.denoiser, left.pop(parts.denoiser, 0.0), notes)
    text = _of_encoders(file, left, parts, notes)
    blocks = _of_blocks(file, left, denoiser, parts, notes)
    notes += [f"{file}: the base here has no part {part[:80]} to give a strength of {left[part]:g}" for part in left]
    is_apart = bool(parts.text_encoders) and denoiser != text
    slot = SlotValues(file, True, denoiser, is_apart, denoiser, text, blocks, _text(curve))
    return Placed(slot, tuple(notes))


def _text(curve: Curve | None) -> str:
    return "" if curve is None else curve_text(curve)


def _by_own_names(weight: Mapping[str, float], parts: Parts) -> dict[str, float]:
    own: Mapping[str, tuple[str, ...]] = {_DENOISER: (parts.denoiser,), _ENCODERS: parts.text_encoders}
    return {name: value for part, value in weight.items() for name in own.get(part, (part,))}


def _of_encoders(file: str, left: dict[str, float], parts: Parts, notes: list[str]) -> float:
    """One strength for all text encoders: the rack has no more."""
    values = [left.pop(part, 0.0) for part in parts.text_encoders]
    if len(set(values)) > 1:
        told = ", ".join(f"{value:g}" for value in values)
        notes.append(f"{file}: its text encoders had strengths of {told}; the first is taken for all")
    return _within(file, "text encoders", values[0], notes) if values else 0.0


def _of_blocks(
    file: str, left: dict[str, float], denoiser: float, parts: Parts, notes: list[str]
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


def cut_to_rack(recipe: Recipe, most: int) -> tuple[Recipe, tuple[str, ...]]:
    """As many slots as the rack has, and a line for those that are left."""
    if len(recipe.slots) <= most:
        return recipe, ()
    left = ", ".join(str(slot.file) for slot in recipe.slots[most:])
    return replace(recipe, slots=recipe.slots[:most]), (f"The rack has {most} slots; left out: {left}",)
