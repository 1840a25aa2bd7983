"""What a tiny pipeline of a family is, for tests."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Tiny:
    """A pipeline with random weights, built in a moment.

    Attributes:
        family: the name of the family that it must be recognised as.
        make: builds it under whatever random state there is.
        side: pixels of the pictures that it draws in tests.
        original: side of the picture that the pipeline says its own comes from, where that is not the picture's.
        plain_load: why plain diffusers cannot load an adapter into it; None when it can.
    """

    family: str
    make: Callable[[], Any]
    side: int = 32
    original: int | None = None
    plain_load: str | None = None

    def build(self, seed: int = 0) -> Any:
        """The same weights for the same seed; fp32, CPU, eval mode, no progress bar, no adapters' effect at start."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipe = self.make()
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
        pipe.set_progress_bar_config(disable=True)
        return pipe
