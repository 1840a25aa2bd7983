"""Which family an adapter is for: told by the names of its layers, by their sizes, then by the file's metadata.

Nothing is guessed. A family stays in question while every adapted layer is one of its own. Where several stay, those
whose published models have these very sizes are left; where none has, names alone count if the model is a tiny one.
What the metadata say chooses among those that are left, and never another.
"""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dora_diffusion.formats.json_metadata import json_object
from dora_diffusion.formats.layouts.record import Layout
from dora_diffusion.formats.layouts.unet import LDM, SGM
from dora_diffusion.state import AdapterState, Module, ModuleState


@dataclass(frozen=True)
class Size:
    """Numbers of one published model.

    Attributes:
        blocks: pattern whose group is a block's number -> how many blocks there are.
        inputs: pattern of a layer -> its input features; the first that fits counts.
        layout: the original names of its layers, where the part's pattern allows for more.
    """

    blocks: Mapping[str, int]
    inputs: Mapping[str, int]
    layout: Layout | None = None


@dataclass(frozen=True)
class Part:
    """A component of a family.

    Attributes:
        layers: pattern of its layers' paths, in any size.
        sizes: of its published models.
        convolves: whether the projections around a UNet's attention are convolutions; None where there are none.
    """

    layers: str
    sizes: tuple[Size, ...]
    convolves: bool | None = None


@dataclass(frozen=True)
class _Layer:
    """What a layer of an adapter tells, with None for what it does not."""

    path: str
    inputs: int | None = None
    is_convolution: bool | None = None


# Layers inside of blocks that several families have.
_TO = r"(to|add|norm)_\w+(\.0)?"
_ATTENTION = rf"attn2?\.{_TO}"
_ATTENTION_12 = rf"attn[12]\.{_TO}"
_GATED = r"ff(_context)?\.net\.(0\.proj|2)"


def _unet(widths: tuple[int, ...], context: int, depth: Mapping[str, int], layout: Layout | None) -> Size:
    """A UNet with `widths` from the finest level on, and attention to texts `context` wide."""
    inputs = {r".*\.attn2\.to_[kv]": context}
    for level, width in enumerate(widths):
        up = len(widths) - 1 - level
        within = r"\.attentions\..*\.(attn[12]\.to_[qkv]|ff\.net\.0\.proj|proj_in)"
        inputs[rf"(down_blocks\.{level}|up_blocks\.{up}){within}"] = width
    inputs[rf"mid_block{within}"] = widths[-1]
    return Size(depth, inputs, layout)


def _unet_layers(levels: str, depth: str, added: str) -> str:
    block = rf"transformer_blocks\.{depth}\.({_ATTENTION_12}|{_GATED}|norm[123])"
    resnet = r"resnets\.\d+\.(conv[12]|conv_shortcut|time_emb_proj|norm[12])"
    inside = rf"attentions\.\d+\.(norm|proj_in|proj_out|{block})|{resnet}"
    ends = rf"conv_in|conv_out|conv_norm_out|time_embedding\..+|add_embedding\.{added}"
    return rf"((down_blocks|up_blocks)\.{levels}|mid_block)\.({inside}|(down|up)samplers\.0\.conv)|{ends}"


def _transformer(width: int, blocks: Mapping[str, int], inputs: Mapping[str, int] | None = None) -> Size:
    """A transformer whose blocks take tokens of one width, but for the layers in `inputs`."""
    layers = r"(to_[qkv]|add_[qkv]_proj|to_qkv_mlp_proj|net\.0\.proj|proj_mlp|linear|linear_in|linear_1|w1|w3)"
    numbers = {rf"{stack}\.(\d+)\.": count for stack, count in blocks.items()}
    return Size(numbers, {**(inputs or {}), rf"({'|'.join(blocks)})\.\d+\.(.+\.)?{layers}": width})


