"""`train --dry-run --memory 24`: the settings that fit a card, the least that has to be given up first.

In this order: half precision, activations computed twice, a batch taken picture by picture, as few swapped blocks as
will do - all of which train the same adapter, up to rounding - and then a quantised base, which is another base.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dora_diffusion.training.config import TrainConfig

if TYPE_CHECKING:
    from dora_diffusion.training.base.memory import MemoryEstimate

GIB = 2**30
# What the process itself takes of a card, and the share that an allocator's gaps leave. Judgement, not measured.
_PROCESS, _USABLE = GIB // 2, 0.95

Settings = Mapping[str, Any]
Estimate = Callable[[TrainConfig], "MemoryEstimate"]


@dataclass(frozen=True)
class Try:
    """Settings that were looked at.

    Attributes:
        settings: dotted key -> value, beside those of the config.
        estimate: what training with them takes.
    """

    settings: Settings
    estimate: "MemoryEstimate"

    def line(self) -> str:
        """The settings, as flags."""
        return " ".join(f"--{key} {str(value).lower()}" for key, value in self.settings.items()) or "as it is"


def usable(memory: float) -> int:
    """Bytes that tensors can have of a card of so many GiB."""
    return max(0, int(memory * GIB * _USABLE) - _PROCESS)


def fitted(config: TrainConfig, limit: int, estimate: Estimate) -> list[Try]:
    """What was tried, until something fitted; the last of them fits, or nothing does.

    Args:
        config: of the run.
        limit: bytes that tensors can have.
        estimate: of a config; a ValueError where the base cannot do what it asks for.
    """
    tried: list[Try] = []
    settings: dict[str, Any] = {}
    for free, rung in _rungs(config):
        wanted = {**settings, **rung}
        try:
            found = estimate(with_settings(config, wanted))
        except ValueError:  # a base without gradient checkpointing; of the config as it is, it is to be told
            if not tried:
                raise
            continue
        settings = wanted
        tried.append(Try(settings, found))
        if found.total <= limit:
            break
        count = None if free else swaps_that_fit(found, limit)
        if count is not None:
            tried.append(Try({**settings, "base.swap_blocks": count}, found.with_swapped(count)))
            break
    return tried


def _rungs(config: TrainConfig) -> list[tuple[bool, Settings]]:
    """What is tried one after another, each beside what was tried before, and whether it is too early to swap."""
    optim = config.optim
    rungs: list[Settings] = [{}]
    if optim.mixed_precision == "no":
        rungs.append({"optim.mixed_precision": "bf16"})
    if not optim.gradient_checkpointing:
        rungs.append({"optim.gradient_checkpointing": True})
    if optim.batch_size > 1:
        taken = optim.batch_size * optim.gradient_accumulation
        rungs.append({"optim.batch_size": 1, "optim.gradient_accumulation": taken})
    free = [(rung is not rungs[-1], rung) for rung in rungs]
    return free if config.base.quantise is not None else [*free, (False, {"base.quantise": "nf4"})]


def swaps_that_fit(found: "MemoryEstimate", limit: int) -> int | None:
    """The fewest swapped blocks with which an estimate is within a limit; None where even all are too few."""
    counts = range(1, len(found.spared))
    return next((count for count in counts if found.with_swapped(count).total <= limit), None)


def with_settings(config: TrainConfig, settings: Settings) -> TrainConfig:
    """A config with other values of some dotted keys."""
    told = config.model_dump()
    for key, value in settings.items():
        section, name = key.split(".")
        told[section][name] = value
    return TrainConfig.model_validate(told)


def fitting_lines(tried: Sequence[Try], memory: float) -> list[str]:
    """What was tried, as a small table, and what it comes to."""
    limit = usable(memory)
    fits = tried[-1].estimate.total <= limit
    rows = [f"{one.estimate.total / GIB:8.2f} GiB  {one.line()}" for one in tried]
    lines = [("tried      " if index == 0 else " " * 11) + row for index, row in enumerate(rows)]
    lines[-1] += "  <- fits" if fits else ""
    lines.append(f"card       {memory:g} GiB, of which tensors can have {limit / GIB:.1f}")
    if not fits:
        lines.append("           nothing fits; a smaller data.resolution would take less")
    return lines
