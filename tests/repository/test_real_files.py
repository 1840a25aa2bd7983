"""docs/real_files.md: every test that keeps a line is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [
    line
    for line in (ROOT / "docs/real_files.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith(("| ---", "| what "))
]


def test_the_page_has_its_lines() -> None:
    assert len(ROWS) > 25 and all(len(row.split(" | ")) == 3 for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:60])
def test_every_line_names_tests_that_there_are(row: str) -> None:
    tests = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row.split(" | ")[2])
    assert tests and row.count("::") == len(tests)
    for file, name in tests:
        assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{name}"
