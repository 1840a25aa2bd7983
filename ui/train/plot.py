"""The losses of a run as a picture: inline SVG in the page's own colours, light or dark, without a script."""

import math
from collections.abc import Mapping, Sequence

from ui.train.runs import Losses

WIDTH, HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 30
_MOST_POINTS = 400
_SMOOTHING = 0.9

Point = tuple[float, float]


def loss_plot(losses: Losses, *, total: int) -> str:
    """SVG of the training loss (each step, and smoothed) and of the validation loss; a sentence when there is none.

    Args:
        losses: by step.
        total: steps of the whole run, which is how far the axis goes.
    """
    train, validation = _finite(losses.train), _finite(losses.validation)
    if not train and not validation:
        return '<p class="train-none">No loss is written yet.</p>'
    values = [*train.values(), *validation.values()]
    low, high = min(values), max(values)
    margin = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    axes = _Axes(max(total, *train, *validation, 1), low - margin, high + margin)
    parts = [
        *axes.lines(),
        _line(axes, _thinned(list(train.items())), "raw"),
        _line(axes, _thinned(_smoothed(train)), "smooth"),
        _line(axes, list(validation.items()), "validation"),
        *(axes.dot(point) for point in validation.items()),
    ]
    return (
        f'<svg class="train-plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_summary(train, validation)}">'
        f"{''.join(parts)}</svg>"
        '<p class="train-legend"><span class="raw">loss</span> <span class="smooth">smoothed</span> '
        '<span class="validation">on fixed noise</span></p>'
    )


def _summary(train: Mapping[int, float], validation: Mapping[int, float]) -> str:
    ends = [
        f"{name} {list(values.values())[-1]:.4f} at step {list(values)[-1]}"
        for name, values in (("loss", train), ("loss on fixed noise", validation))
        if values
    ]
    return ", ".join(ends)


def _finite(values: Mapping[int, float]) -> dict[int, float]:
    return {step: value for step, value in values.items() if math.isfinite(value)}


def _smoothed(values: Mapping[int, float]) -> list[Point]:
    """An exponential moving average, its start corrected as Adam's moments are."""
    mean, points = 0.0, []
    for index, (step, value) in enumerate(values.items(), start=1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        points.append((float(step), mean / (1 - _SMOOTHING**index)))
    return points


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most so many points, the last one among them."""
    stride = max(1, math.ceil(len(points) / _MOST_POINTS))
    return [*points[:-1:stride], *points[-1:]]


def _line(axes: "_Axes", points: Sequence[Point], name: str) -> str:
    corners = " ".join(f"{axes.x(step):.1f},{axes.y(value):.1f}" for step, value in points)
    return f'<polyline class="{name}" points="{corners}"/>' if points else ""


class _Axes:
    """Steps to the right, losses upwards."""

    def __init__(self, steps: int, low: float, high: float) -> None:
        self._steps, self._low, self._high = steps, low, high

    def x(self, step: float) -> float:
        """Where a step is, in the SVG's units."""
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * step / self._steps

    def y(self, loss: float) -> float:
        """Where a loss is."""
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (loss - self._low) / (self._high - self._low)

    def dot(self, point: Point) -> str:
        """A small disc."""
        return f'<circle class="validation" cx="{self.x(point[0]):.1f}" cy="{self.y(point[1]):.1f}" r="2.5"/>'

    def lines(self) -> list[str]:
        """Grid lines with their numbers."""
        parts = []
        for value in _ticks(self._low, self._high, 6):
            y = self.y(value)
            parts.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        for step in _ticks(0, self._steps, 5):
            if step == int(step):
                x = self.x(step)
                parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{step:.0f}</text>')
        return parts


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers of [low, high], about so many."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    stride = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / stride - 1e-9)
    return [round(index * stride, 10) for index in range(first, math.floor(high / stride + 1e-9) + 1)]