def _double(feed_forward: str, modulation: str, ends: str, single: str = "") -> str:
    """Blocks of picture and text tokens side by side, and what is around them."""
    blocks = rf"transformer_blocks\.\d+\.({_ATTENTION}|{feed_forward}|{modulation})"
    return f"{blocks}|{ends}" + (rf"|single_transformer_blocks\.\d+\.({single})" if single else "")


def _clip(width: int, blocks: int) -> Part:
    layers = r"encoder\.layers\.\d+\.(self_attn|mlp|layer_norm[12]).*|embeddings\..+|final_layer_norm|text_projection"
    inputs = {r".*self_attn\.\w+_proj|.*mlp\.fc1|text_projection": width}
    return Part(layers, (Size({r"encoder\.layers\.(\d+)\.": blocks}, inputs),))


def _t5(width: int) -> Part:
    layers = r"encoder\.block\.\d+\.layer\.\d+\..+|shared|encoder\.(embed_tokens|final_layer_norm)"
    inputs = {r".*SelfAttention\.[qkv]|.*DenseReluDense\.wi.*": width}
    return Part(layers, (Size({r"encoder\.block\.(\d+)\.": 24}, inputs),))


def _language(prefix: str, blocks: int, *widths: int) -> Part:
    inputs = r".*self_attn\.[qkv]_proj|.*mlp\.(gate|up)_proj"
    sizes = tuple(Size({rf"{prefix}layers\.(\d+)\.": blocks}, {rf"{prefix}({inputs})": width}) for width in widths)
    sight = r"|model\.(visual|vision_tower|multi_modal_projector)\..+" if "language" in prefix else ""
    return Part(rf"{prefix}(layers\.\d+\..+|embed_tokens|norm)|lm_head{sight}", sizes)


_CLIP_L, _CLIP_H, _CLIP_G = _clip(768, 12), _clip(1024, 23), _clip(1280, 32)
_BERT = Part(
    r"encoder\.layer\.\d+\..+|embeddings\..+|pooler\.dense",
    (Size({r"encoder\.layer\.(\d+)\.": 24}, {r".*self\.(query|key|value)|.*intermediate\.dense": 1024}),),
)
_GEMMA = _language("", 26, 2304)
_SD_DEPTH = {r".*transformer_blocks\.(\d+)\.": 1}
_SDXL_DEPTH = {
    r"(?:down_blocks\.1|up_blocks\.1)\..*transformer_blocks\.(\d+)\.": 2,
    r"(?:down_blocks\.2|mid_block|up_blocks\.0)\..*transformer_blocks\.(\d+)\.": 10,
}
_SD_LAYERS = _unet_layers("[0-3]", "0", r"(norm|proj|pool).*")
_SD_WIDTHS = (320, 640, 1280, 1280)
# The embedded bases, which are of these families in their own sizes.
_POCKET = _unet((64, 128, 192), 256, _SD_DEPTH, None)
_POCKET_DIT = _transformer(192, {"transformer_blocks": 6})
_FLUX_2 = _double(
    r"ff(_context)?\.linear_(in|out)",
    "norm1",
    r"(double_stream_modulation_(img|txt)|single_stream_modulation|time_guidance_embed|norm_out)\..+"
    r"|x_embedder|context_embedder|proj_out",
    r"attn\.(to_qkv_mlp_proj|to_out|norm_[qk])",
)
_MODULATED = r"norm1(_context)?\.linear"
_EMBEDDERS = r"time_text_embed\..+|x_embedder|context_embedder|norm_out\.linear|proj_out"
_CROSS = rf"transformer_blocks\.\d+\.{_ATTENTION_12}"
_PIXART = Part(
    rf"{_CROSS}|transformer_blocks\.\d+\.{_GATED}|pos_embed\.proj|adaln_single\..+|caption_projection\..+|proj_out",
    (_transformer(1152, {"transformer_blocks": 28}),),
)
_PIXART_SIGMA = Part(
    _PIXART.layers.replace(r"adaln_single\..+", r"adaln_single\.(linear|emb\.timestep_embedder\..+)"), _PIXART.sizes
)
_REFINERS = {"context_refiner": 2, "noise_refiner": 2}
_REFINED = r"(layers|context_refiner|noise_refiner)\.\d+\."

