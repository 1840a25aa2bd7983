"""Where a section runs, and the rows that it comes to."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dora_diffusion.utils.text import first_line

Row = Mapping[str, Any]
Rows = Iterator[Row]
NOT_ON_CPU = "not measured on a CPU"


@dataclass(frozen=True)
class Setting:
    """Where and how hard.

    Attributes:
        device: "cuda" or "cpu".
        is_tiny: tiny shapes: does it run, not how fast.
        seconds: that the section may take; what would begin later is left out, and said to be.
        started: when it began, by the monotonic clock.
    """

    device: str
    is_tiny: bool
    seconds: float
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - self.started)

    @property
    def rounds(self) -> int:
        """How many turns are timed."""
        return 1 if self.is_tiny else 5


class NotAvailable(Exception):
    """Something that is no fault: a library that is not installed."""


def row_of(facts: Row, call: Callable[[], Row]) -> Row:
    """`facts` and what a call says; of one that fails, why. What is not available is no fault."""
    try:
        return {**facts, **call()}
    except NotAvailable as reason:
        return {**facts, "left_out": first_line(reason)}
    except Exception as error:
        return {**facts, "error": f"{type(error).__name__}: {first_line(error)}"}
