"""The floors of ARCHITECTURE.md hold, and the contracts in pyproject.toml catch what they should."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINT = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_logo=True, no_cache=True))"


def lint(project: Path) -> subprocess.CompletedProcess[str]:
    """Run the contracts on the package in `project`, in a process of its own that imports none of it."""
    environment = {**os.environ, "PYTHONPATH": str(project), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", LINT], cwd=project, env=environment, capture_output=True, text=True, check=False
    )


def test_the_package_keeps_its_contracts() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Contracts: 3 kept, 0 broken." in result.stdout


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        (
            "functional.py",
            "import dora_diffusion.layers.dora",
            "functional is not allowed to import dora_diffusion.layers.dora",
        ),
        ("layers.py", "import dora_diffusion.families", "layers is not allowed to import dora_diffusion.families"),
        ("stray.py", "", "- dora_diffusion.stray"),
        ("layers.py", "import accelerate", "dora_diffusion is not allowed to import accelerate"),
        ("generation.py", "import gradio", "dora_diffusion is not allowed to import gradio"),
        ("adapters.py", "def late():\n    import ui.app", "dora_diffusion is not allowed to import ui"),
    ],
    ids=["upwards", "sideways", "no floor", "accelerate below training", "gradio in the library", "app in the library"],
)
def test_a_broken_contract_is_seen(tmp_path: Path, file: str, line: str, complaint: str) -> None:
    shutil.copytree(ROOT / "dora_diffusion", tmp_path / "dora_diffusion", ignore=shutil.ignore_patterns("assets"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / "dora_diffusion" / file, "a") as source:
        source.write(f"\n{line}\n")
    result = lint(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert complaint in result.stdout
