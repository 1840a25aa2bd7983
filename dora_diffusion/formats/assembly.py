"""The tensors of one layer <-> the adapter that they are. Nothing here knows what the layer is called.

`dora_scale` holds one number per output or one per input, by the tool and its version that wrote it. Its shape decides:
(out, 1) and (1, in) say it themselves, also on square layers. Flat ones are judged by length; on a square layer by what
the file's metadata says, or by the base: of the two axes, the one on which m / N(W) varies less.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dora_diffusion.formats import base_made
from dora_diffusion.formats.keys import BASE_MADE, FACTORS, GLORA, IA3, REPLACED, ROTATION, WIDENED, Suffixes
from dora_diffusion.functional.blend_modes import from_base_norms
from dora_diffusion.functional.dora import TINY_NORM, Axis, master_dtype, squared_row_norms
from dora_diffusion.state import Algorithm, FactoredState, Module, ModuleState

Parts = Mapping[str, Tensor]
MOST_NUMBERS = 2**28  # of a pair that stands for Tucker, LoHa or LoKr; the largest real layers have a tenth
_HALVES = {"down": "A (lora_A, lora_down)", "up": "B (lora_B, lora_up)"}
Scale = Callable[[int], tuple[float, bool]]  # rank -> (alpha, rank-stabilised), for files that keep no alpha per layer


@dataclass(frozen=True)
class Assembled:
    """What the tensors of one layer came to.

    Attributes:
        module: the change of its weight, or None.
        weight: what is added to a normalisation's weight, or None.
        bias: what is added to its bias, or None.
        spare: parts that belong to nothing, such as a magnitude without a pair.
    """

    module: Module | None
    weight: Tensor | None
    bias: Tensor | None
    spare: tuple[str, ...]


class ToolMagnitudes(ValueError):
    """Magnitudes per output that a tool divides by the base's norms, and no base at hand that makes ours of them."""


@dataclass(frozen=True)
class Hints:
    """What else tells what a magnitude is.

    Attributes:
        axis: as the file's metadata have it, or None.
        weight: gives the base's weight, or None when no base is at hand.
        is_over_base: magnitudes per output are those of a tool that divides them by the norms of the base's weight.
    """

    axis: Axis | None
    weight: Callable[[], Tensor | None]
    is_over_base: bool = False


def assemble(layer: str, parts: Parts, scale: Scale, hints: Hints) -> Assembled:
    """Parts of a layer, by their names in `keys`, as an adapter.

    Raises:
        ValueError: half a pair, shapes that do not fit one another, or an axis that nothing tells.
    """
    for part, tensor in parts.items():
        if not tensor.is_floating_point() and part not in ("alpha", "on_input", WIDENED):  # kept as they are
            raise ValueError(f"{layer}: its {part} holds {tensor.dtype}, expected floating-point numbers")
    _check_stored_once(layer, parts)
    weight, bias = parts.get("w_norm"), parts.get("b_norm", parts.get("diff_b"))
    if "diff" in parts and parts["diff"].dim() == 1:
        weight = parts["diff"]
    module = _module(layer, parts, scale, hints)
    if WIDENED in parts and module is not None:
        _check_widened(layer, module, parts[WIDENED])
    used = {"w_norm", "b_norm", "diff_b"} & parts.keys() | ({"diff"} if weight is not None else set())
    if module is not None:
        used |= {*FACTORS, *BASE_MADE, "down", "up", "mid", "alpha", "magnitude", "dora_scale"}
        if "up_bias" in parts:
            used.add("up_bias")
            bias = parts["up_bias"] * module.scale
    return Assembled(module, weight, bias, tuple(part for part in parts if part not in used))


def _check_stored_once(layer: str, parts: Parts) -> None:
    """A ValueError when a layer's change is there in two forms, of which only one could be taken."""
    whole = {"diff"} if "diff" in parts and parts["diff"].dim() > 1 else set()
    forms = {
        "a pair": parts.keys() & {"down", "up"},
        "a LoHa": {part for part in parts if part.startswith("hada_")},
        "a LoKr": {part for part in parts if part.startswith("lokr_")},
        "a whole difference": whole,
        "an OFT": parts.keys() & set(ROTATION),
        "a GLoRA": parts.keys() & set(GLORA),
        "an (IA)^3": parts.keys() & set(IA3),
        "a new weight": parts.keys() & set(REPLACED),
    }
    found = [form for form, there in forms.items() if there]
    twice = [("magnitude", "dora_scale"), ("b_norm", "diff_b")]
    found += [f"both {one} and {other}" for one, other in twice if one in parts and other in parts]
    if len(found) > 1 or (found and found[0].startswith("both")):
        raise ValueError(f"{layer}: its change is stored as {' and as '.join(found)}, expected one of them")


