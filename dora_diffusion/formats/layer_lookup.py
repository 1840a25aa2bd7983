"""Names of layers in adapter files -> layers of diffusers' pipelines.

A name is a prefix that tells the component, then the layer: dotted or flattened with underscores, in diffusers' words
or its makers'. Which makers' is decided for the whole file: the layout that knows most of its names.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

from dora_diffusion.families import FAMILIES
from dora_diffusion.families.record import OTHER_COMPONENTS
from dora_diffusion.families.signature import Signature
from dora_diffusion.formats.dialects import DIALECTS
from dora_diffusion.formats.family_detection import has_paths
from dora_diffusion.formats.flat_names import choices, unflatten
from dora_diffusion.formats.layout_detection import Chosen, Words, fusion_of, layout_of
from dora_diffusion.formats.layouts import Fusion
from dora_diffusion.formats.weight_shapes import Shape

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
_MAKERS = {"diffusion_model.", "model.diffusion_model."}
_DIFFUSERS = {"lycoris_", "lora_transformer_"}
# A prefix that a script put before names that had one.
_FLAT_AGAIN = re.compile(r"(?:(?:lora_)?(?:unet|transformer|te[123]?|text_encoder(?:_[23])?)_){1,3}")
_AGAIN = re.compile(r"(?:(?:unet|transformer|(?:model\.)?diffusion_model)\.){1,3}")
_T5 = re.compile(r"^(?:encoder\.block\.|shared$)")
_CLIP = ("text_model.", "encoder.layers.", "embeddings.", "text_projection")


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
        debris: what stood between the prefix and the layer, and tells nothing: a prefix once more.
        families: the only ones that call a layer so; empty for any.
    """

    component: str
    fusion: Fusion
    prefix: str
    is_flat: bool
    is_original: bool
    is_piece: bool = False
    debris: str = ""
    families: tuple[str, ...] = ()

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
    debris: str = ""


def locate(names: Mapping[str, Shape | None], *, told: frozenset[str] = frozenset()) -> dict[str, Place]:
    """Name -> place, of those that are understood.

    Args:
        names: every layer name of a file, and the rows and columns of its weight where its tensors tell.
        told: names of the families that the file's metadata, or people, allow.

    Raises:
        ValueError: the names are those of several families, which call the layers differently, and nothing tells which.
    """
    read = {name: found for name in names if (found := _read(name)) is not None}
    denoiser = {found.layer: names[name] for name, found in read.items() if _role(found) == "denoiser"}
    fits_encoders = partial(_fits_encoders, [found for found in read.values() if _role(found) != "denoiser"])
    chosen = layout_of(denoiser, told, fits_encoders, _words(read.values()))
    encoders = {**_ENCODERS, **_encoders_of(chosen, tuple(read.values()), told)}
    return {name: place for name, found in read.items() if (place := _place(found, chosen, encoders)) is not None}


def _fits_encoders(read: Sequence[_Read], family: Signature) -> bool:
    """Whether a family has text encoders with these layers, under its own words for them."""
    return has_paths(family, _by_component(read, family.encoders))


def _words(read: Iterable[_Read]) -> Words:
    """Whose names the prefixes of a denoiser let expect; `transformer.` stands before OMI's as before diffusers'."""
    prefixes = {found.prefix for found in read if _role(found) == "denoiser"}
    if prefixes & _MAKERS:
        return "makers"
    return "diffusers" if prefixes & _DIFFUSERS else "any"


def clean(name: str) -> str:
    """A dotted name without what wrappers leave in it: PEFT's own prefix, compiled modules, `$$` for dots."""
    for debris in ("base_model.model.", "_orig_mod.", "module."):
        name = name.removeprefix(debris)
    return name.replace("$$", ".").replace("._orig_mod.", ".")


def _read(name: str) -> _Read | None:
    for prefix, role in _prefixes(is_flat=True).items():
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            if (layer := unflatten(rest)) is not None:
                return _Read(role, layer, prefix, True)
            doubled = _FLAT_AGAIN.match(rest)
            layer = unflatten(rest[doubled.end() :]) if doubled else None
            return None if doubled is None or layer is None else _Read(role, layer, prefix, True, doubled[0])
    cleaned = clean(name)
    for prefix, role in _prefixes(is_flat=False).items():
        if cleaned.startswith(prefix):
            rest = cleaned.removeprefix(prefix)
            again = _AGAIN.match(rest) if role == "denoiser" else re.match(f"(?:{re.escape(prefix)})+", rest)
            debris = again[0] if again else ""
            return _Read(role, rest.removeprefix(debris), prefix, False, debris)
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


def _encoders_of(chosen: Chosen | None, read: Sequence[_Read], told: frozenset[str]) -> Mapping[str, str]:
    """What the layers, or what is told, say of the text encoders' numbers.

    Raises:
        ValueError: families whose layers these may be number them differently, and nothing tells which it is.
    """
    fitting = [family for family in FAMILIES if family.name in (told if chosen is None else chosen.families)]
    # the others' numbers are never other ones
    roles = {_role(found) for found in read if not _is_spelt_out(found)} & {"te3", "t5"}
    if not fitting and roles:
        fitting = [each for each in FAMILIES if has_paths(each.signature, _by_component(read, each.signature.encoders))]
    numbered = {tuple({**_ENCODERS, **family.signature.encoders}[role] for role in sorted(roles)) for family in fitting}
    if len(numbered) > 1:
        names = " or ".join(family.name for family in fitting)
        raise ValueError(
            f"its text encoder may be that of {names}, which number it differently: say which (family=, --family), or "
            "load it into its base"
        )
    return fitting[0].signature.encoders if fitting else {}


def _by_component(read: Sequence[_Read], encoders: Mapping[str, str]) -> dict[str, list[str]]:
    """Component -> paths, for a family that calls its text encoders so."""
    components = {**_ENCODERS, **encoders}
    found: dict[str, list[str]] = {}
    for each in read:
        role = _role(each)
        found.setdefault(_denoiser(each) if role == "denoiser" else components[role], []).append(each.layer)
    return found


def _is_spelt_out(read: _Read) -> bool:
    """Whether the prefix is a pipeline's own name of a text encoder: `text_encoder_3.`"""
    return not read.is_flat and read.prefix.removesuffix(".") in _ENCODERS.values()


def _place(read: _Read, chosen: Chosen | None, encoders: Mapping[str, str]) -> Place | None:
    role = _role(read)
    if role != "denoiser":
        if not read.prefix and not _is_layer(read.layer):
            return None
        path = read.layer.removeprefix("text_model.")
        component = read.prefix.removesuffix(".") if _is_spelt_out(read) else encoders[role]
        return Place(component, Fusion(path, (path,)), read.prefix, read.is_flat, False, debris=read.debris)
    fusion = None if chosen is None else fusion_of(chosen.layout, read.layer)
    if chosen is not None and fusion is not None:
        renamed, piece = fusion.paths != (read.layer,), chosen.layout.of_original(read.layer) is None
        families = chosen.families if renamed else ()
        return Place(chosen.layout.component, fusion, read.prefix, read.is_flat, renamed, piece, read.debris, families)
    if not read.prefix and not _is_layer(read.layer):
        return None
    fusion = Fusion(read.layer, (read.layer,))
    return Place(_denoiser(read), fusion, read.prefix, read.is_flat, False, debris=read.debris)


def _denoiser(read: _Read) -> str:
    """`unet` or `transformer`: both are called lora_unet by kohya."""
    if read.prefix in ("unet.", "transformer."):
        return read.prefix.removesuffix(".")
    return _roots().get(read.layer.split(".", 1)[0], "transformer")
