"""Pictures of what adapters do to a base, block by block: how far they turn rows, and how far they stretch them.

The two numbers of DoRA's section 3.2, of every row, averaged over a block's layers and rows:

    direction  1 - cos(W'_i, W_i)        magnitude  | ||W'_i|| / ||W_i|| - 1 |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.blending import block_of
from dora_diffusion.functional.blend_modes import ADDITIVE, MODES
from dora_diffusion.functional.dora import TINY_NORM, rows
from dora_diffusion.pipelines.base_weights import BaseWeights
from dora_diffusion.state import AdapterState, term_of
from dora_diffusion.utils.atomic import write_atomically


@dataclass(frozen=True)
class Change:
    """How far rows are turned and stretched, on average.

    Attributes:
        direction: 1 - cos, 0 to 2.
        magnitude: share of the row's length.
    """

    direction: float
    magnitude: float


@torch.no_grad()
def changes(adapter: AdapterState, base: BaseWeights) -> dict[str, Change]:
    """Block -> its change, at strength 1."""
    found: dict[str, list[Tensor]] = {}
    for path, module in adapter.modules.items():
        weight = base(path).float()
        new = MODES[ADDITIVE](weight, [term_of(module.to(dtype=torch.float32))])
        found.setdefault(block_of(path), []).append(_row_changes(rows(weight), rows(new)))
    means = {block: torch.cat(parts, dim=1).mean(dim=1).tolist() for block, parts in found.items()}
    return {block: Change(*mean) for block, mean in means.items()}


def _row_changes(weight: Tensor, new: Tensor) -> Tensor:
    """(2, rows): direction and magnitude of each row that has a direction."""
    before, after = weight.norm(dim=1), new.norm(dim=1)
    alive = (before > TINY_NORM) & (after > TINY_NORM)
    cosines = (weight * new).sum(1)[alive] / (before * after)[alive]
    return torch.stack([(1 - cosines).clamp(min=0), (after[alive] / before[alive] - 1).abs()])


def plot_adapters(adapters: Mapping[str, AdapterState], base: BaseWeights, output: Path) -> Path:
    """Draw the changes of adapters, by their names, side by side, as a PNG.

    Raises:
        ValueError: matplotlib is not installed, or an adapter has a layer that the base lacks.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'dora-diffusion[plots]'") from None
    found = {name: changes(adapter, base) for name, adapter in adapters.items()}
    blocks = list(dict.fromkeys(block for of in found.values() for block in of))
    figure = Figure(figsize=(11, 1.6 + 0.34 * len(blocks)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, blocks, {name: [_of(of, b).direction for b in blocks] for name, of in found.items()})
    _bars(right, blocks, {name: [_of(of, b).magnitude for b in blocks] for name, of in found.items()})
    left.set_title("direction: 1 - cosine of a row, before and after")
    right.set_title("magnitude: change of a row's length")
    left.invert_yaxis()
    right.legend()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    write_atomically(output, _png(canvas))
    return output


def _of(changes: Mapping[str, Change], block: str) -> Change:
    return changes.get(block, Change(0.0, 0.0))


def _bars(axes: Any, blocks: Sequence[str], values: Mapping[str, Sequence[float]]) -> None:
    height = 0.8 / len(values)
    for number, (name, of) in enumerate(values.items()):
        places = [index + (number - (len(values) - 1) / 2) * height for index in range(len(blocks))]
        axes.barh(places, of, height=height, label=name)
    axes.set_yticks(range(len(blocks)), blocks, fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.locator_params(axis="x", nbins=4)


def _png(canvas: Any) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()
