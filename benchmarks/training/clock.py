"""User CPU time of several ways to do the same work, taken in turns; what a busy machine does to them is left out.

Wall time tells how busy the machine was. User CPU time does not, but caches and clock rates that others share still
move it by some percent, for minutes at a time. So ways are taken in many short turns, and of the rounds only the third
counts that was quietest: the rounds in which all ways together took the least. All are chosen by the same rounds, so
that none is flattered, and a ratio is one of two neighbours in time.
"""

import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def user_seconds() -> float:
    """User CPU seconds of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


class Stopwatch:
    """Seconds of the parts of a turn; what no part has taken is the rest of it."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._started: dict[str, float] = {}

    def reset(self) -> None:
        """A new turn begins."""
        self.parts = {}

    def start(self, part: str) -> None:
        """A part begins."""
        self._started[part] = user_seconds()

    def stop(self, part: str) -> None:
        """It ends; a part may come several times in a turn."""
        self.parts[part] = self.parts.get(part, 0.0) + user_seconds() - self._started.pop(part)

    def notes(self, part: str, optimizer: torch.optim.Optimizer) -> None:
        """An optimiser's steps are a part from now on."""
        optimizer.register_step_pre_hook(lambda *_: self.start(part))
        optimizer.register_step_post_hook(lambda *_: self.stop(part))

    def around(self, part: str, call: Callable[P, T]) -> Callable[P, T]:
        """A call whose time is a part's."""

        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            self.start(part)
            try:
                return call(*args, **kwargs)
            finally:
                self.stop(part)

        return timed


@dataclass(frozen=True)
class Way:
    """One way to do the work.

    Attributes:
        take: does it once; this is timed.
        enter: makes ready for it, untimed.
    """

    take: Callable[[], object]
    enter: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Turn:
    """User CPU seconds of one turn, and of its parts."""

    seconds: float
    parts: Mapping[str, float]


Round = Mapping[str, Turn]


def alternate(ways: Mapping[str, Way], *, rounds: int, watch: Stopwatch | None = None) -> list[Round]:
    """Every way once to warm up, then in turns, so many rounds; nobody always follows the same neighbour."""
    names, clock = list(ways), watch or Stopwatch()
    for name in names:
        _turn(ways[name], clock)
    taken = []
    for number in range(rounds):
        shift = number % len(names)
        taken.append({name: _turn(ways[name], clock) for name in names[shift:] + names[:shift]})
    return taken


def _turn(way: Way, watch: Stopwatch) -> Turn:
    way.enter()
    watch.reset()
    start = user_seconds()
    way.take()
    return Turn(user_seconds() - start, watch.parts)


def quietest(rounds: Sequence[Round]) -> list[Round]:
    """The third in which all ways together took the least, at least one."""
    by_sum = sorted(rounds, key=lambda turns: sum(turn.seconds for turn in turns.values()))
    return by_sum[: max(1, len(rounds) // 3)]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some values, one a round."""

    median: float
    low: float
    high: float
    rounds: int


def spread(values: Sequence[float]) -> Spread:
    """Of one value or more."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return Spread(median(values), low, high, len(values))


def seconds(rounds: Sequence[Round], name: str) -> Spread:
    """Of a way."""
    return spread([turns[name].seconds for turns in rounds])


def ratio(rounds: Sequence[Round], name: str, reference: str) -> Spread:
    """A way's seconds over another's, round by round."""
    return spread([turns[name].seconds / turns[reference].seconds for turns in rounds])


def share(rounds: Sequence[Round], name: str, parts: Sequence[str]) -> Spread:
    """The share that some parts of a way have in it, round by round; a part that never came has none."""
    found = [turns[name] for turns in rounds]
    return spread([sum(turn.parts.get(part, 0.0) for part in parts) / turn.seconds for turn in found])
