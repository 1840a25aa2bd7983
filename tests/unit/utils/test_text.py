"""Whatever comes from outside stands on one line of a message."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_diffusion.utils.text import shown, shown_path, shown_value


@given(st.text(st.characters(codec=None)))
def test_text_is_one_line_that_can_be_encoded(text: str) -> None:
    for line in (shown(text), shown_path(text)):
        line.encode()
        assert len(line.splitlines()) <= 1 and "\x1b" not in line and "\x00" not in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain é 絵 👩‍🎨", "plain é 絵 👩‍🎨"),
        ("a\nb\x00\ud800", "a\\nb\\x00\\ud800"),
        ("safe\u202egnp.exe\u2066", "safe\\u202egnp.exe\\u2066"),
        ("x" * 300, "x" * 50 + "..." + "x" * 50),
    ],
)
def test_what_is_shown(text: str, expected: str) -> None:
    assert shown(text) == expected


def test_paths_are_longer_and_values_quoted() -> None:
    assert shown_path("x" * 300) == "x" * 300 and len(shown_path("x" * 301)) == 303
    assert shown_value(None) == "nothing" and shown_value("a\nb") == "'a\\nb'" and len(shown_value("x" * 99)) == 40
