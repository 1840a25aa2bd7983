"""Curves as SVG, in a page that needs nothing but itself."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 900, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 30
_TICKS = 5
_BINS = 300
_AROUND = 8
# Of a curve that is faint: what lies above is cut off at the edge, so that a few steps do not flatten the rest.
_SHOWN_SHARE = 0.99


@dataclass(frozen=True)
class Curve:
    """One curve.

    Attributes:
        name: in the legend.
        points: (x, y) pairs, by x; what is no finite number is left out.
        colour: of CSS.
        is_faint: drawn thin, and cut off where it is much higher than usual.
        has_dots: a dot at each point.
    """

    name: str
    points: Points
    colour: str
    is_faint: bool = False
    has_dots: bool = False


def binned(points: Points) -> list[tuple[float, float]]:
    """At most some hundred points: the means of as many stretches of equal numbers of points."""
    finite = _finite(points)
    size = math.ceil(len(finite) / _BINS)
    stretches = (finite[at : at + size] for at in range(0, len(finite), max(1, size)))
    return [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in stretches]


def smoothed(points: Points) -> list[tuple[float, float]]:
    """The mean of each point and those around it, fewer at both ends."""
    found = binned(points)
    around = min(_AROUND, len(found) // 8)
    windows = (found[max(0, at - around) : at + around + 1] for at in range(len(found)))
    return [(x, fmean(y for _, y in window)) for (x, _), window in zip(found, windows, strict=True)]


def chart(curves: Sequence[Curve]) -> str:
    """An SVG of curves over steps; empty where none has a point."""
    drawn = [(curve, _finite(curve.points)) for curve in curves]
    drawn = [(curve, points) for curve, points in drawn if points]
    if not drawn:
        return ""
    low, high = _range(drawn)
    first = min(points[0][0] for _, points in drawn)
    scale = _Scale(first, max(max(points[-1][0] for _, points in drawn), first + 1), low, high)
    parts = [*_axes(scale), *(part for curve, points in drawn for part in _curve(curve, points, scale))]
    legend = " ".join(f'<span style="color:{escape(curve.colour)}">{escape(curve.name)}</span>' for curve, _ in drawn)
    return (
        f'<p class="legend">{legend}</p>\n<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">\n'
        + "\n".join(parts)
        + "\n</svg>"
    )


@dataclass(frozen=True)
class _Scale:
    first: float
    last: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.first) / (self.last - self.first) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _range(drawn: Iterable[tuple[Curve, Points]]) -> tuple[float, float]:
    """From the lowest to the highest that is shown; never of no height."""
    values: list[float] = []
    for curve, points in drawn:
        found = sorted(y for _, y in points)
        values += found[: max(1, math.ceil(_SHOWN_SHARE * len(found)))] if curve.is_faint else found
    low, high = min(values), max(values)
    edge = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - edge, high + edge


def _axes(scale: _Scale) -> Iterator[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for tick in _ticks(scale.low, scale.high):
        y = scale.y(tick)
        yield f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" class="grid"/>'
        yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
    for tick in _ticks(scale.first, scale.last):
        x = scale.x(tick)
        yield f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>'
    yield f'<line x1="{_LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}" class="axis"/>'


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two others."""
    rough = (high - low) / _TICKS
    unit = 10 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _curve(curve: Curve, points: Points, scale: _Scale) -> Iterator[str]:
    places = [(scale.x(x), scale.y(y)) for x, y in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    width, opacity = (1, 0.35) if curve.is_faint else (2, 1)
    colour = escape(curve.colour)
    yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{width}" opacity="{opacity}"/>'
    if curve.has_dots:
        for x, y in places:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
