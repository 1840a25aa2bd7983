"""Curves as text: what is read, what is refused, and that nothing is lost on the way back."""

import pytest

from dora_diffusion.generation.curves import curve_text, parse_curve


@pytest.mark.parametrize(
    ("text", "curve"),
    [
        ("", None),
        (None, None),
        ("Constant", None),
        ("fade in", ((0.0, 0.0), (1.0, 1.0))),
        ("0:0, 0.3:1", ((0.0, 0.0), (0.3, 1.0))),
        (" 0.5 : -2 ,", ((0.5, -2.0),)),
    ],
)
def test_curves(text: str | None, curve: object) -> None:
    assert parse_curve(text) == curve
    assert parse_curve(curve_text(parse_curve(text))) == curve


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("up", "curve: got 'up', expected points such as '0:0, 0.3:1' or one of constant, fade in"),
        ("0.5:1, 0.2:0", "curve: progress falls from 0.5 to 0.2; expected it to rise"),
        ("0:nan", "curve, factor: got nan, expected a number from -2 to 2"),
        ("2:1", "curve, progress: got 2.0, expected a number from 0 to 1"),
        (",", "curve: got 0 points, expected 1 to 32"),
        ("0:1," * 33, "curve: got 33 points, expected 1 to 32"),
        (7, "curve: got 7, expected text such as '0:0, 0.3:1'"),
    ],
)
def test_bad_curves(text: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_curve(text)
    assert str(caught.value).startswith(message)


def test_a_curve_loses_no_digit() -> None:
    curve = ((0.0, -2.0), (1 / 3, 0.123456789), (1.0, 1.0))
    assert parse_curve(curve_text(curve)) == curve
