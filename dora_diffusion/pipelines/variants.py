"""Variants of a base's weights: which lie in a folder, and which of them to load in a dtype."""

import re
from pathlib import Path

import torch

_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<named>\w+))?(?:-\d+-of-\d+)?\.safetensors"
    r"(?:\.index(?:\.(?P<index>\w+))?\.json)?"
)
_OWN_VARIANT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def variants_for(dtype: torch.dtype) -> tuple[str | None, ...]:
    """The variants of weights that may be loaded in a dtype, the best first; None is the one without a name."""
    own = _OWN_VARIANT.get(dtype)
    others = ("fp32", "bf16", "fp16")  # rounded once more is worse than rounded once
    order = (None, "fp32", *others) if own in (None, "fp32") else (own, None, *others)
    return tuple(dict.fromkeys(order))


def variant_of(folder: Path, dtype: torch.dtype) -> str | None:
    """Which variant of a folder's weights to load: the best that some component has, where the others have it or plain.

    Most downloads hold one alone, `*.fp16.safetensors`; some hold several beside each other.
    """
    found: dict[str, set[str | None]] = {}
    for file in folder.glob("*/*"):
        if named := _WEIGHTS.fullmatch(file.name):
            found.setdefault(file.parent.name, set()).add(named["named"] or named["index"])
    there = set().union(*found.values())
    others = sorted(name for name in there if name is not None)  # "ema", "non_ema" ...
    for variant in dict.fromkeys((*variants_for(dtype), *others)):
        if variant in there and all(variant in have or None in have for have in found.values()):
            return variant
    return None


def holds_weights(folder: Path) -> bool:
    """Whether some component of a folder has safetensors weights."""
    return any(_WEIGHTS.fullmatch(file.name) for file in folder.glob("*/*"))
