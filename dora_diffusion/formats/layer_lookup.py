"""Names of layers in adapter files -> layers of diffusers' pipelines.

A name is a prefix that tells the component, then the layer: dotted or flattened with underscores, in diffusers' words
or its makers'. Which makers' is decided for the whole file: the layout that knows most of its names.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from dora_diffusion.families import FAMILIES, family_named
from dora_diffusion.families.record import OTHER_COMPONENTS
from dora_diffusion.formats.dialects import DIALECTS
from dora_diffusion.formats.family_detection import has_paths
from dora_diffusion.formats.flat_names import choices, unflatten
from dora_diffusion.formats.layouts import LAYOUTS, Fusion, Layout

# What a dialect calls a component, or a family a text encoder -> what lies behind the prefix.
_ROLES = {
    **{"unet": "denoiser", "transformer": "denoiser"},
    **{"text_encoder": "te1", "text_encoder_2": "te2", "text_encoder_3": "te3", "te": "te1", "te3": "te3"},
    **{"clip_l": "te1", "clip_h": "te1", "clip_g": "te2", "t5xxl": "t5", "t5": "t5"},
    **{name: name for name in OTHER_COMPONENTS},
}
_ENCODERS = {
    **{"te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3", "t5": "text_encoder_3"},
    **{name: name for name in OTHER_COMPONENTS},
}
# First words of layers in transformers' models.
_ENCODER_ROOTS = ("text_model", "encoder", "embeddings", "shared", "model", "language_model", "text_projection")
_MOST_LOOKED_AT = 3000
_T5 = re.compile(r"^(?:encoder\.block\.|shared$)")
_CLIP = ("text_model.", "encoder.layers.", "embeddings.", "text_projection")


Shape = tuple[int, int]


@dataclass(frozen=True)
class Place:
    """Where a name lies.

    Attributes:
        component: the pipeline's attribute.
        fusion: the layers that it is; without the component.
        prefix: of the name, as written; may be empty.
        is_flat: whether it was flattened with underscores.
        is_original: whether the layer is called as its makers call it, not as diffusers does.
        is_piece: whether it is a numbered piece of an original layer (`qkv.0`).
    """

    component: str
    fusion: Fusion
    prefix: str
    is_flat: bool
    is_original: bool
    is_piece: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        """Layers with the component before them."""
        return tuple(f"{self.component}.{path}" for path in self.fusion.paths)


Locate = Callable[[Mapping[str, Shape | None]], dict[str, Place]]
"""Names of a file's layers, with rows and columns of their weights where these are told -> where they lie."""


@dataclass(frozen=True)
class _Read:
    """A name taken apart: what lies behind its prefix ("denoiser", "te2", "any"), and the dotted layer."""

    role: str
    layer: str
    prefix: str
    is_flat: bool


def locate(names: Mapping[str, Shape | None], *, encoders: Mapping[str, str] | None = None) -> dict[str, Place]:
    """Name -> place, of those that are understood.

    Args:
        names: every layer name of a file, and the rows and columns of its weight where its tensors tell.
        encoders: role of a text encoder ("te3", "t5") -> component, where the file's metadata tell the family.
    """
    read = {name: found for name in names if (found := _read(name)) is not None}
    layout = _layout_of({found.layer: names[name] for name, found in read.items() if _role(found) == "denoiser"})
    by_family = _encoders_of(layout, tuple(read.values()))
    return {
        name: place
        for name, found in read.items()
        if (place := _place(found, layout, {**_ENCODERS, **by_family, **(encoders or {})})) is not None
    }


def clean(name: str) -> str:
    """A dotted name without what wrappers leave in it: PEFT's own prefix, compiled modules, `$$` for dots."""
    for debris in ("base_model.model.", "_orig_mod.", "module."):
        name = name.removeprefix(debris)
    return name.replace("$$", ".").replace("._orig_mod.", ".")


def _read(name: str) -> _Read | None:
    for prefix, role in _prefixes(is_flat=True).items():
        if name.startswith(prefix):
            layer = unflatten(name.removeprefix(prefix))
            return None if layer is None else _Read(role, layer, prefix, True)
    cleaned = clean(name)
    for prefix, role in _prefixes(is_flat=False).items():
        if cleaned.startswith(prefix):
            return _Read(role, cleaned.removeprefix(prefix), prefix, False)
    return _Read("any", cleaned, "", False)


@cache
def _prefixes(*, is_flat: bool) -> dict[str, str]:
    """Prefix -> what lies behind it, of all dialects, longer ones first. "any": its first words tell."""
    found: dict[str, str] = {}
    for dialect in DIALECTS:
        if dialect.is_flat == is_flat:
            # what a text encoder is called says more than its number, and comes later
            found.update({prefix: _ROLES[name] for name, prefix in dialect.prefixes.items() if prefix})
            found.update(dialect.reads)
    return {prefix: found[prefix] for prefix in sorted(found, key=len, reverse=True)}


