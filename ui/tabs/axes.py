"""Ranges as people write them: "-1..1/0.25", "0, .5, 1", or both with commas between them."""

from decimal import Decimal, InvalidOperation

from ui.backend.request import MAX_STRENGTH, check_number

MAX_CELLS = 64
MAX_TEXT = 200
MIN_STEP = Decimal("0.001")


def parse_range(text: object, *, name: str = "weights") -> tuple[float, ...]:
    """The numbers of a range or list, in its order, each once; the end counts when a step meets it.

    Args:
        text: "-1..1/0.25" counts from -1 to 1 by quarters, and down when the first is the larger.
        name: for messages.

    Raises:
        ValueError: no such text, a number outside -2..2, or more than MAX_CELLS of them.
    """
    if not isinstance(text, str) or not text.strip() or len(text) > MAX_TEXT:
        got = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
        raise ValueError(f"{name}: got {got}, expected such as '-1..1/0.25' or '0, 0.5, 1'")
    values: dict[float, None] = {}
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        values |= dict.fromkeys(_range(piece, name) if ".." in piece else (_strength(piece, name),))
        if len(values) > MAX_CELLS:
            raise ValueError(f"{name}: more than {MAX_CELLS} numbers; take larger steps")
    if not values:
        raise ValueError(f"{name}: got commas only, expected such as '-1..1/0.25' or '0, 0.5, 1'")
    return tuple(value + 0.0 for value in values)  # -0 is 0


def _range(piece: str, name: str) -> list[float]:
    ends, slash, step_text = piece.partition("/")
    first_text, _, last_text = ends.partition("..")
    if not slash:
        raise ValueError(f"{name}: {piece[:40]!r} has no step; write it behind a slash, such as '{piece[:20]}/0.25'")
    _strength(first_text, name)
    _strength(last_text, name)
    first, last, step = (_decimal(part, name) for part in (first_text, last_text, step_text))
    if not MIN_STEP <= step <= 2 * Decimal(MAX_STRENGTH):
        raise ValueError(f"{name}: got step {step_text.strip()[:20]!r}, expected {MIN_STEP} to {2 * MAX_STRENGTH:g}")
    count = int(abs(last - first) / step) + 1
    if count > MAX_CELLS:
        raise ValueError(f"{name}: {piece[:40]!r} has {count} numbers, expected at most {MAX_CELLS}; take larger steps")
    return [float(first + (step if last >= first else -step) * index) for index in range(count)]


def _strength(text: str, name: str) -> float:
    return check_number(name, float(_decimal(text, name)), low=-MAX_STRENGTH, high=MAX_STRENGTH)


def _decimal(text: str, name: str) -> Decimal:
    try:
        number = Decimal(text.strip())
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite():
        raise ValueError(f"{name}: got {text.strip()[:40]!r}, expected a number; such as '-1..1/0.25' or '0, 0.5, 1'")
    return number
