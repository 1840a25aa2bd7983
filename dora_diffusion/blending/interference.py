"""How far adapters get in each other's way: the size of what each changes, and the angle between the changes."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.blending.layer_inputs import piece_of
from dora_diffusion.functional.blend_modes import difference
from dora_diffusion.pipelines.base_weights import weights_of
from dora_diffusion.state import AdapterState, WeightOf
from dora_diffusion.utils.hardware import in_float64

Pair = tuple[str, str]


@dataclass(frozen=True)
class Interference:
    """Adapters beside one another, at strength 1; T = W' - W.

    Attributes:
        norms: adapter -> block -> ||T|| over the block's layers (a block without any is left out).
        overall: adapter -> ||T|| over all layers.
        cosines: two adapters -> block -> <T_a, T_b> / (||T_a|| ||T_b||): 1 they pull together, 0 they do not meet,
            -1 they undo each other. Blocks that only one of them changes count as 0.
        overall_cosines: the same over all layers.
        shared: two adapters -> how many layers both change.
    """

    norms: Mapping[str, Mapping[str, float]]
    overall: Mapping[str, float]
    cosines: Mapping[Pair, Mapping[str, float]]
    overall_cosines: Mapping[Pair, float]
    shared: Mapping[Pair, int]

    def __repr__(self) -> str:
        angles = [f"{a} ~ {b} {cosine:+.3f}" for (a, b), cosine in self.overall_cosines.items()]
        return f"Interference({len(self.norms)} adapters; {', '.join(angles) or 'no two of them'})"

    def as_json(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        pairs = [
            {
                "adapters": list(pair),
                "cosine": self.overall_cosines[pair],
                "layers": self.shared[pair],
                "blocks": dict(self.cosines[pair]),
            }
            for pair in self.cosines
        ]
        return {
            "norms": {name: {"overall": self.overall[name], "blocks": dict(self.norms[name])} for name in self.norms},
            "pairs": pairs,
        }

    def table(self) -> str:
        """For people: a line per block, a column for each adapter's norm and for each pair's cosine."""
        blocks = list(dict.fromkeys(block for found in self.norms.values() for block in found))
        heads = ["block", *self.norms, *(f"{a} ~ {b}" for a, b in self.cosines)]
        lines = [[b, *self._line(n.get(b) for n in self.norms.values()), *self._angles(b)] for b in blocks]
        angles = [f"{cosine:+.3f}" for cosine in self.overall_cosines.values()]
        lines.append(["all", *self._line(self.overall.values()), *angles])
        widths = [max(len(row[column]) for row in [heads, *lines]) for column in range(len(heads))]
        return "\n".join(
            "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(row))
            for row in (zip(cells, widths, strict=True) for cells in [heads, *lines])
        )

    def _line(self, norms: Iterable[float | None]) -> list[str]:
        return ["-" if norm is None else f"{norm:.4g}" for norm in norms]

    def _angles(self, block: str) -> list[str]:
        return [f"{found[block]:+.3f}" if block in found else "-" for found in self.cosines.values()]


@torch.no_grad()
def interference(adapters: Mapping[str, AdapterState], *, base: Any) -> Interference:
    """Measure adapters against each other, one layer at a time.

    Args:
        adapters: name -> adapter, two or more for there to be a cosine.
        base: a pipeline, an embedded base's name, a diffusers folder or a single .safetensors file.

    Raises:
        ValueError: a layer that the base does not have, or has in another shape.

    Examples:
        ```python
        import dora_diffusion as dd

        adapters = {"ink": dd.load_adapter("ink.safetensors"), "lego": dd.load_adapter("lego.safetensors")}
        print(dd.interference(adapters, base="pocket").table())
        ```
    """
    weight_of = weights_of(base)
    products: dict[tuple[str, str, str], float] = {}
    shared = dict.fromkeys(itertools.combinations(adapters, 2), 0)
    for path in dict.fromkeys(path for adapter in adapters.values() for path in adapter.modules):
        changes = _changes(path, adapters, weight_of)
        block = block_of(path)
        for one, other in itertools.combinations_with_replacement(changes, 2):
            key = (block, one, other)
            products[key] = products.get(key, 0.0) + float(torch.dot(changes[one], changes[other]))
        for pair in itertools.combinations(changes, 2):
            shared[pair] += 1
    return _measured(list(adapters), products, shared)


def block_of(path: str) -> str:
    """A layer's block: its path up to the first number, or its first two parts. Strengths may name it.

    `unet.down_blocks.1.attentions.0...` -> `unet.down_blocks.1`, `unet.conv_in` -> itself.
    """
    parts = path.split(".")
    end = next((index + 1 for index, part in enumerate(parts) if part.isdigit()), 2)
    return ".".join(parts[:end])


def _changes(path: str, adapters: Mapping[str, AdapterState], weight_of: WeightOf) -> dict[str, Tensor]:
    """Each adapter's W' - W of a layer, flat, fp64."""
    weight = weight_of(path).detach()
    pieces = [
        piece_of(name, adapter.modules[path], 1.0, weight, path)
        for name, adapter in adapters.items()
        if path in adapter.modules
    ]
    return {piece.name: in_float64(difference(weight, piece.term())).flatten() for piece in pieces}


def _measured(
    names: Sequence[str], products: Mapping[tuple[str, str, str], float], shared: Mapping[Pair, int]
) -> Interference:
    blocks = list(dict.fromkeys(block for block, _, _ in products))
    squares = {(block, one): value for (block, one, other), value in products.items() if one == other}
    totals = {name: sum(squares.get((block, name), 0.0) for block in blocks) for name in names}
    cosines: dict[Pair, dict[str, float]] = {}
    overall: dict[Pair, float] = {}
    for one, other in shared:
        dots = {block: products.get((block, one, other), 0.0) for block in blocks}
        cosines[one, other] = {
            block: _cosine(dots[block], squares.get((block, one), 0.0), squares.get((block, other), 0.0))
            for block in blocks
            if (block, one) in squares or (block, other) in squares
        }
        overall[one, other] = _cosine(sum(dots.values()), totals[one], totals[other])
    return Interference(
        norms={n: {b: math.sqrt(squares[b, n]) for b in blocks if (b, n) in squares} for n in names},
        overall={name: math.sqrt(total) for name, total in totals.items()},
        cosines=cosines,
        overall_cosines=overall,
        shared=shared,
    )


def _cosine(dot: float, one: float, other: float) -> float:
    """From <a, b> and the squares; 0 where one of them is nothing."""
    return dot / math.sqrt(one * other) if one * other > 0 else 0.0
