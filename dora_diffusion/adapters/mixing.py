"""A mix of adapters as it is drawn: strengths, curves and masks, all set at once and all taken off again."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.families import family_of_pipeline
from dora_diffusion.functional.blend_modes import IN_ORDER
from dora_diffusion.functional.strengths import Weight


@dataclass(frozen=True)
class Ingredient:
    """An adapter's part in a mix.

    Attributes:
        name: what it was loaded under.
        weight: its strength, or one for each part.
        schedule: (progress, factor) points; None is constant.
        mask: L, white where it draws; None is everywhere.
    """

    name: str
    weight: Weight
    schedule: tuple[tuple[float, float], ...] | None = None
    mask: Image.Image | None = None


def set_mix(manager: AdapterManager, ingredients: Sequence[Ingredient], *, blend: str) -> None:
    """Let these adapters, all of them loaded, draw, and no others.

    Raises:
        ValueError: as the manager's set_adapters, set_schedule and set_mask; `clear_mix` undoes what was set.
    """
    # sums of floats have an order: where a mode has none, that of the ingredients must not show in the last bit
    ordered = ingredients if blend in IN_ORDER else sorted(ingredients, key=lambda one: one.name)
    manager.set_adapters({one.name: one.weight for one in ordered}, blend=blend)
    for one in ingredients:
        if one.schedule is not None:
            manager.set_schedule(one.name, one.schedule)
        if one.mask is not None:
            manager.set_mask(one.name, one.mask)


def clear_mix(manager: AdapterManager, names: Iterable[str]) -> None:
    """The bare base again, and no curve or mask left on these adapters."""
    manager.set_adapters({})
    for name in names:
        manager.set_schedule(name, None)
        manager.set_mask(name, None)


def without_empty_blocks(
    weight: Weight, paths: Collection[str], blocks: Collection[str] | None = None
) -> float | dict[str, float]:
    """A strength without those blocks where the adapter, whose layers are `paths`, has none.

    Args:
        weight: which may name every block of the base.
        paths: of the adapter's layers.
        blocks: which parts may be left out; None is all that lie inside a component.
    """
    if not isinstance(weight, Mapping):
        return weight

    def stays(part: str) -> bool:
        is_block = "." in part if blocks is None else part in blocks
        return not is_block or any(path.startswith(f"{part}.") for path in paths)

    return {part: strength for part, strength in weight.items() if stays(part)}


def by_own_names(weight: Weight, pipe: Any) -> Weight:
    """A strength whose parts "denoiser" and "text_encoders" are the pipeline's own; any other part stays as it is."""
    if not isinstance(weight, Mapping):
        return weight
    family = family_of_pipeline(pipe)
    encoders = tuple(part.name for part in family.text_encoders if getattr(pipe, part.name, None) is not None)
    own: Mapping[str, tuple[str, ...]] = {"denoiser": (family.denoiser.name,), "text_encoders": encoders}
    return {name: value for part, value in weight.items() for name in own.get(part, (part,))}
