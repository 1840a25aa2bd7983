"""Models that have no record here, by what their makers call their layers: named, and never taken for others.

Their adapters load into their own pipelines (`adapters.diffusers_names`); on their own nothing here could say where
their layers lie. Names that a known model has as well tell nothing, and are not here. Sources: the models' own
repositories, musubi-tuner, sd-scripts, ComfyUI's `comfy/ldm`, diffusers' converters.
"""

import re
from collections.abc import Iterable

from dora_diffusion.formats.flat_names import flatten

# The ends of flattened names.
_MODELS = {
    "Wan": r"blocks_\d+_(?:(?:self|cross)_attn_(?:q|k|v|o|k_img|v_img|norm_[qk])|ffn_[02]|modulation)",
    "HunyuanVideo": (
        r"double_blocks_\d+_(?:img|txt)_(?:mlp_fc[12]|mod_linear)|single_blocks_\d+_modulation_linear|"
        r"txt_in_individual_token_refiner_\w+"
    ),
    "Chroma": r"distilled_guidance_layer_\w+|nerf_blocks_\d+_\w+",
    "HiDream": r"(?:double|single)_stream_blocks_\d+_block_\w+",
    "Anima or Cosmos": (
        r"blocks_\d+_(?:self|cross)_attn_(?:q_proj|k_proj|v_proj|output_proj)|llm_adapter_\w+|"
        r"blocks_\d+_(?:mlp_layer[12]|adaln_modulation_(?:self_attn|cross_attn|mlp)_\d+)"
    ),
    "LTX": r"patchify_proj|audio_patchify_proj|transformer_blocks_\d+_(?:audio_\w*attn\w*|audio_to_video_\w+)",
    "Stable Cascade": r"(?:down|up)_blocks_\d+_\d+_(?:attention_attn|kv_mapper|channelwise|mapper)\w*",
    "Mochi": r"blocks_\d+_attn_(?:qkv_[xy]|proj_[xy])",
}
_PREFIXES = r"(?:lora_(?:unet|transformer|prior_unet)_|lycoris_|(?:model_)?diffusion_model_|transformer_|unet_)?"
_MODEL = re.compile(
    _PREFIXES + "(?:" + "|".join(f"(?P<m{number}>{names})" for number, names in enumerate(_MODELS.values())) + ")"
)
_NAMES = tuple(_MODELS)


def other_model(names: Iterable[str]) -> str | None:
    """What the first layer tells that only another model has: the model's name; None where no layer tells any."""
    for name in names:
        match = _MODEL.fullmatch(flatten(name.removeprefix("base_model.model.")))
        if match is not None and match.lastgroup:
            return _NAMES[int(match.lastgroup[1:])]
    return None
