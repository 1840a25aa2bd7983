"""Section 1: the tests marked `gpu`, by pytest in a process of its own."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.gpu.setting import Row, Rows, Setting

ROOT = Path(__file__).parents[2]
_MARK = re.compile(r"^(pytestmark = |@)pytest\.mark\.gpu\b", flags=re.MULTILINE)
_COUNT = re.compile(r"(\d+) (passed|failed|skipped|deselected|xfailed|errors?)\b")


def rows(setting: Setting) -> Rows:
    """How many passed, failed and were skipped, and the first line of each failure."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *marked_files()]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=max(setting.left, 1), check=False
    )
    yield outcome(done.stdout + done.stderr, done.returncode, needs_passes=setting.device == "cuda")


def marked_files() -> list[str]:
    """Files that hold such a test; pytest would import all others to find none in them."""
    found = (path for path in sorted((ROOT / "tests").rglob("test_*.py")) if _MARK.search(path.read_text()))
    return [str(path.relative_to(ROOT)) for path in found]


def outcome(output: str, status: int, *, needs_passes: bool) -> Row:
    """Counts from what pytest printed; an error where a test failed, or none ran where a GPU is there."""
    lines = output.strip().splitlines() or [""]
    counts = {kind.removesuffix("s"): int(number) for number, kind in _COUNT.findall(lines[-1])}
    wrong = [line for line in lines if line.startswith(("FAILED ", "ERROR ", "ERROR:"))]
    found: dict[str, object] = {"name": "tests marked gpu", **_known(counts), "wrong": wrong}
    if status != 0 or wrong:
        found["error"] = wrong[0] if wrong else f"pytest ended with {status}: {lines[-1]}"
    elif needs_passes and not counts.get("passed"):
        found["error"] = f"no test ran: {lines[-1]}"
    return found


def _known(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: counts.get(name, 0) for name in ("passed", "failed", "skipped")}
