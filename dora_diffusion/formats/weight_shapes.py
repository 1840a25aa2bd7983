"""Rows and columns of the weight that a layer's parts are of, from their shapes alone."""

import math
from collections.abc import Mapping, Sequence

Shape = tuple[int, int]
Shapes = Mapping[str, Sequence[int]]


def weight_shape(parts: Shapes) -> Shape | None:
    """(out, in), without the taps of a convolution where they can be told apart; None where the parts do not tell.

    Args:
        parts: name of a part (`keys`) -> its shape; nothing is taken for granted of them.
    """
    try:
        for told in (_pair, _glora, _loha, _lokr, _whole):
            if (shape := told(parts)) is not None:
                return shape
    except (KeyError, IndexError):
        return None
    return None


def _pair(parts: Shapes) -> Shape | None:
    return (parts["up"][0], parts["down"][1]) if {"up", "down"} <= parts.keys() else None


def _glora(parts: Shapes) -> Shape | None:
    names = {"glora_a1", "glora_a2", "glora_b1", "glora_b2"}
    if not names <= parts.keys():
        return None
    a1, a2, b1, b2 = (parts[name] for name in sorted(names))
    return (b2[0], b1[1]) if is_older_glora(a1, a2, b1, b2) else (b1[0], b2[1])


def is_older_glora(a1: Sequence[int], a2: Sequence[int], b1: Sequence[int], b2: Sequence[int]) -> bool:
    """Whether GLoRA's pairs are named in the order of the forward, (r, in) first, as LyCORIS did before 3.0."""
    older = b2[1] == b1[0] == a1[0] == a2[1]
    newer = b2[0] == b1[1] == a1[1] == a2[0]
    return older and not newer


def _loha(parts: Shapes) -> Shape | None:
    if not {"hada_w1_a", "hada_w1_b"} <= parts.keys():
        return None
    has_core = "hada_t1" in parts
    return parts["hada_w1_a"][1 if has_core else 0], parts["hada_w1_b"][1]


def _lokr(parts: Shapes) -> Shape | None:
    if not any(part.startswith("lokr_") for part in parts):
        return None
    sides = []
    for number in (1, 2):
        whole, has_core = parts.get(f"lokr_w{number}"), f"lokr_t{number}" in parts
        if whole is None:
            whole = parts[f"lokr_w{number}_a"][1 if has_core else 0], parts[f"lokr_w{number}_b"][1]
        sides.append((whole[0], whole[1]))
    return math.prod(side[0] for side in sides), math.prod(side[1] for side in sides)


def _whole(parts: Shapes) -> Shape | None:
    shape = parts.get("diff", parts.get("set_weight", ()))
    return (shape[0], shape[1]) if len(shape) > 1 else None
