"""Steps as ai-toolkit counts them, and as they are here."""

import math
from typing import Any

from dora_diffusion.training.import_config.records import Answer, Source, to
from dora_diffusion.training.import_config.values import number, whole


def accumulated(source: Source) -> int:
    """`gradient_accumulation_steps` counts each accumulation for a step, `gradient_accumulation` does not."""
    return max(1, whole(source.get("train.gradient_accumulation_steps", 1)))


def ours(steps: Any, source: Source) -> int:
    """Their steps as optimiser steps of ours; every other one is the class's there, here a step has both."""
    halves = 2 if any(folder.is_class for folder in source.folders) else 1
    return math.ceil(whole(steps) / (accumulated(source) * halves))


def every(key: str) -> Any:
    """A row's conversion of the steps between something."""

    def convert(value: Any, source: Source) -> Answer:
        return to(key, ours(value, source)) if number(value) else to(key, 0)

    return convert