def _module(layer: str, parts: Parts, scale: Scale, hints: Hints) -> Module | None:
    if "down" in parts or "up" in parts:
        return _with_magnitude(layer, _pair(layer, parts, scale), parts, hints)
    if any(parts[part].dim() < 2 for part in REPLACED if part in parts):
        raise ValueError(f"{layer}: a set_weight that replaces the weight of a normalisation is not computed here")
    if parts.keys() & set(BASE_MADE):
        alpha = _number(layer, parts["alpha"]) if "alpha" in parts else None
        return _with_magnitude(layer, base_made.module_of(layer, parts, alpha, hints.weight()), parts, hints)
    factors = {name: parts[name] for name in FACTORS if name in parts and parts[name].dim() > 1}
    if not factors:
        return None
    return _with_magnitude(layer, _factored(layer, factors, parts), parts, hints)


def _pair(layer: str, parts: Parts, scale: Scale) -> ModuleState:
    if missing := {"down", "up"} - parts.keys():
        raise ValueError(f"{layer}: its {_HALVES[min(missing)]} is missing; expected both halves of the pair")
    down, up, mid = parts["down"], parts["up"], parts.get("mid")
    if down.dim() < 2 or up.dim() < 2 or down.shape[0] != up.shape[1] or not down.numel():
        raise ValueError(f"{layer}: A {tuple(down.shape)} and B {tuple(up.shape)} are no low-rank pair")
    if math.prod(up.shape[2:]) != 1:
        raise ValueError(f"{layer}: B {tuple(up.shape)} has a kernel, expected (out, r, 1, 1)")
    if mid is not None and down.shape[0] * down[0].numel() * math.prod(mid.shape[2:]) > MOST_NUMBERS:
        raise ValueError(f"{layer}: its core {tuple(mid.shape)} makes a pair of more than {MOST_NUMBERS} numbers")
    rank = down.shape[0]
    if mid is not None and (mid.shape[:2] != (rank, rank) or math.prod(down.shape[2:]) != 1):
        raise ValueError(f"{layer}: Tucker core {tuple(mid.shape)} does not fit A {tuple(down.shape)}")
    alpha, stabilised = (_number(layer, parts["alpha"]), False) if "alpha" in parts else scale(rank)
    return ModuleState(down, up, alpha, rank_stabilised=stabilised, mid=mid)


def _check_widened(layer: str, module: Module, shape: Tensor) -> None:
    """A ValueError where the pair is not of the weight that the base's is to be filled up to."""
    wide = [int(side) for side in shape.reshape(-1)] if shape.dim() == 1 and not shape.is_meta else []
    sides = (wide[0], math.prod(wide[1:])) if len(wide) > 1 else None
    if not shape.is_meta and sides != module.shape:
        raise ValueError(f"{layer}: its {WIDENED} {tuple(wide)} is not the shape of its pair, {module.shape}")


def _number(layer: str, alpha: Tensor) -> float:
    if alpha.numel() != 1 or alpha.is_complex():
        raise ValueError(f"{layer}: alpha is {alpha.dtype} of shape {tuple(alpha.shape)}, expected one number")
    return 1.0 if alpha.is_meta else float(alpha)


def _factored(layer: str, factors: Parts, parts: Parts) -> FactoredState:
    algorithm: Algorithm = "loha" if "hada_w1_a" in factors else "full" if "diff" in factors else "lokr"
    alpha = _number(layer, parts["alpha"]) if "alpha" in parts else None
    try:
        shape = _factored_shape(algorithm, factors)
        rank = _factor_rank(algorithm, factors)
    except (KeyError, AssertionError, RuntimeError, IndexError, ValueError):
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in factors.items())
        raise ValueError(f"{layer}: no {algorithm} comes of {found}") from None
    if 0 in shape:
        raise ValueError(f"{layer}: {algorithm} of an empty weight {shape}")
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    return FactoredState(algorithm, dict(factors), scale, alpha)


def _factored_shape(algorithm: Algorithm, factors: Parts) -> tuple[int, int]:
    """Rows and columns of the product, found without forming it; a ValueError when its two ways of forming disagree."""
    state = FactoredState(algorithm, {name: tensor.to("meta") for name, tensor in factors.items()})
    (rows, columns), delta = state.shape, state.delta()
    if delta.shape[0] != rows or delta.numel() != rows * columns:
        raise ValueError("the factors are not of one weight")
    if (rows + columns) * state.rank > MOST_NUMBERS:
        raise ValueError("the factors make too large a pair")
    return rows, columns