FAMILIES: Mapping[str, Mapping[str, Part]] = {
    "sd1": {
        "unet": Part(_SD_LAYERS, (_unet(_SD_WIDTHS, 768, _SD_DEPTH, LDM), _POCKET), True),
        "text_encoder": _CLIP_L,
    },
    "sd2": {
        "unet": Part(_SD_LAYERS, (_unet(_SD_WIDTHS, 1024, _SD_DEPTH, LDM),), False),
        "text_encoder": _CLIP_H,
    },
    "sdxl": {
        "unet": Part(
            _unet_layers("[0-2]", r"\d+", r"linear_[12]"),
            (_unet((320, 640, 1280), 2048, _SDXL_DEPTH, SGM),),
            False,
        ),
        "text_encoder": _CLIP_L,
        "text_encoder_2": _CLIP_G,
    },
    "sd3": {
        "transformer": Part(
            _double(_GATED, _MODULATED, rf"{_EMBEDDERS}|pos_embed\.proj"),
            (
                _transformer(1536, {"transformer_blocks": 24}),
                _transformer(2432, {"transformer_blocks": 38}),
                _POCKET_DIT,
            ),
        ),
        "text_encoder": _CLIP_L,
        "text_encoder_2": _CLIP_G,
        "text_encoder_3": _t5(4096),
    },
    "flux": {
        "transformer": Part(
            _double(_GATED, _MODULATED, _EMBEDDERS, r"attn\.(to_[qkv]|norm_[qk])|proj_mlp|proj_out|norm\.linear"),
            (_transformer(3072, {"transformer_blocks": 19, "single_transformer_blocks": 38}),),
        ),
        "text_encoder": _CLIP_L,
        "text_encoder_2": _t5(4096),
    },
    "flux2": {
        "transformer": Part(_FLUX_2, (_transformer(6144, {"transformer_blocks": 8, "single_transformer_blocks": 48}),)),
        "text_encoder": _language(r"model\.language_model\.", 40, 5120),
    },
    "flux2-klein": {
        "transformer": Part(
            _FLUX_2.replace("time_guidance_embed", r"time_guidance_embed\.timestep_embedder"),
            (
                _transformer(3072, {"transformer_blocks": 5, "single_transformer_blocks": 20}),
                _transformer(4096, {"transformer_blocks": 8, "single_transformer_blocks": 24}),
            ),
        ),
        "text_encoder": _language(r"model\.", 36, 2560, 4096),
    },
    "qwen-image": {
        "transformer": Part(
            _double(
                r"(img|txt)_mlp\.net\..+",
                r"(img|txt)_mod\.1",
                r"img_in|txt_in|txt_norm|time_text_embed\.timestep_embedder\..+|norm_out\.linear|proj_out",
            ),
            (_transformer(3072, {"transformer_blocks": 60}),),
        ),
        "text_encoder": _language(r"model\.language_model\.", 28, 3584),
    },
    "auraflow": {
        "transformer": Part(
            rf"joint_transformer_blocks\.\d+\.({_ATTENTION}|ff(_context)?\..+|norm1(_context)?\.linear)"
            rf"|single_transformer_blocks\.\d+\.({_ATTENTION}|ff\.(linear_[12]|out_projection)|norm1\.linear)"
            r"|time_step_proj\..+|context_embedder|pos_embed\.proj|norm_out\.linear|proj_out",
            (_transformer(3072, {"joint_transformer_blocks": 4, "single_transformer_blocks": 32}),),
        ),
        "text_encoder": _t5(2048),
    },
    "sana": {
        "transformer": Part(
            rf"{_CROSS}|transformer_blocks\.\d+\.ff\.conv_\w+|patch_embed\.proj|time_embed\..+|caption_norm"
            r"|caption_projection\..+|proj_out",
            (
                _transformer(1152, {"transformer_blocks": 28}),
                _transformer(2240, {"transformer_blocks": 60}),
            ),
        ),
        "text_encoder": _GEMMA,
    },
    "pixart-alpha": {"transformer": _PIXART, "text_encoder": _t5(4096)},
    "pixart-sigma": {"transformer": _PIXART_SIGMA, "text_encoder": _t5(4096)},
    "hunyuan-dit": {
        "transformer": Part(
            rf"blocks\.\d+\.({_ATTENTION_12}|{_GATED}|norm[123](\.(linear|norm))?|skip_(linear|norm))"
            r"|time_extra_emb\..+|text_embedder\..+|pos_embed\.proj|norm_out\.linear|proj_out",
            (_transformer(1408, {"blocks": 40}, {r"blocks\.\d+\.attn2\.to_[kv]": 1024}),),
        ),
        "text_encoder": _BERT,
        "text_encoder_2": _t5(2048),
    },
    "lumina2": {
        "transformer": Part(
            rf"{_REFINED}({_ATTENTION}|feed_forward\.linear_[123]|norm[12](\.(linear|norm))?|ffn_norm[12])"
            r"|time_caption_embed\..+|x_embedder|norm_out\.linear_[12]",
            (_transformer(2304, {"layers": 26, **_REFINERS}, {r".+\.norm1\.linear": 1024}),),
        ),
        "text_encoder": _GEMMA,
    },
    "z-image": {
        "transformer": Part(
            rf"{_REFINED}(attention\.{_TO}|feed_forward\.w[123]|(attention|ffn)_norm[12]|adaLN_modulation\.\d)"
            r"|t_embedder\..+|cap_embedder\..+|all_x_embedder\..+|all_final_layer\..+",
            (_transformer(3840, {"layers": 30, **_REFINERS}),),
        ),
        "text_encoder": _language("", 36, 2560),
    },
}
"""Family -> component -> its layers."""

