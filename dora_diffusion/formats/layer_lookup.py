"""Names of layers in adapter files -> layers of diffusers' pipelines.

A name is a prefix that tells the component, then the layer: dotted or flattened with underscores, in diffusers' words
or its makers'. Which makers' is decided for the whole file: the layout that knows most of its names.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dora_diffusion.formats.flat_names import unflatten
from dora_diffusion.formats.layouts import LAYOUTS, Fusion, Layout
from dora_diffusion.formats.layouts.flux import FLUX

# Prefix -> what lies behind it. "any": its first words tell. Longer ones first.
_FLAT = {
    **{"lora_unet_": "denoiser", "lora_transformer_": "denoiser", "lycoris_": "any"},
    **{"lora_te1_": "te1", "lora_te2_": "te2", "lora_te3_": "te3", "lora_te_": "te1"},
}
_DOTTED = {
    "model.diffusion_model.": "denoiser",
    "diffusion_model.": "denoiser",
    "text_encoders.clip_l.transformer.": "te1",
    "text_encoders.clip_h.transformer.": "te1",
    "text_encoders.clip_g.transformer.": "te2",
    "text_encoders.t5xxl.transformer.": "t5",
    **{"unet.": "denoiser", "transformer.": "denoiser"},
    **{"text_encoder.": "te1", "text_encoder_2.": "te2", "text_encoder_3.": "te3"},
    **{"clip_l.": "te1", "clip_g.": "te2", "t5.": "t5"},
}
_ENCODERS = {"te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3", "t5": "text_encoder_3"}
_BY_ROOT = {"single_transformer_blocks": FLUX.encoders}
# First words of layers, in diffusers' models and in transformers'.
_UNET = (
    *("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "conv_norm_out"),
    *("time_embedding", "add_embedding"),
)
_TRANSFORMER = (
    *("transformer_blocks", "single_transformer_blocks", "joint_transformer_blocks", "layers", "blocks"),
    *("noise_refiner", "context_refiner", "pos_embed", "time_text_embed", "proj_out", "norm_out"),
    *("caption_projection", "adaln_single", "patch_embed", "time_embed", "context_embedder", "x_embedder"),
)
_ENCODER = ("text_model", "encoder", "embeddings", "shared", "model", "language_model", "text_projection")
_ROOTS = re.compile(rf"^(?:{'|'.join((*_UNET, *_TRANSFORMER, *_ENCODER))})(?:\.|$)")
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
    by_family = _encoders_of(layout, read.values())
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
    for prefix, role in _FLAT.items():
        if name.startswith(prefix):
            layer = unflatten(name.removeprefix(prefix))
            return None if layer is None else _Read(role, layer, prefix, True)
    cleaned = clean(name)
    for prefix, role in _DOTTED.items():
        if cleaned.startswith(prefix):
            return _Read(role, cleaned.removeprefix(prefix), prefix, False)
    return _Read("any", cleaned, "", False)


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


def _encoders_of(layout: Layout | None, read: Iterable[_Read]) -> Mapping[str, str]:
    """What the denoiser's layers tell of the text encoders' numbers; in diffusers' names, by their first word."""
    if layout is not None:
        return layout.encoders
    roots = {found.layer.split(".", 1)[0] for found in read}
    return next((encoders for root, encoders in _BY_ROOT.items() if root in roots), {})


def _place(read: _Read, layout: Layout | None, encoders: Mapping[str, str]) -> Place | None:
    role = _role(read)
    if role != "denoiser":
        if not read.prefix and not _ROOTS.match(read.layer):
            return None
        path = read.layer.removeprefix("text_model.")
        return Place(encoders[role], Fusion(path, (path,)), read.prefix, read.is_flat, False)
    fusion = None if layout is None else _fusion(layout, read.layer)
    if layout is not None and fusion is not None:
        renamed, piece = fusion.paths != (read.layer,), layout.of_original(read.layer) is None
        return Place(layout.component, fusion, read.prefix, read.is_flat, renamed, piece)
    if not read.prefix and not _ROOTS.match(read.layer):
        return None
    return Place(_denoiser(read), Fusion(read.layer, (read.layer,)), read.prefix, read.is_flat, False)


def _denoiser(read: _Read) -> str:
    """`unet` or `transformer`: both are called lora_unet by kohya."""
    if read.prefix in ("unet.", "transformer."):
        return read.prefix.removesuffix(".")
    return "unet" if read.layer.split(".", 1)[0] in _UNET else "transformer"
