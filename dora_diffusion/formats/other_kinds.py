"""Adapters of kinds that are not computed here, by the names of their tensors: what they are called, to refuse them.

Sources: PEFT 0.21 `tuners/*/layer.py` (`adapter_layer_names`), LyCORIS 4.1 `modules/tlora.py`, Stability's Control-LoRA
and kohya's ControlNet-LLLite.
"""

import re
from collections import Counter
from collections.abc import Iterable

_KINDS = {
    "PEFT's OFT": r"\.oft_(?:R|embedding_R)\b",
    "PEFT's BOFT": r"\.boft_[Rs]\b",
    "PEFT's GLoRA": r"\.glora_\w+",
    "PEFT's (IA)^3": r"\.ia3_l\b",
    "T-LoRA": r"\.(?:q_layer\.weight|p_layer\.weight|lambda_layer|base_q\b|base_p\b|base_lambda)",
    "VeRA": r"(?:^|\.)(?:p?vera_lambda_[bd]|vera_[AB])\b",
    "AdaLoRA": r"\.lora_E\b",
    "HRA": r"\.hra_u\b",
    "FourierFT": r"\.fourierft_spectrum\b",
    "WaveFT": r"\.waveft_spectrum\b",
    "VB-LoRA": r"(?:^|\.)vblora_\w+",
    "RandLoRA": r"(?:^|\.)randlora_\w+",
    "C3A": r"\.c3a_kernel\b",
    "MiSS": r"\.miss_block\b",
    "SHiRA": r"\.shira_weight\b",
    "RoAd": r"\.road_(?:theta|alpha)\b",
    "GraLoRA": r"\.gralora_\w+",
    "DeLoRA": r"\.delora_\w+",
    "HiRA": r"\.hira_\w+",
    "Poly": r"\.poly_(?:lora_[AB]|router)\b",
    "another of PEFT's kinds": (
        r"\.(?:ln_tuning_layers|adamss_\w+|beft_bias|deft_\w+|frod_\w+|lily_\w+|osf_\w+|peanut_\w+|psoft_\w+|"
        r"shadow_\w+|supertuning_\w+|trainable_tokens_delta|unilora_\w+)\b|(?:^|\.)tinylora_v\b"
    ),
    "ControlNet-LLLite": r"^lllite_",
    "Control-LoRA": r"^(?:lora_controlnet$|input_hint_block\.)",
    "cloneofsimo's numbered LoRA": r"^(?:unet|text_encoder):\d+:(?:up|down)$",
}
_KIND = re.compile("|".join(f"(?P<k{number}>{pattern})" for number, pattern in enumerate(_KINDS.values())))
_NAMES = tuple(_KINDS)
_WAYS_OUT = {
    "cloneofsimo's numbered LoRA": (
        "its layers are numbered in the order of a model that it does not name; convert it with that repository's "
        "lora_add, or train anew"
    ),
    "ControlNet-LLLite": "it is a ControlNet, not an adapter; use it in ComfyUI or sd-scripts",
    "Control-LoRA": "it is a ControlNet, not an adapter; use it in ComfyUI",
}
_OTHERWISE = "merge it into a model with its own tool, and take an adapter out of that: dora-diffusion extract"


def other_kinds(keys: Iterable[str]) -> Counter[str]:
    """Kind -> how many tensors of it there are."""
    found = (_KIND.search(key) for key in keys)
    return Counter(_NAMES[int(match.lastgroup[1:])] for match in found if match is not None and match.lastgroup)


def refusal(kinds: Counter[str], *, is_partial: bool) -> str:
    """Why a file of these kinds is not read, in words."""
    kind, count = kinds.most_common(1)[0]
    if is_partial:
        return (
            f"{count} of its tensors are {kind}, which is not computed here, beside layers that are; to load those "
            "alone: strict=False, --partial"
        )
    return f"{kind} ({count} tensors), which is not computed here: {_WAYS_OUT.get(kind, _OTHERWISE)}"