def _factor_rank(algorithm: Algorithm, factors: Parts) -> int | None:
    """The r of alpha / r; None where the scale is 1 whatever alpha says: a LoKr of two whole factors, a whole D."""
    halves = [name for name in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if name in factors]
    return factors[halves[0]].shape[0] if halves and algorithm != "full" else None


def scaled_to(module: FactoredState, scale: float) -> FactoredState:
    """The same factors at another scale, as an alpha where there are halves that give it a rank, else in a factor."""
    rank = _factor_rank(module.algorithm, module.factors)
    if rank is not None:
        return replace(module, scale=scale, alpha=scale * rank)
    first = next(iter(module.factors))
    dtype = master_dtype(module.factors[first].dtype)
    factors = {**module.factors, first: module.factors[first].to(dtype) * scale}
    return replace(module, factors=factors, scale=1.0, alpha=None)


def _with_magnitude(layer: str, module: Module, parts: Parts, hints: Hints) -> Module:
    if "magnitude" in parts:
        magnitude = parts["magnitude"]
        if magnitude.numel() != module.shape[0]:
            raise ValueError(f"{layer}: magnitude has shape {tuple(magnitude.shape)}, expected ({module.shape[0]},)")
        return _of_ours(layer, replace_magnitude(module, magnitude.reshape(-1), "out"), hints)
    if "dora_scale" not in parts:
        return module
    magnitude = parts["dora_scale"]
    found = replace_magnitude(module, magnitude.reshape(-1), _axis(layer, magnitude, module, hints))
    if isinstance(found, FactoredState):
        found = replace(found, dimensions=max(2, magnitude.dim()))
    return _of_ours(layer, found, hints)


def _of_ours(layer: str, module: Module, hints: Hints) -> Module:
    """The same module with the magnitude that the paper's formula takes."""
    if module.magnitude is None or module.axis == "in" or not hints.is_over_base:
        return module
    weight = hints.weight()
    if weight is None:
        raise ToolMagnitudes(
            f"{layer}: its magnitudes are made for a tool that divides them by the base's norms; "
            "load it with its base at hand (base=, --base)"
        )
    if weight.is_meta:  # only what there is is asked, not its numbers
        return module
    weight = weight.to(master_dtype(weight.dtype))
    direction = weight + module.to(dtype=weight.dtype).delta().reshape(weight.shape)
    return replace_magnitude(module, from_base_norms(module.magnitude.to(weight), weight, direction), "out")


def replace_magnitude(module: Module, magnitude: Tensor | None, axis: Axis) -> Module:
    """The same module with another magnitude."""
    if isinstance(module, ModuleState):
        return replace(module, magnitude=magnitude, axis=axis)
    return replace(module, magnitude=magnitude, axis=axis)


def _axis(layer: str, magnitude: Tensor, module: Module, hints: Hints) -> Axis:
    out, columns = module.shape
    count, dimensions = magnitude.numel(), magnitude.dim()
    inputs = module.down.shape[1] if isinstance(module, ModuleState) else columns
    fits_out = count == out
    # flat factors of a convolution do not tell its inputs, but its magnitude has four dimensions
    fits_in = count == inputs or (dimensions > 2 and count > 0 and columns % count == 0)
    if not count or not (fits_out or fits_in):
        raise ValueError(f"{layer}: dora_scale {tuple(magnitude.shape)} fits neither {out} outputs nor {inputs} inputs")
    if dimensions > 1 and fits_out and magnitude.shape[0] == count:
        return "out"
    if dimensions > 1 and fits_in and magnitude.shape[1] == count:
        return "in"
    if fits_out != fits_in:
        return "out" if fits_out else "in"
    if hints.axis is not None:
        return hints.axis
    if (weight := hints.weight()) is not None:
        return "out" if weight.is_meta else _steadier_axis(weight, magnitude)  # without numbers nothing is told
    raise ValueError(
        f"{layer}: dora_scale {tuple(magnitude.shape)} of a square layer may be per output or per input, and the "
        "metadata do not say; load it with its base at hand (base=..., --base)"
    )


