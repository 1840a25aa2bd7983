"""How far what is trained has moved the base, block by block: how rows have turned and stretched."""

import math

from dora_diffusion.blending import block_of
from dora_diffusion.functional.row_changes import RowChanges, mean_changes
from dora_diffusion.training.base.trainable import TrainablePipeline


def movement(trainable: TrainablePipeline) -> dict[str, float]:
    """`direction/BLOCK`, the mean angle of a block's rows in degrees; `magnitude/BLOCK`, how much longer they are.

    That is the mean of | ||W'_i|| / ||W_i|| - 1 |. Both together take as long as the norms of one step.
    """
    blocks: dict[str, list[RowChanges]] = {}
    for name, injection in trainable.injections.items():
        for path, changes in injection.row_changes().items():
            blocks.setdefault(block_of(f"{name}.{path}"), []).append(changes)
    found: dict[str, float] = {}
    for block, of in blocks.items():
        angle, stretch = mean_changes(of)
        found |= {f"direction/{block}": math.degrees(angle), f"magnitude/{block}": stretch}
    return found
