"""Single values that a browser sends: taken as what they are, or refused by name."""

import math
from collections.abc import Callable

import pytest

from ui.backend.checks import (
    check_name,
    check_number,
    check_sampler,
    check_side,
    check_strength_number,
    check_text,
    check_whole,
)


def test_what_may_be() -> None:
    assert check_number("a", 1, low=0, high=1) == 1.0 and isinstance(check_number("a", 1, low=0, high=1), float)
    assert check_whole("a", 3.0, low=0, high=9) == 3 and isinstance(check_whole("a", 3.0, low=0, high=9), int)
    assert [check_strength_number("a", value) for value in (-2, 0, 2.0)] == [-2.0, 0.0, 2.0]
    assert (check_text("a", "  x "), check_text("a", None)) == ("x", "")
    assert check_name("a", " ink-2.0_b ") == "ink-2.0_b"
    assert [check_side("a", value) for value in (None, 0, 64, 2048.0)] == [None, None, 64, 2048]
    assert [check_sampler(value) for value in (None, "", "euler a")] == ["default", "default", "euler a"]


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (lambda value: check_number("a", value, low=0, high=1), math.nan, "a: got nan, expected a number from 0 to 1"),
        (lambda value: check_number("a", value, low=0, high=1), "1", "a: got '1', expected a number from 0 to 1"),
        (lambda value: check_whole("a", value, low=0, high=9), 2.5, "a: got 2.5, expected a whole number from 0 to 9"),
        (lambda value: check_whole("a", value, low=0, high=9), True, "a: got True, expected a whole number"),
        (lambda value: check_strength_number("a", value), 2.05, "a: got 2.05, expected a number from -2 to 2"),
        (lambda value: check_text("a", value), ["x"], "a: got ['x'], expected text"),
        (lambda value: check_text("a", value), "x" * 2001, "a: got 2001 characters, expected at most 2000"),
        (lambda value: check_name("a", value), "../x", "a: got '../x', expected up to 64 letters"),
        (lambda value: check_name("a", value), "", "a: got nothing, expected up to 64 letters"),
        (lambda value: check_side("a", value), 100, "a: got 100, expected a multiple of 8 from 64 to 2048"),
        (lambda value: check_side("a", value), 32, "a: got 32, expected a whole number from 64 to 2048"),
        (lambda value: check_sampler(value), 7, "sampler: got 7, expected one of default, euler, "),
    ],
)
def test_what_may_not_be_is_named(check: Callable[[object], object], value: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(value)
    assert str(caught.value).startswith(message)
