"""A strength's curve over the run as text: named, or point by point."""

from collections.abc import Mapping, Sequence

from dora_diffusion.utils.checks import check_number
from dora_diffusion.utils.text import shown_value

MAX_CURVE_POINTS = 32
MAX_FACTOR = 2.0

Curve = tuple[tuple[float, float], ...]
NAMED_CURVES: Mapping[str, Curve | None] = {
    "constant": None,
    "fade in": ((0.0, 0.0), (1.0, 1.0)),
    "fade out": ((0.0, 1.0), (1.0, 0.0)),
    "early": ((0.0, 1.0), (0.4, 1.0), (0.6, 0.0)),
    "late": ((0.4, 0.0), (0.6, 1.0)),
}


def parse_curve(text: object, *, name: str = "curve") -> Curve | None:
    """A strength's factor over the run: "0:0, 0.3:1" or a name of NAMED_CURVES; None is constant.

    Raises:
        ValueError: neither, progress that does not rise in 0..1, or a factor outside -2..2.
    """
    if text is None or (isinstance(text, str) and not text.strip()):
        return None
    if not isinstance(text, str):
        raise ValueError(f"{name}: got {shown_value(text)}, expected text such as '0:0, 0.3:1'")
    if text.strip().lower() in NAMED_CURVES:
        return NAMED_CURVES[text.strip().lower()]
    pieces = [piece for piece in text.split(",") if piece.strip()]
    if not 1 <= len(pieces) <= MAX_CURVE_POINTS:
        raise ValueError(f"{name}: got {len(pieces)} points, expected 1 to {MAX_CURVE_POINTS}")
    points = tuple(_curve_point(piece, name) for piece in pieces)
    for before, after in zip(points, points[1:], strict=False):
        if after[0] < before[0]:
            raise ValueError(f"{name}: progress falls from {before[0]:g} to {after[0]:g}; expected it to rise")
    return points


def _curve_point(piece: str, name: str) -> tuple[float, float]:
    progress, _, factor = piece.partition(":")
    try:
        point = float(progress), float(factor)
    except ValueError:
        raise ValueError(
            f"{name}: got {shown_value(piece.strip())}, expected points such as '0:0, 0.3:1' or one of "
            f"{', '.join(NAMED_CURVES)}"
        ) from None
    check_number(f"{name}, progress", point[0], low=0.0, high=1.0)
    check_number(f"{name}, factor", point[1], low=-MAX_FACTOR, high=MAX_FACTOR)
    return point


def curve_text(curve: Sequence[Sequence[float]] | None) -> str:
    """What `parse_curve` reads back as this curve: its name, or its points."""
    points = None if curve is None else tuple((float(progress), float(factor)) for progress, factor in curve)
    for name, named in NAMED_CURVES.items():
        if named == points:
            return name
    return ", ".join(f"{_shortest(progress)}:{_shortest(factor)}" for progress, factor in points or ())


def _shortest(value: float) -> str:
    """As few digits as read back as the very same number."""
    return repr(value).removesuffix(".0")
