"""Times of several variants of the same work, taken in turns so that a noisy machine is noisy to all of them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant, and its ratios to a reference measured in the same round.

    Attributes:
        seconds: median.
        ratio: median over median of the reference.
        low: lower quartile of the ratios round by round.
        high: upper quartile.
        rounds: how many.
    """

    seconds: float
    ratio: float
    low: float
    high: float
    rounds: int


def once(call: Call, device: str) -> float:
    """Seconds of one call, waiting for the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(calls: Mapping[str, Call], *, rounds: int, device: str, repeat: int = 1) -> dict[str, list[float]]:
    """Every variant once to warm up, then in turns, `rounds` times; each time is the mean of `repeat` calls."""
    names = list(calls)
    for name in names:
        once(calls[name], device)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)  # nobody always follows the same neighbour
        for name in names[shift:] + names[:shift]:
            taken[name].append(sum(once(calls[name], device) for _ in range(repeat)) / repeat)
    return taken


def compare(taken: Mapping[str, list[float]], reference: str) -> dict[str, Timing]:
    """Medians, and ratios to one of the variants."""
    base = taken[reference]
    found = {}
    for name, seconds in taken.items():
        ratios = [mine / theirs for mine, theirs in zip(seconds, base, strict=True)]
        low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
        found[name] = Timing(median(seconds), median(seconds) / median(base), low, high, len(ratios))
    return found


def timed(calls: Mapping[str, Call], reference: str, *, rounds: int, device: str, repeat: int = 1) -> dict[str, Timing]:
    """`alternate`, then `compare`."""
    return compare(alternate(calls, rounds=rounds, device=device, repeat=repeat), reference)