@cache
def _roots() -> dict[str, str]:
    """The first word of a denoiser's layers, in diffusers' names -> its component."""
    parts = [(family.denoiser.name, family.signature.parts[family.denoiser.name]) for family in FAMILIES]
    return {
        path.split(".", 1)[0]: component
        for component, part in sorted(parts, key=lambda found: found[0])  # a word of both is a UNet's
        for pattern in part.paths
        for path in choices(pattern)
    }


def _is_layer(path: str) -> bool:
    """Whether a path without a prefix begins as some model's do."""
    root = path.split(".", 1)[0]
    return root in _roots() or root in _ENCODER_ROOTS


def _role(read: _Read) -> str:
    if read.role != "any":
        return read.role
    if _T5.match(read.layer):
        return "t5"
    return "te1" if read.layer.startswith(_CLIP) else "denoiser"


def _layout_of(layers: Mapping[str, Shape | None]) -> Layout | None:
    """The makers' layout of a denoiser that knows most of a file's layers; None where they are called as in diffusers.

    Some names, such as `x_embedder`, are layers of several models: the layout has to know more than half of them, and
    more than any would if they were diffusers' own.
    """
    denoisers = [layout for layout in LAYOUTS if layout.component in ("unet", "transformer")]
    # a file of more layers than any model has is judged by some of them
    looked_at = list(layers.items())[:: 1 + len(layers) // _MOST_LOOKED_AT]
    known = [sum(_knows(layout, layer, shape) for layer, shape in looked_at) for layout in denoisers]
    in_diffusers = [sum(layout.of_path(layer) is not None for layer, _ in looked_at) for layout in denoisers]
    most = max(known, default=0)
    if not looked_at or 2 * most <= len(looked_at) or most <= max(in_diffusers):
        return None
    return denoisers[known.index(most)]


def _knows(layout: Layout, layer: str, shape: Shape | None) -> bool:
    return _fusion(layout, layer) is not None and (shape is None or layout.fits(layer, *shape))


def _fusion(layout: Layout, layer: str) -> Fusion | None:
    return layout.of_original(layer) or _piece(layout, layer)


def _piece(layout: Layout, layer: str) -> Fusion | None:
    """`double_blocks.0.img_attn.qkv.1`: the second of the layers that qkv is, on its own."""
    stem, _, number = layer.rpartition(".")
    whole = layout.of_original(stem) if number.isascii() and number.isdigit() else None
    if whole is None or len(whole.paths) < 2 or int(number[:4]) >= len(whole.paths):
        return None
    return Fusion(layer, (whole.paths[int(number[:4])],))


def _encoders_of(layout: Layout | None, read: Sequence[_Read]) -> Mapping[str, str]:
    """What the layers tell of the text encoders' numbers: the words of the one family that fits them."""
    if layout is not None:
        family = family_named(layout.families[0])
        return {} if family is None else family.signature.encoders
    if not any(_role(found) in ("te3", "t5") for found in read):  # the others' numbers are never other ones
        return {}
    signatures = [family.signature for family in FAMILIES]
    fitting = [found for found in signatures if has_paths(found, _by_component(read, found.encoders))]
    return fitting[0].encoders if len(fitting) == 1 else {}


def _by_component(read: Sequence[_Read], encoders: Mapping[str, str]) -> dict[str, list[str]]:
    """Component -> paths, for a family that calls its text encoders so."""
    components = {**_ENCODERS, **encoders}
    found: dict[str, list[str]] = {}
    for each in read:
        role = _role(each)
        found.setdefault(_denoiser(each) if role == "denoiser" else components[role], []).append(each.layer)
    return found


def _place(read: _Read, layout: Layout | None, encoders: Mapping[str, str]) -> Place | None:
    role = _role(read)
    if role != "denoiser":
        if not read.prefix and not _is_layer(read.layer):
            return None
        path = read.layer.removeprefix("text_model.")
        return Place(encoders[role], Fusion(path, (path,)), read.prefix, read.is_flat, False)
    fusion = None if layout is None else _fusion(layout, read.layer)
    if layout is not None and fusion is not None:
        renamed, piece = fusion.paths != (read.layer,), layout.of_original(read.layer) is None
        return Place(layout.component, fusion, read.prefix, read.is_flat, renamed, piece)
    if not read.prefix and not _is_layer(read.layer):
        return None
    return Place(_denoiser(read), Fusion(read.layer, (read.layer,)), read.prefix, read.is_flat, False)


def _denoiser(read: _Read) -> str:
    """`unet` or `transformer`: both are called lora_unet by kohya."""
    if read.prefix in ("unet.", "transformer."):
        return read.prefix.removesuffix(".")
    return _roots().get(read.layer.split(".", 1)[0], "transformer")
