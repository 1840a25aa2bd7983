"""docs/pipelines.md tells what is tested: each line of its tables names a test that is there, and none is left out."""

import ast
import re
from pathlib import Path

from tests.pipelines.kinds import KINDS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8")
NAMED = re.findall(r"\| `([^`|]+)` \|$", PAGE, flags=re.MULTILINE)


def _tests_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_line_names_a_test_that_is_there() -> None:
    there = {name for path in (ROOT / "tests").rglob("test_*.py") for name in _tests_in(path)}
    for name in NAMED:
        if found := re.fullmatch(r"test_kinds\[(.+)\]", name):
            assert found[1] in KINDS
        else:
            assert name in there or (ROOT / name).is_file(), name


def test_every_habit_that_is_tested_has_a_line() -> None:
    assert _tests_in(ROOT / "tests" / "pipelines" / "test_habits.py") <= set(NAMED)