# How tools call models, after `_model_names`; two families where a name fits both.
_TOLD: tuple[tuple[str, frozenset[str]], ...] = tuple(
    (pattern, frozenset(families.split()))
    for pattern, families in {
        r"(stable-diffusion|sd)-?xl": "sdxl",
        r"(stable-diffusion|sd)-?v?-?3(-?5)?m?(-|$)": "sd3",
        r"(stable-diffusion|sd)-?v?-?2(-?[01])?(-|$)": "sd2",
        r"(stable-diffusion|sd)-?v?-?1(-?[45])?(-|$)": "sd1",
        r"flux-?2-klein": "flux2-klein",
        r"flux-?2-dev": "flux2",
        r"flux-?2(?!-klein|-dev)(-|$)": "flux2 flux2-klein",
        r"flux(-?1)?(?!-2)(-|$)": "flux",
        r"pixart-alpha": "pixart-alpha",
        r"pixart-sigma": "pixart-sigma",
        r"sana(-|$)": "sana",
        r"qwen(-?image)?(-|$)": "qwen-image",
        r"z-?image(-|$)": "z-image",
        r"lumina(-image)?-?2": "lumina2",
        r"aura-?flow": "auraflow",
        r"hunyuan-?dit": "hunyuan-dit",
    }.items()
)


# Other models whose layers have the very names and sizes of a family's.
_STRANGER = re.compile(r"chroma|kolors|.*refiner")
# No published model is as narrow: a model of these names that is, is a small one made for tests. One that is not, and
# has other sizes than all that are known, is another model.
_NARROWEST = 320


def family_of(adapter: AdapterState) -> str | None:
    """The name of the family that an adapter is for, or None where its layers and its metadata leave several."""
    if any(_STRANGER.match(name) for name in _model_names(adapter.metadata)):
        return None
    layers = _layers(adapter)
    fitting = [name for name, parts in FAMILIES.items() if _fits(parts, layers)]
    # of another text encoder's size, a denoiser is what it is all the same
    denoiser = {part: found for part, found in layers.items() if part in ("unet", "transformer")}
    exact = [name for name in fitting if _is_published(FAMILIES[name], layers)]
    exact = exact or [name for name in fitting if denoiser and _is_published(FAMILIES[name], denoiser)]
    left = exact or fitting
    if len(left) != 1 or not (exact or _is_tiny(layers)):
        declared = _declared(adapter.metadata)
        left = [name for name in left if name in declared]
    return left[0] if len(left) == 1 else None


