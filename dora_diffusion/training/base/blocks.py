"""The blocks that a denoiser is built of: what is swapped, and what is compiled, one by one."""

from typing import Any

import torch
from torch import nn


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> block, in the order in which the model holds them.

    diffusers' models say which classes they repeat; of one that does not, it is what lies in its own lists.
    """
    kinds = frozenset(getattr(model, "_repeated_blocks", None) or ())
    if kinds:
        return {path: block for path, block in model.named_modules() if type(block).__name__ in kinds}
    lists = {name: child for name, child in model.named_children() if isinstance(child, nn.ModuleList)}
    return {f"{name}.{index}": block for name, child in lists.items() for index, block in enumerate(child)}


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile each block's forward; blocks of one class and shapes share what is compiled.

    The forward alone, so that what is hooked to a block (swapping, gradient checkpointing) stays outside.

    Args:
        model: a denoiser, with its adapters in place.
        options: as `torch.compile` takes them.
    """
    for block in repeated_blocks(model).values():
        block.forward = torch.compile(block.forward, **options)


def release_blocks(model: nn.Module) -> None:
    """Undo `compile_blocks`."""
    for block in repeated_blocks(model).values():
        vars(block).pop("forward", None)
