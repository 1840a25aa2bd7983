"""The recipes of the packages' READMEs, followed to the letter: their blocks are the only files that are written.

A block's title is the file that it is, or, for a diff, the file that its `+` lines go into.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(python|diff) title=\"([^\"]+)\"\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
# What tests of families and formats import; the embedded bases are large and of no use here.
NEEDED = ("dora_diffusion", "tests", "benchmarks")


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The library and what its tests need, with the toys of all recipes in it."""
    root = tmp_path_factory.mktemp("copy")
    for name in NEEDED:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("assets", "golden"))
    shutil.copy2(ROOT / "pyproject.toml", root)
    for package in ("families", "formats"):
        follow((ROOT / "dora_diffusion" / package / "README.md").read_text(), root)
    return root


def follow(recipe: str, root: Path) -> None:
    """Do what a recipe's blocks say."""
    blocks = BLOCK.findall(recipe)
    assert blocks
    for language, title, text in blocks:
        path = root / title
        if language == "python":
            assert not path.exists(), title
            path.write_text(text)
        else:
            apply(path, text)


def apply(path: Path, diff: str) -> None:
    """Put a diff's `+` lines between the others, which must stand together in the file, once."""
    lines = [(line[:1], line[1:]) for line in diff.splitlines()]
    assert {sign for sign, _ in lines} == {" ", "+"}
    before = "".join(f"{line}\n" for sign, line in lines if sign == " ")
    text = path.read_text()
    assert text.count(before) == 1, f"{path.name} has {text.count(before)} times\n{before}"
    path.write_text(text.replace(before, "".join(f"{line}\n" for _, line in lines)))


def run(copy: Path, *arguments: str) -> str:
    """Python in the copy, which must end well."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def test_a_recipe_s_toys_pass_what_real_ones_must(copy) -> None:
    tests = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/families", "tests/formats", "-k", "toy")
    assert int(re.search(r"(\d+) passed", tests)[1]) >= 20