def _layers(adapter: AdapterState) -> dict[str, list[_Layer]]:
    """The adapted layers by component."""
    found: dict[str, list[_Layer]] = {}
    for path, module in adapter.modules.items():
        component, _, inner = path.partition(".")
        found.setdefault(component, []).append(_layer(inner.removeprefix("text_model."), module))
    for path in adapter.vectors:
        component, _, inner = path.rpartition(".")[0].partition(".")
        found.setdefault(component, []).append(_Layer(inner.removeprefix("text_model.")))
    return found


def _layer(path: str, module: Module) -> _Layer:
    if isinstance(module, ModuleState):
        return _Layer(path, module.down.shape[1], module.down.dim() == 4)
    # a flat factorisation does not say whether the weight has taps
    is_convolution = module.factors["diff"].dim() == 4 if "diff" in module.factors else None
    return _Layer(path, module.shape[1], is_convolution)


def _fits(parts: Mapping[str, Part], layers: Mapping[str, list[_Layer]]) -> bool:
    """Whether every layer has a name of this family's."""
    if not layers.keys() <= parts.keys():
        return False
    return all(_is_layer(parts[component], layer) for component, found in layers.items() for layer in found)


def _is_layer(part: Part, layer: _Layer) -> bool:
    is_projection = layer.path.endswith((".proj_in", ".proj_out")) and part.convolves is not None
    if is_projection and layer.is_convolution not in (None, part.convolves):
        return False
    return re.fullmatch(part.layers, layer.path) is not None


def _is_published(parts: Mapping[str, Part], layers: Mapping[str, list[_Layer]]) -> bool:
    """Whether a published model of the family has all these layers, in these sizes."""
    return all(
        any(all(_has_size(size, layer) for layer in found) for size in parts[component].sizes)
        for component, found in layers.items()
    )


def _is_tiny(layers: Mapping[str, list[_Layer]]) -> bool:
    return all((layer.inputs or 0) < _NARROWEST for found in layers.values() for layer in found)


def _has_size(size: Size, layer: _Layer) -> bool:
    if size.layout is not None and size.layout.of_path(layer.path) is None:
        return False
    for pattern, count in size.blocks.items():
        block = re.match(pattern, layer.path)
        if block and int(block[1][:6]) >= count:
            return False
    if layer.inputs is None:
        return True
    wanted = next((width for pattern, width in size.inputs.items() if re.fullmatch(pattern, layer.path)), None)
    return wanted in (None, layer.inputs)


def _declared(metadata: Mapping[str, str]) -> frozenset[str]:
    """The families that the metadata allow: our own note, else all that tools say, so far as they agree."""
    if (own := metadata.get("dora_diffusion.family", "")) in FAMILIES:
        return frozenset({own})
    said = [families for name in _model_names(metadata) for pattern, families in _TOLD if re.match(pattern, name)]
    return frozenset.intersection(*said) if said else frozenset()


def _model_names(metadata: Mapping[str, str]) -> list[str]:
    """What Stability's modelspec, kohya's and OneTrainer's metadata call the base, as words joined by hyphens.

    `stable-diffusion-xl-v1-base/lora` and `org/FLUX.1-dev` are two names each.
    """
    names = [metadata.get("modelspec.architecture", ""), metadata.get("ss_base_model_version", "")]
    with contextlib.suppress(ValueError):  # another tool's note is no part of the adapter
        names.append(str(json_object(metadata.get("ot_config", "{}"), "ot_config").get("model_type", "")))
    pieces = [piece for name in names for piece in name[:200].lower().split("/")]
    return [re.sub(r"[^a-z0-9]+", "-", piece).strip("-") for piece in pieces]
