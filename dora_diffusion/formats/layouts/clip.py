"""CLIP's text encoders in checkpoints: OpenCLIP's own names, and transformers' with the `text_model.` in front.

OpenCLIP's attention has its q, k and v in one layer, `attn.in_proj`, which is no layer in its code: its tensors are
called `attn.in_proj_weight` and `attn.in_proj_bias`, without a dot. Two more are spelt without `.weight`,
`positional_embedding` and `text_projection`, and the latter is stored transposed, (in, out): see `tensor_name` and
`TRANSPOSED`.
"""

import re

from dora_diffusion.formats.layouts.record import Fusion, Layout

TRANSPOSED = frozenset({"text_projection"})
"""OpenCLIP's layers whose tensor is (in, out) where diffusers' weight is (out, in)."""

_BARE = frozenset({"text_projection", "positional_embedding"})
_ENDS = {
    "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding",
    "ln_final": "final_layer_norm",
}
_PROJECTION = {"text_projection": "text_projection"}
_LAYER = {
    "ln_1": ("layer_norm1",),
    "ln_2": ("layer_norm2",),
    "mlp.c_fc": ("mlp.fc1",),
    "mlp.c_proj": ("mlp.fc2",),
    "attn.out_proj": ("self_attn.out_proj",),
    "attn.in_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
}
_PATTERNS = (
    "transformer.resblocks.#.(attn.in_proj|attn.out_proj|mlp.c_fc|mlp.c_proj|mlp.gelu|ln_#)",
    "(token_embedding|positional_embedding|ln_final)",
)
_ORIGINAL = re.compile(r"transformer\.resblocks\.(0|[1-9][0-9]*)\.(.+)")
_PATH = re.compile(r"encoder\.layers\.(0|[1-9][0-9]*)\.(.+)")


def tensor_name(original: str, parameter: str) -> str:
    """How OpenCLIP's checkpoints spell a layer's tensor, `parameter` being "weight" or "bias"."""
    if original.endswith(".in_proj"):
        return f"{original}_{parameter}"
    return original if original in _BARE else f"{original}.{parameter}"


def _open_clip(family: str, component: str, depth: int, *, projects: bool) -> Layout:
    """OpenCLIP's names of a text encoder with `depth` layers; `projects`: with its projection."""
    ends = {**_ENDS, **(_PROJECTION if projects else {})}
    ends_back = {path: original for original, path in ends.items()}
    layers_back = {path: original for original, paths in _LAYER.items() for path in paths}

    def of_original(original: str) -> Fusion | None:
        if original in ends:
            return Fusion(original, (ends[original],))
        found = _ORIGINAL.fullmatch(original)
        if found is None or int(found[1]) >= depth or found[2] not in _LAYER:
            return None
        paths = tuple(f"encoder.layers.{found[1]}.{path}" for path in _LAYER[found[2]])
        return Fusion(original, paths, (1,) * len(paths))

    def of_path(path: str) -> Fusion | None:
        if path in ends_back:
            return of_original(ends_back[path])
        found = _PATH.fullmatch(path)
        if found is None or found[2] not in layers_back:
            return None
        return of_original(f"transformer.resblocks.{found[1]}.{layers_back[found[2]]}")

    return Layout("openclip", (family,), component, of_original, of_path, names=_PATTERNS)


_TRANSFORMERS = re.compile(
    r"encoder\.layers\.(0|[1-9][0-9]*)\.(self_attn\.(q_proj|k_proj|v_proj|out_proj)|mlp\.fc[12]|layer_norm[12])"
    r"|embeddings\.(token_embedding|position_embedding)|final_layer_norm"
)


def _with_prefix(families: tuple[str, ...], component: str) -> Layout:
    """transformers' names as checkpoints have them: `text_model.` before all but the projection."""

    def of_original(original: str) -> Fusion | None:
        if original in _PROJECTION:
            return Fusion(original, (original,))
        path = original.removeprefix("text_model.")
        return Fusion(original, (path,)) if path != original and _TRANSFORMERS.fullmatch(path) else None

    def of_path(path: str) -> Fusion | None:
        return of_original(path if path in _PROJECTION else f"text_model.{path}")

    return Layout("clip", families, component, of_original, of_path)


OPEN_CLIP_H = _open_clip("sd2", "text_encoder", 23, projects=False)  # the last of its 24 layers is not used
OPEN_CLIP_G = _open_clip("sdxl", "text_encoder_2", 32, projects=True)
CLIP = _with_prefix(("sd1", "sdxl", "sd3", "flux"), "text_encoder")
CLIP_2 = _with_prefix(("sd3",), "text_encoder_2")
