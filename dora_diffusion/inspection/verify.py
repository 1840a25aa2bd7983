"""What was written, read back and compared with what was meant: the weights themselves, not the numbers in the file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_diffusion.functional.blend_modes import MODES, AdapterTerm
from dora_diffusion.functional.strengths import Weight, strength_at
from dora_diffusion.state import AdapterState, Module, term_of

WeightOf = Callable[[str], Tensor]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Verified:
    """How near a file is to what it should be.

    Attributes:
        error: the largest ||W'_file - W'|| / ||W' - W|| of a layer, W' what was meant. Without a base, of D and m.
        layer: which; empty when there is none.
        layers: how many were compared.
    """

    error: float
    layer: str
    layers: int

    def sentence(self) -> str:
        """The whole on one line."""
        return f"read back: largest relative error {self.error:.2g} of {self.layers} layers ({self.layer})"


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
        error = _relative(stored - meant, meant - weight)
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
        error = _relative(written.vectors.get(path, torch.zeros_like(summed)).float() - summed, summed)
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


def _relative(difference: Tensor, change: Tensor) -> float:
    """||difference|| / ||change||; where there is no change to speak of, the difference alone."""
    size = float(torch.linalg.vector_norm(change))
    off = float(torch.linalg.vector_norm(difference))
    return off / size if size > 0 else off


@torch.no_grad()
def verify_tuned(
    written: AdapterState, tuned: WeightOf, *, base: WeightOf, progress: Progress | None = None
) -> Verified:
    """Compare an extracted adapter at strength 1 with the fine-tuned model's own weights, layer by layer, in fp32."""
    worst = Verified(0.0, "", len(written.modules))
    for number, (path, module) in enumerate(written.modules.items()):
        weight, meant = base(path).float(), tuned(path).float()
        error = _relative(MODES["additive"](weight, [_term(module, 1.0)]) - meant, meant - weight)
        worst = Verified(error, path, worst.layers) if error >= worst.error else worst
        if progress is not None:
            progress(number + 1, worst.layers)
    return worst


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
        error = _relative(written.vectors[path].float() - vector.float(), vector.float())
        worst = Verified(error, path, worst.layers) if error > worst.error else worst
    for key, tensor in original.extra.items():
        if not torch.equal(written.extra[key], tensor):
            raise ValueError(f"{key}: a tensor that belongs to no layer came back changed")
    return worst


def _copy_error(path: str, copy: Module, module: Module) -> float:
    mine, theirs = copy.to(dtype=torch.float32), module.to(dtype=torch.float32)
    delta = theirs.delta()
    error = _relative(mine.delta().reshape(delta.shape) - delta, delta)
    if (mine.magnitude is None) != (theirs.magnitude is None) or mine.axis != theirs.axis:
        raise ValueError(f"{path}: one of the two has a magnitude, or another axis of it")
    if mine.magnitude is None or theirs.magnitude is None:
        return error
    return max(error, _relative(mine.magnitude - theirs.magnitude, theirs.magnitude))
