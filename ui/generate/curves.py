"""A strength's curve over the run: its name or its points as text, and how it looks."""

from dora_diffusion.functional.schedules import Schedule
from dora_diffusion.generation.curves import NAMED_CURVES, Curve, curve_text, parse_curve
from ui.backend.checks import MAX_STRENGTH
from ui.markup import alert, polyline

CONSTANT = "constant"
OWN_POINTS = "own points"
CURVE_NAMES = (*NAMED_CURVES, OWN_POINTS)
_WIDTH, _HEIGHT = 240, 56
_SAMPLES = 96


def points_text(curve: Curve | None) -> str:
    """ "0:0, 1:1"; empty for a constant."""
    return ", ".join(f"{progress:g}:{factor:g}" for progress, factor in curve or ())


def text_of_name(name: object) -> str:
    """The points of a named curve as text.

    Raises:
        ValueError: no such name.
    """
    if not isinstance(name, str) or name not in NAMED_CURVES:
        raise ValueError(f"curve: got {str(name)[:40]!r}, expected one of {', '.join(NAMED_CURVES)}")
    return points_text(NAMED_CURVES[name])


def name_of_text(text: object) -> str:
    """The name of the curve that a text describes; `OWN_POINTS` when it has none, or is no curve."""
    try:
        name = curve_text(parse_curve(text))
    except ValueError:
        return OWN_POINTS
    return name if name in NAMED_CURVES else OWN_POINTS


def curve_html(text: object) -> str:
    """The curve of a text as SVG in the page's colours, or why it is none."""
    try:
        curve = parse_curve(text)
    except ValueError as error:
        return alert(str(error))
    return _svg(curve)


def _svg(curve: Curve | None) -> str:
    """Factor over progress; the scale is 0..1 and widens to what the curve needs."""
    schedule = Schedule(curve or ((0.0, 1.0),))
    factors = [schedule.at(index / _SAMPLES) for index in range(_SAMPLES + 1)]
    low, high = min(0.0, *factors), max(1.0, *factors)
    assert -MAX_STRENGTH <= low <= high <= MAX_STRENGTH

    def y(factor: float) -> float:
        return 4 + (_HEIGHT - 8) * (high - factor) / (high - low)

    line = polyline(((index * _WIDTH / _SAMPLES, y(factor)) for index, factor in enumerate(factors)), "strength")
    label = f"strength times {factors[0]:g} at the first step, {factors[-1]:g} at the last"
    grid = "".join(f'<line class="grid" x1="0" x2="{_WIDTH}" y1="{y(at):.1f}" y2="{y(at):.1f}"/>' for at in (0, 1))
    return (
        f'<svg class="curve" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{grid}'
        f'{line}</svg><p class="curve-ends"><span>first step</span><span>last step</span></p>'
    )


CSS = """
.curve { display: block; width: 100%; max-width: 22rem; height: auto; }
.curve polyline { fill: none; stroke: var(--color-accent); stroke-width: 2; stroke-linejoin: round; }
.curve .grid { stroke: var(--border-color-primary); stroke-dasharray: 3 3; }
.curve-ends { display: flex; justify-content: space-between; max-width: 22rem; margin: 0; font-size: .75rem;
  color: var(--body-text-color-subdued); }
"""
