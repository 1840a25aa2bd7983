"""Steps, epochs and batches as sd-scripts counts them, and as they are here."""

import math

from dora_diffusion.training.import_config.counts import samples_of_an_epoch, steps_of
from dora_diffusion.training.import_config.records import Source
from dora_diffusion.training.import_config.values import flag, number, whole


def network(source: Source) -> str:
    """flux, sd3, lumina, lycoris or lora."""
    module = f"{source.get('network_module', '')} {source.get('LoRA_type', '')}".lower()
    return next((name for name in ("flux", "sd3", "lumina", "lycoris") if name in module), "lora")


def _has_classes(source: Source) -> bool:
    return any(folder.is_class for folder in source.folders)


def batch(source: Source) -> int:
    """Pictures of a batch, as theirs."""
    return max(1, whole(source.get("train_batch_size", source.get("batch_size", 1))))


def halves(source: Source) -> tuple[bool, bool]:
    """Whether the batch is halved, or the steps.

    With class pictures half of a batch is of the class there; here they stand beside it.
    """
    if not _has_classes(source):
        return False, False
    is_even = batch(source) % 2 == 0
    return is_even, not is_even


def epoch(source: Source) -> int:
    """Optimiser steps of one epoch as theirs: class pictures are made as many as the others."""
    samples = samples_of_an_epoch(source) * (2 if _has_classes(source) else 1)
    accumulation = max(1, whole(source.get("gradient_accumulation_steps", 1)))
    return steps_of(samples, batch=batch(source), accumulation=accumulation)


def epochs_decide(source: Source) -> bool:
    """Whether max_train_epochs is believed and not max_train_steps; the GUI has it the other way round."""
    is_gui = source.has("LoRA_type")
    return source.has("max_train_epochs") and not (is_gui and number(source.get("max_train_steps", 0)))


def is_flow(source: Source) -> bool:
    """Whether the base is trained by flow matching."""
    return network(source) in {"flux", "sd3", "lumina"}


def _theirs(source: Source) -> float | None:
    """Optimiser steps of the run as theirs; None when pictures that are not here decide."""
    if not epochs_decide(source):
        return float(number(source.get("max_train_steps", 1600)))
    epochs = source.get("max_train_epochs")
    try:
        return whole(epochs) * epoch(source)
    except ValueError:
        return None


def ours(steps: float, source: Source) -> int:
    """Their optimiser steps as ours."""
    return max(1, math.ceil(steps / 2) if halves(source)[1] else int(steps))


def trains_text(source: Source) -> bool:
    """Whether text encoders are trained."""
    return not (
        flag(source.get("network_train_unet_only", False))
        or flag(source.get("cache_text_encoder_outputs", False))
        or flag(source.get("cache_text_encoder_outputs_to_disk", False))
    )


def steps_here(source: Source) -> int | None:
    """Steps of the run as ours; None when pictures that are not here decide."""
    steps = _theirs(source)
    return None if steps is None else ours(steps, source)
