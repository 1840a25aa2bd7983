"""When the device's memory does not suffice: one line that says what to set, and a checkpoint of what is done."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dora_diffusion.training.config import TrainConfig
from dora_diffusion.utils.text import first_line

# How torch's allocator of main memory says it.
_CPU_SAYS = "DefaultCPUAllocator: can't allocate memory"


class MemoryExhausted(ValueError):
    """The device's memory did not suffice; one line."""


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that there was no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and _CPU_SAYS in str(error))


def exhausted(error: BaseException, config: TrainConfig, *, doing: str, saved: bool) -> MemoryExhausted:
    """What to tell.

    Args:
        error: that was raised.
        config: of the run.
        doing: what it was raised by, such as "step 12".
        saved: whether there is a checkpoint of all that is done.
    """
    kept = " Everything up to it is in a checkpoint: go on with --resume latest --accept-changes." if saved else ""
    return MemoryExhausted(
        f"{doing}: the device's memory does not suffice ({first_line(error).rstrip('.')}); {_advice(config, doing)}; "
        f"--dry-run --memory 24 finds what fits a card of 24 GiB.{kept}"
    )


@contextmanager
def told_of_memory(config: TrainConfig) -> Iterator[None]:
    """Tell of what happens before the first step, too: loading, class pictures, captions, latents."""
    try:
        yield
    except RuntimeError as error:
        if not is_exhausted(error):
            raise
        raise exhausted(error, config, doing="before or between the steps", saved=False) from None


def _advice(config: TrainConfig, doing: str) -> str:
    """The setting that costs least of those that are not made yet."""
    optim = config.optim
    if doing.startswith("previews"):
        return "set preview.prompts with a smaller size, or fewer of them"
    if not optim.gradient_checkpointing:
        return "set optim.gradient_checkpointing true"
    if optim.batch_size > 1:
        taken = optim.batch_size * optim.gradient_accumulation
        return f"set optim.batch_size 1 and optim.gradient_accumulation {taken}"
    if optim.mixed_precision == "no":
        return "set optim.mixed_precision bf16"
    more = f"base.swap_blocks above {config.base.swap_blocks}" if config.base.swap_blocks else "base.swap_blocks"
    return f"set {more}" + ("" if config.base.quantise else ", or base.quantise nf4")
