"""Whose names a denoiser's layers have in a file: its makers', and which makers'.

Some names are several models': evidence is weighed. First how many layers a layout knows by name, then how many have
shapes that fit it, then what the metadata or people say, whether a published model has these very sizes and blocks, and
what the text encoders beside it are called. Names that are one model's makers' and another's own are the makers' where
that is told, where only the one has these sizes, or where the prefix is that of makers' names. What is left open is
left open: where the layouts that remain take the layers for the same ones, only the families stay several; where they
do not, it is an error that asks.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dora_diffusion.families import FAMILIES, family_named
from dora_diffusion.families.record import Family
from dora_diffusion.families.signature import PartSignature, Signature
from dora_diffusion.formats.family_detection import has_path, is_published
from dora_diffusion.formats.layouts import LAYOUTS, OTHER_NAMES, Fusion, Layout
from dora_diffusion.formats.weight_shapes import Shape

_MOST_LOOKED_AT = 3000
Words = Literal["makers", "diffusers", "any"]
Layers = Mapping[str, Shape | None]
"""Layer as the file calls it, without its prefix -> rows and columns of its weight, where these are told."""


@dataclass(frozen=True)
class Chosen:
    """Whose names a file has.

    Attributes:
        layout: by which its layers are looked up.
        families: those whose layers have these names, shapes and sizes; several where that is all that is told.
    """

    layout: Layout
    families: tuple[str, ...]


def layout_of(
    layers: Layers, told: frozenset[str], fits_encoders: Callable[[Signature], bool], words: Words
) -> Chosen | None:
    """The layout that knows most of a denoiser's layers; None where they are called as in diffusers.

    Some names, such as `x_embedder`, are layers of several models: the layout has to know more than half of them, and
    more than any would if they were diffusers' own. A file may mix both sorts of names of one model.

    Args:
        layers: of the denoiser.
        told: names of families that the metadata, or people, allow; empty for any.
        fits_encoders: whether a family has the text encoders that are in the file.
        words: whose words the prefixes of the layers let expect.

    Raises:
        ValueError: the names are several families', which take the layers for different ones, and nothing tells which.
    """
    # a file of more layers than any model has is judged by some of them
    looked_at = dict(list(layers.items())[:: 1 + len(layers) // _MOST_LOOKED_AT])
    layouts = [layout for layout in (*LAYOUTS, *OTHER_NAMES) if layout.component in ("unet", "transformer")]
    original = [{name for name in looked_at if fusion_of(layout, name) is not None} for layout in layouts]
    in_diffusers = [{name for name in looked_at if layout.of_path(name) is not None} for layout in layouts]
    own = [family for family in FAMILIES if looked_at and all(has_path(_denoiser(family), name) for name in looked_at)]
    counts, rival = [len(found) for found in original], len(looked_at) if own else max(map(len, in_diffusers))
    if 0 < max(counts) <= rival:  # perhaps both sorts of names
        pairs = zip(original, in_diffusers, strict=True)
        counts = [len(found | others) if found else 0 for found, others in pairs]
        rival = max(rival, *(_count_in_diffusers(looked_at, family) for family in FAMILIES))
    most = max(counts)
    if 2 * most <= len(looked_at) or most < rival:
        return None
    best = [layout for layout, count in zip(layouts, counts, strict=True) if count == most]
    if most == rival and not _outweigh(best, own, looked_at, told, words):
        return None
    return _one_of(best, looked_at, told, fits_encoders)


def _outweigh(
    layouts: Sequence[Layout], own: Sequence[Family], layers: Layers, told: frozenset[str], words: Words
) -> bool:
    """Whether names that are some models' makers' and others' own in diffusers are the makers', by what else is told.

    Raises:
        ValueError: nothing tells.
    """
    ours = {family.name: family for family in own}
    makers = {family.name: layout for layout in layouts for family in _families(layout) if family.name not in ours}
    inputs = {layer: None if shape is None else shape[1] for layer, shape in layers.items()}
    sized = {name for name, layout in makers.items() if _has_size(_named(name), layout, layers)}
    sized_own = {name for name, family in ours.items() if is_published(_denoiser(family), inputs)}
    for theirs, others in ((told & makers.keys(), told & ours.keys()), (sized, sized_own)):
        if bool(theirs) != bool(others):
            return bool(theirs)
    if words == "any" and makers and ours:
        raise ValueError(_question(layers, [*makers, *ours]))
    return words == "makers"


def _question(layers: Layers, families: Iterable[str]) -> str:
    return (
        f"its {len(layers)} layers may be those of {' or '.join(families)}: say which (family=, --family), or load it "
        "into its base"
    )


def fusion_of(layout: Layout, layer: str) -> Fusion | None:
    """What a layout takes a layer, or a numbered piece of one, for; None where it does not know it."""
    return layout.of_original(layer) or _piece(layout, layer)


def _piece(layout: Layout, layer: str) -> Fusion | None:
    """`double_blocks.0.img_attn.qkv.1`: the second of the layers that qkv is, on its own."""
    stem, _, number = layer.rpartition(".")
    whole = layout.of_original(stem) if number.isascii() and number.isdigit() else None
    if whole is None or len(whole.paths) < 2 or int(number[:4]) >= len(whole.paths):
        return None
    return Fusion(layer, (whole.paths[int(number[:4])],))


def _count_in_diffusers(layers: Collection[str], family: Family) -> int:
    """How many layers have diffusers' names of a family's denoiser."""
    return sum(has_path(_denoiser(family), layer) for layer in layers)


def _denoiser(family: Family) -> PartSignature:
    return family.signature.parts[family.denoiser.name]


def _one_of(
    layouts: Sequence[Layout], layers: Layers, told: frozenset[str], fits_encoders: Callable[[Signature], bool]
) -> Chosen:
    """What the evidence leaves of layouts that know equally many layers."""
    fitting = [sum(_fits(layout, layer, shape) for layer, shape in layers.items()) for layout in layouts]
    layouts = [layout for layout, count in zip(layouts, fitting, strict=True) if count == max(fitting)]
    families = {family.name: layout for layout in layouts for family in _families(layout)}
    families = _left(families, lambda name: name in told)
    families = _left(families, lambda name: _has_size(_named(name), families[name], layers))
    families = _left(families, lambda name: fits_encoders(_named(name).signature))
    if len({_paths_of(layout, layers) for layout in families.values()}) > 1:
        raise ValueError(_question(layers, families))
    return Chosen(next(iter(families.values())), tuple(families))


def _left(families: dict[str, Layout], holds: Callable[[str], bool]) -> dict[str, Layout]:
    """Those for which something holds; all where it holds for none."""
    return {name: layout for name, layout in families.items() if holds(name)} or families


def _fits(layout: Layout, layer: str, shape: Shape | None) -> bool:
    return shape is None or layout.fits(layer, *shape)


def _families(layout: Layout) -> list[Family]:
    return [_named(name) for name in layout.families]


def _named(name: str) -> Family:
    family = family_named(name)
    assert family is not None, name  # a test holds layouts to families that there are
    return family


def _paths_of(layout: Layout, layers: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """What a layout takes layers for."""
    return tuple(fusion.paths if (fusion := fusion_of(layout, layer)) is not None else (layer,) for layer in layers)


def _has_size(family: Family, layout: Layout, layers: Layers) -> bool:
    """Whether a published model of a family has layers of these sizes."""
    inputs = {
        path: None if shape is None else shape[1]
        for (layer, shape), paths in zip(layers.items(), _paths_of(layout, layers), strict=True)
        for path in paths
    }
    return is_published(family.signature.parts[layout.component], inputs)
