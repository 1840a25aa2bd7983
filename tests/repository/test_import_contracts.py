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
    assert "Contracts: 5 kept, 0 broken." in result.stdout


BREAKS = {
    "upwards": ("dora_diffusion/functional/dora.py", "import dora_diffusion.layers.dora", "dora_diffusion.layers"),
    "sideways": ("dora_diffusion/layers/dora.py", "import dora_diffusion.formats.keys", "dora_diffusion.formats"),
    "no floor": ("dora_diffusion/stray.py", "", "- dora_diffusion.stray"),
    "accelerate below training": ("dora_diffusion/layers/dora.py", "import accelerate", "to import accelerate"),
    "gradio in the library": ("dora_diffusion/state.py", "import gradio", "to import gradio"),
    "app in the library": ("dora_diffusion/state.py", "def late():\n    import ui.app", "to import ui"),
    "upwards in the app": ("ui/library/shelf.py", "import ui.generate.rack", "ui.generate"),
    "sideways in the app": ("ui/tabs/export.py", "import ui.train.tab", "ui.train"),
    "no place in the app": ("ui/stray.py", "", "- ui.stray"),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_a_broken_contract_is_seen(tmp_path: Path, kind: str) -> None:
    file, line, complaint = BREAKS[kind]
    for package in ("dora_diffusion", "ui"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("assets"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / file, "a") as source:
        source.write(f"\n{line}\n")
    result = lint(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert complaint in result.stdout
