"""Epochs and batches as OneTrainer counts them, and as they are here."""

from typing import Any

from dora_diffusion.training.import_config.counts import samples_of_an_epoch
from dora_diffusion.training.import_config.records import Answer, Source, lost, needless, to
from dora_diffusion.training.import_config.values import number, whole


def accumulation(source: Source) -> int:
    """Forward passes of an optimiser step."""
    return max(1, whole(source.get("gradient_accumulation_steps", 1)))


def epoch(source: Source) -> float:
    """Optimiser steps of an epoch: batches that would not be full are left out there."""
    batches = samples_of_an_epoch(source) // max(1, whole(source.get("batch_size", 1)))
    return max(1, batches) / accumulation(source)


def steps_of_run(source: Source) -> int | None:
    """Optimiser steps of the run; None when pictures that are not here decide."""
    try:
        return max(1, int(epoch(source) * whole(source.get("epochs", 100))))
    except ValueError:
        return None


def each(key: str, unit_name: str) -> Any:
    """Steps between something, from a number and its unit."""

    def convert(value: Any, source: Source) -> Answer:
        unit = str(source.get(unit_name, "NEVER")).upper()
        count = number(value)
        if unit == "NEVER" or not count:
            return needless("off there too")
        if unit == "STEP":
            return to(key, max(1, int(count / accumulation(source))))
        if unit == "EPOCH":
            return to(key, max(1, int(count * epoch(source))))
        return lost(f"in {unit.lower()}s, which are counted in steps here: set {key}")

    return convert
