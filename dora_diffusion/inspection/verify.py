"""What was written, read back and compared with what was meant: the weights themselves, not the numbers in the file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dora_diffusion.conversion.tools import Tool
from dora_diffusion.functional.blend_modes import MODES, AdapterTerm
from dora_diffusion.functional.low_rank import relative_error
from dora_diffusion.functional.strengths import Weight, strength_at
from dora_diffusion.state import AdapterState, Module, WeightOf, term_of
from dora_diffusion.utils.progress import Progress


@dataclass(frozen=True)
class Verified:
    """How near a file is to what it should be.

    Attributes:
        error: the largest ||W'_file - W'|| / ||W' - W|| of a layer, W' what was meant. Without a base, of D and m.
        layer: which; empty when there is none.
        layers: how many were compared.
        how: the file's numbers were drawn by.
    """

    error: float
    layer: str
    layers: int
    how: str = "read back"

    def sentence(self) -> str:
        """The whole on one line."""
        return f"{self.how}: largest relative error {self.error:.2g} of {self.layers} layers ({self.layer})"


@torch.no_grad()
def verify_blend(
    written: AdapterState,
    adapters: Mapping[str, AdapterState],
    weights: Mapping[str, Weight],
    *,
    base: WeightOf,
    mode: str = "additive",
    progress: Progress | None = None,
) -> Verified:
    """Compare an adapter at strength 1 with a live mix of others, layer by layer, in fp32.

    Raises:
        ValueError: `written` lacks a layer that the mix changes, or the base does.
    """
    paths = list(dict.fromkeys(path for adapter in adapters.values() for path in adapter.modules))
    if strange := written.modules.keys() - set(paths):
        raise ValueError(f"{min(strange)}: a layer that none of the adapters has")
    worst = Verified(0.0, "", len(paths))
    for number, path in enumerate(paths):
        weight = base(path).float()
        meant = MODES[mode](weight, [_term(*found) for found in _found(path, adapters, weights)])
        module = written.modules.get(path)
        stored = weight if module is None else MODES["additive"](weight, [_term(module, 1.0)])
        error = relative_error(stored, meant, weight)
        worst = Verified(error, path, len(paths)) if error >= worst.error else worst
        if progress is not None:
            progress(number + 1, len(paths))
    for path in dict.fromkeys(path for adapter in adapters.values() for path in adapter.vectors):
        parts = [
            (adapters[name].vectors[path], strength_at(path, weight))
            for name, weight in weights.items()
            if path in adapters[name].vectors
        ]
        summed = torch.stack([strength * vector.float() for vector, strength in parts]).sum(0)
        error = relative_error(written.vectors.get(path, torch.zeros_like(summed)), summed)
        worst = Verified(error, path, len(paths)) if error > worst.error else worst
    return worst


def _found(
    path: str, adapters: Mapping[str, AdapterState], weights: Mapping[str, Weight]
) -> list[tuple[Module, float]]:
    return [
        (adapters[name].modules[path], strength_at(path, weight))
        for name, weight in weights.items()
        if path in adapters[name].modules
    ]


def _term(module: Module, strength: float) -> AdapterTerm:
    return term_of(module.to(dtype=torch.float32), strength)


@torch.no_grad()
def verify_tuned(
    written: AdapterState, tuned: WeightOf, *, base: WeightOf, progress: Progress | None = None
) -> Verified:
    """Compare an extracted adapter at strength 1 with the fine-tuned model's own weights, layer by layer, in fp32."""
    worst = Verified(0.0, "", len(written.modules))
    for number, (path, module) in enumerate(written.modules.items()):
        weight, meant = base(path).float(), tuned(path).float()
        error = relative_error(MODES["additive"](weight, [_term(module, 1.0)]), meant, weight)
        worst = Verified(error, path, worst.layers) if error >= worst.error else worst
        if progress is not None:
            progress(number + 1, worst.layers)
    return worst


@torch.no_grad()
def verify_for_tool(
    stored: AdapterState, original: AdapterState, tool: Tool, *, base: WeightOf, progress: Progress | None = None
) -> Verified:
    """Compare what a tool draws of a file, by its own formula, with what we draw of an adapter, in fp32.

    Args:
        stored: the file's layers, with magnitudes as they are stored (`as_stored`).
        original: what it was made of; layers that the tool does not read are not looked at.
        tool: whose formula.
        base: W of each layer.
        progress: called after every layer.
    """
    worst = Verified(0.0, "", len(stored.modules), f"read back as {tool.title} computes it")
    for number, (path, module) in enumerate(stored.modules.items()):
        weight = base(path).float()
        meant = weight
        if path in original.modules:
            meant = MODES["additive"](weight, [_term(original.modules[path], 1.0)])
        drawn = tool.drawn(module, weight)
        error = math.inf if drawn is None else _missed(drawn, meant, weight)
        worst = replace(worst, error=error, layer=path) if error >= worst.error else worst
        if progress is not None:
            progress(number + 1, worst.layers)
    return worst


def _missed(drawn: Tensor, meant: Tensor, weight: Tensor) -> float:
    """The relative error of a change; of an unchanged layer, the share of W by which it was moved."""
    return relative_error(drawn, meant, None if torch.equal(meant, weight) else weight)


@torch.no_grad()
def verify_copy(written: AdapterState, original: AdapterState) -> Verified:
    """Compare two adapters that should be one, without a base: each layer's D, and its magnitude.

    Raises:
        ValueError: they have not the same layers, vectors or axes.
    """
    for what in ("modules", "vectors", "extra"):
        if different := getattr(written, what).keys() ^ getattr(original, what).keys():
            raise ValueError(f"{min(different)}: in one of the two adapters only")
    worst = Verified(0.0, "", len(original.modules))
    for path, module in original.modules.items():
        error = _copy_error(path, written.modules[path], module)
        worst = Verified(error, path, worst.layers) if error >= worst.error else worst
    for path, vector in original.vectors.items():
        error = relative_error(written.vectors[path], vector)
        worst = Verified(error, path, worst.layers) if error > worst.error else worst
    for key, tensor in original.extra.items():
        if not torch.equal(written.extra[key], tensor):
            raise ValueError(f"{key}: a tensor that belongs to no layer came back changed")
    return worst


def _copy_error(path: str, copy: Module, module: Module) -> float:
    mine, theirs = copy.to(dtype=torch.float32), module.to(dtype=torch.float32)
    error = relative_error(mine.delta(), theirs.delta())
    if (mine.magnitude is None) != (theirs.magnitude is None) or mine.axis != theirs.axis:
        raise ValueError(f"{path}: one of the two has a magnitude, or another axis of it")
    if mine.magnitude is None or theirs.magnitude is None:
        return error
    return max(error, relative_error(mine.magnitude, theirs.magnitude))
