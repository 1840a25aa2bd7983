"""Layers whose change is made of the base's weight (`functional.base_transforms`): the difference that they come to.

LyCORIS' files of OFT, BOFT, GLoRA and (IA)^3 hold no difference: it is found when they are loaded beside their base.
ComfyUI's `set_weight` takes the place of the weight, whatever that is.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dora_diffusion.formats.keys import GLORA, IA3, REPLACED, ROTATION
from dora_diffusion.formats.weight_shapes import is_older_glora
from dora_diffusion.functional.base_transforms import boft_delta, glora_delta, glora_pair, ia3_delta, oft_delta
from dora_diffusion.functional.dora import master_dtype, rows
from dora_diffusion.functional.lycoris import Pair, tucker_down
from dora_diffusion.state import FactoredState, Module, ModuleState

Parts = Mapping[str, Tensor]


def kind_of(parts: Parts) -> str:
    """What the parts of a layer are called."""
    if parts.keys() & set(ROTATION):
        return "BOFT" if "oft_blocks" in parts and parts["oft_blocks"].dim() == 4 else "OFT"
    if parts.keys() & set(REPLACED):
        return "set_weight"
    return "GLoRA" if parts.keys() & set(GLORA) else "(IA)^3"


def module_of(layer: str, parts: Parts, alpha: float | None, weight: Tensor | None) -> Module:
    """The change of a layer, in the dtype of its parts.

    Args:
        layer: its name, for errors.
        parts: by their names in `keys`.
        alpha: the file's; of a rotation it is the limit of its norm for each row.
        weight: the base's; None where none is at hand. An empty one on the meta device stands for any: what is made of
            it has the right rows and columns, 0 for those that the parts do not tell.

    Raises:
        ValueError: no base, or parts that do not fit one another or the base.
    """
    kind = kind_of(parts)
    if weight is None:
        what = "replaces" if kind in REPLACED else "is made of"
        raise ValueError(f"{layer}: {kind} {what} the base's weight; load it with its base at hand (base=, --base)")
    if kind in REPLACED:
        return _difference(layer, parts[kind], weight)
    found = sorted(parts.keys() & {*ROTATION, *GLORA, *IA3})
    dtype = parts[found[0]].dtype
    try:
        if weight.is_meta and not weight.numel():
            weight = _stand_in(kind, parts)
        module = _made(kind, parts, alpha, weight)
    except (KeyError, RuntimeError, IndexError, ValueError):
        shapes = ", ".join(f"{name} {tuple(parts[name].shape)}" for name in found)
        raise ValueError(f"{layer}: no {kind} of a weight {tuple(weight.shape)} comes of {shapes}") from None
    return module.to(dtype=dtype)


def _difference(layer: str, new: Tensor, weight: Tensor) -> Module:
    """What is to be added to a weight, so that it is another; exact in fp32 for weights of 16 bits."""
    if weight.is_meta and not weight.numel():
        return _whole(torch.empty(new.shape, device="meta"))
    if new.shape != weight.shape:
        raise ValueError(f"{layer}: set_weight {tuple(new.shape)} cannot replace a weight {tuple(weight.shape)}")
    dtype = torch.promote_types(master_dtype(new.dtype), master_dtype(weight.dtype))
    return _whole(new.to(weight.device, dtype) - weight.to(dtype))


def _made(kind: str, parts: Parts, alpha: float | None, weight: Tensor) -> Module:
    if kind == "GLoRA":
        return _glora(parts, alpha, weight)
    if kind == "(IA)^3":
        return _whole(ia3_delta(weight, parts["ia3_weight"], of_inputs=bool(parts["on_input"].any())))
    delta = boft_delta if kind == "BOFT" else oft_delta
    limit = (alpha or 0.0) * weight.shape[0]
    return _whole(delta(weight, parts["oft_blocks"], limit=limit, rescale=parts.get("rescale")))


def _whole(delta: Tensor) -> FactoredState:
    return FactoredState("full", {"diff": delta})


def _glora(parts: Parts, alpha: float | None, weight: Tensor) -> Module:
    a1, a2, b1, b2 = (parts[f"glora_{name}"] for name in ("a1", "a2", "b1", "b2"))
    if is_older_glora(a1.shape, a2.shape, b1.shape, b2.shape):
        a1, a2, b1, b2 = a2, a1, b2, b1
    rank = a2.shape[0]
    scale = (rank if alpha is None else alpha) / rank
    if "glora_bm" in parts:
        b2 = tucker_down(b2, parts["glora_bm"])
    towards, beside = Pair(rows(a1), rows(a2)), Pair(rows(b1), rows(b2))
    if weight.dim() == 4 and weight.shape[2:].numel() > 1:
        return _whole(scale * glora_delta(weight, towards, beside.left @ beside.right))
    pair = glora_pair(weight, towards, beside)
    down = pair.right.reshape(-1, *weight.shape[1:])
    up = pair.left.reshape(*pair.left.shape, *[1] * (weight.dim() - 2))
    return ModuleState(down, up, scale * 2 * rank)


def _stand_in(kind: str, parts: Parts) -> Tensor:
    """A weight without numbers that has the rows and columns that the parts tell."""
    if kind == "GLoRA":
        a1, a2, b1, b2 = (parts[f"glora_{name}"].shape for name in ("a1", "a2", "b1", "b2"))
        out, columns = (b2[0], b1[1:]) if is_older_glora(a1, a2, b1, b2) else (b1[0], b2[1:])
        return torch.empty(out, *columns, device="meta")
    if kind == "(IA)^3":
        sides = [parts["ia3_weight"].numel(), 0]
        return torch.empty(*(sides[::-1] if bool(parts["on_input"].any()) else sides), device="meta")
    return torch.empty(parts["oft_blocks"].shape[-3:-1].numel(), 0, device="meta")