def _steadier_axis(weight: Tensor, magnitude: Tensor) -> Axis:
    """The axis on which log(m / N(W)) varies less: training moves magnitudes little from where they start."""
    spreads: dict[Axis, float] = {}
    for axis, matrix in (("out", weight), ("in", weight.transpose(0, 1))):
        norms = squared_row_norms(matrix).sqrt().clamp(min=TINY_NORM)
        ratio = magnitude.reshape(-1).to(norms).abs().clamp(min=TINY_NORM) / norms
        spreads[axis] = float(torch.std(ratio.log()))  # type: ignore[index]
    return min(spreads, key=lambda axis: spreads[axis])


def parts_of(layer: str, module: Module, suffixes: Suffixes) -> dict[str, Tensor]:
    """An adapter as the parts that a format holds: the inverse of `assemble`.

    Raises:
        ValueError: the format cannot hold it.
    """
    can = suffixes.spell
    if isinstance(module, FactoredState) and any(can(layer, name) is None for name in module.factors):
        module = _as_small_pair(layer, module)
    if isinstance(module, ModuleState) and module.mid is not None and can(layer, "mid") is None:
        module = module.as_pair()
    parts = dict(module.factors) if isinstance(module, FactoredState) else _pair_parts(layer, module, suffixes)
    if isinstance(module, FactoredState) and module.alpha is not None:
        parts["alpha"] = torch.tensor(module.alpha)
    elif isinstance(module, FactoredState) and module.scale != 1:
        raise ValueError(f"{layer}: a {module.algorithm} of scale {module.scale:g} without alpha cannot be written")
    if module.magnitude is not None:
        parts.update(_magnitude_part(layer, module, suffixes))
    return parts


def _as_small_pair(layer: str, module: FactoredState) -> ModuleState:
    """The exact pair, where it is one: of lower rank than the weight."""
    if module.rank >= min(module.shape):
        raise ValueError(
            f"{layer}: this {module.algorithm} is no low-rank pair, and the format holds nothing else; "
            "make one of a lower rank first (to_lora, convert --rank)"
        )
    return module.as_pair()


def _pair_parts(layer: str, module: ModuleState, suffixes: Suffixes) -> dict[str, Tensor]:
    parts = {"down": module.down, "up": module.up}
    if module.mid is not None:
        parts["mid"] = module.mid
    if not suffixes.folds_scale:
        parts["alpha"] = torch.tensor(module.scale * module.rank)
    elif module.scale != 1:
        parts["up"] = _scaled(layer, module.up, module.scale)
    return parts


def _scaled(layer: str, up: Tensor, scale: float) -> Tensor:
    """s B, in the dtype of B where that holds it to the dtype's own rounding, else in fp32.

    Raises:
        ValueError: it overflows.
    """
    exact = up.to(torch.promote_types(up.dtype, torch.float32) if up.dtype.itemsize > 1 else torch.float32) * scale
    if up.dtype.itemsize == 1:
        return exact
    folded = exact.to(up.dtype)
    if folded.is_meta:  # an estimate of sizes
        return folded
    if not torch.isfinite(folded).all():
        raise ValueError(
            f"{layer}: B times its scale {scale:g}, which the format folds into B, does not fit into "
            f"{up.dtype}; expected a smaller alpha, or fp32"
        )
    off, size = torch.linalg.vector_norm(folded.to(exact.dtype) - exact), torch.linalg.vector_norm(exact)
    return folded if off <= torch.finfo(up.dtype).eps * size else exact  # numbers too small for fp16 lose digits


def _magnitude_part(layer: str, module: Module, suffixes: Suffixes) -> dict[str, Tensor]:
    magnitude = module.magnitude
    assert magnitude is not None
    # a flat pair of a convolution is written flat, and so is its magnitude
    if isinstance(module, ModuleState):
        dimensions = module.down.dim()
    else:
        dimensions = max(module.dimensions, *(factor.dim() for factor in module.factors.values()))
    if not suffixes.flat_magnitude:
        shape = [1] * dimensions
        shape[0 if module.axis == "out" else 1] = -1
        return {"dora_scale": magnitude.reshape(shape)}
    if suffixes.spell(layer, "magnitude") is None:
        raise ValueError(f"{layer}: this format holds plain LoRA only, and the layer is a DoRA; make a LoRA first")
    if module.axis != "out":
        raise ValueError(
            f"{layer}: the format has magnitudes of the out axis only, got the in axis; convert it first (to_out_axis, "
            "convert --axis out)"
        )
    # PEFT keeps a convolution's magnitude as (1, out, 1, 1)
    flat = [1, -1, *[1] * (dimensions - 2)] if dimensions > 2 else [-1]
    return {"magnitude": magnitude.reshape(flat)}
