"""Adapters of kinds that are not computed here, by the names of their tensors: what they are called, to refuse them.

Sources: PEFT 0.21 `tuners/*/layer.py` (`adapter_layer_names`), LyCORIS 4.1 `modules/tlora.py`, Stability's
Control-LoRA, kohya's ControlNet-LLLite, Tencent's and XLabs' IP-Adapters.
"""

import re
from collections import Counter
from collections.abc import Iterable

# Kind -> words of its keys between dots; one that ends in an underscore is the beginning of words, up to the first.
_KINDS = {
    "PEFT's OFT": ("oft_R", "oft_r", "oft_embedding_R"),
    "LyCORIS' older OFT": ("oft_diag",),
    "PEFT's BOFT": ("boft_",),
    "PEFT's GLoRA": ("glora_",),
    "PEFT's (IA)^3": ("ia3_",),
    "T-LoRA": ("q_layer", "p_layer", "lambda_layer", "base_q", "base_p", "base_lambda"),
    "VeRA": ("vera_", "pvera_"),
    "AdaLoRA": ("lora_E",),
    "HRA": ("hra_",),
    "FourierFT": ("fourierft_",),
    "WaveFT": ("waveft_",),
    "VB-LoRA": ("vblora_",),
    "RandLoRA": ("randlora_",),
    "C3A": ("c3a_",),
    "MiSS": ("miss_",),
    "SHiRA": ("shira_",),
    "RoAd": ("road_",),
    "GraLoRA": ("gralora_",),
    "DeLoRA": ("delora_",),
    "HiRA": ("hira_",),
    "Poly": ("poly_",),
    "another of PEFT's kinds": (
        *("ln_tuning_layers", "trainable_tokens_delta", "adamss_", "beft_", "deft_", "frod_", "lily_"),
        *("osf_", "peanut_", "psoft_", "shadow_", "supertuning_", "tinylora_", "unilora_"),
    ),
    "IP-Adapter": ("ip_", "image_proj"),
    "ControlNet-LLLite": ("lllite_",),
    "Control-LoRA": ("lora_controlnet", "input_hint_block"),
}
_BY_WORD = {word: kind for kind, words in _KINDS.items() for word in words}
_NUMBERED, _NUMBER = "cloneofsimo's numbered LoRA", re.compile(r"(?:unet|text_encoder):\d+:(?:up|down)")
_WAYS_OUT = {
    _NUMBERED: (
        "its layers are numbered in the order of a model that it does not name; convert it with that repository's "
        "lora_add, or train anew"
    ),
    "IP-Adapter": "it draws after a picture, and is no adapter of layers; use pipe.load_ip_adapter of diffusers",
    "ControlNet-LLLite": "it is a ControlNet, not an adapter; use it in ComfyUI or sd-scripts",
    "Control-LoRA": "it is a ControlNet, not an adapter; use it in ComfyUI",
}
_OTHERWISE = "merge it into a model with its own tool, and take an adapter out of that: dora-diffusion extract"


def other_kinds(keys: Iterable[str]) -> Counter[str]:
    """Kind -> how many tensors of it there are."""
    return Counter(kind for key in keys if (kind := _kind(key)) is not None)


def _kind(key: str) -> str | None:
    for word in key.split("."):
        kind = _BY_WORD.get(word) or _BY_WORD.get(word.partition("_")[0] + "_")
        if kind is not None:
            return kind
    return _NUMBERED if ":" in key and _NUMBER.fullmatch(key) else None


def refusal(kinds: Counter[str], *, is_partial: bool) -> str:
    """Why a file of these kinds is not read, in words."""
    kind, count = kinds.most_common(1)[0]
    if is_partial:
        return (
            f"{count} of its tensors are {kind}, which is not computed here, beside layers that are; to load those "
            "alone: strict=False, --partial"
        )
    return f"{kind} ({count} tensors), which is not computed here: {_WAYS_OUT.get(kind, _OTHERWISE)}"
