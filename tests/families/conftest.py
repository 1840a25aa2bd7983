"""The table of families: with FAMILIES_TABLE=docs/families.md set, these tests' outcomes are written there."""

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

_OUTCOMES: dict[tuple[str, str], list[str]] = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    report = (yield).get_result()
    column = item.get_closest_marker("column")
    callspec = getattr(item, "callspec", None)
    if column is None or callspec is None or (report.when != "call" and report.passed):
        return
    reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else ""
    outcome = "yes" if report.passed else f"no: {reason}" if report.skipped else "FAILS"
    name = next(str(value) for value in callspec.params.values())
    _OUTCOMES.setdefault((name, column.args[0]), []).append(outcome)


def pytest_sessionfinish() -> None:
    if path := os.environ.get("FAMILIES_TABLE"):
        from tests.families.table import table

        Path(path).write_text(table(_OUTCOMES))
