"""The Python of the guides runs as it stands, and so do the examples of the public names, which the reference shows."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import griffe
import pytest
import torch
import yaml

import dora_diffusion as dd
from tests.pocket_random import random_adapter

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
GUIDES = [page for page in PAGES if "```python" in page.read_text()]
REFERENCE = sorted((ROOT / "docs" / "reference").glob("*.md"))
ANSWERS = {"Injection", "LoadReport", "TrainResult", "WordState", "Words"}  # made by calls, never by name
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", flags=re.DOTALL | re.MULTILINE)


def run(text: str, name: str) -> None:
    """Execute the blocks of a text in order, as one program."""
    blocks = [re.sub(f"^{indent}", "", code, flags=re.MULTILINE) for indent, code in BLOCK.findall(text)]
    assert blocks, f"{name}: no ```python block"
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)  # noqa: S102


@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own ways
@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_python_blocks_run_in_order(guide: Path) -> None:
    torch._dynamo.reset()
    run(guide.read_text(), guide.name)
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What examples take to be there, as docs/reference/index.md tells: adapters and a word for `pocket`, a config."""
    folder = tmp_path_factory.mktemp("files")
    pipe = dd.load_pipeline("pocket")
    ink, lego = random_adapter(pipe, 1), random_adapter(pipe, 2, use_dora=False)
    older = {
        path: replace(module, axis="in", magnitude=torch.rand(module.down.shape[1]) + 0.5)
        for path, module in ink.modules.items()
        if path.endswith(("to_q", "q_proj"))
    }
    dd.save_adapter(ink, folder / "ink.safetensors")
    dd.save_adapter(lego, folder / "lego.safetensors")
    dd.save_adapter(dd.AdapterState(older), folder / "older.safetensors", format="kohya")
    dd.bake("pocket", {"ink": ink}, {"ink": 1.0}, folder / "tuned")
    words = dd.add_words(pipe, {"<zqx>": "robot"})
    dd.save_words(words.state(), folder)
    shutil.copytree(ROOT / "examples" / "subject-robot" / "images", folder / "images")
    config = {
        "output_dir": "runs/subject",
        "data": {"instance_dir": "images", "resolution": 64},
        "optim": {"steps": 2},
        "validation": {"every": 0, "repeats": 1},
    }
    (folder / "subject.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.parametrize("name", dd.__all__)
def test_the_example_of_every_public_name_runs(name: str, files: Path, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(files, tmp_path, copy_function=os.link, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    example = (getattr(dd, name).__doc__ or "").partition("Examples:\n")[2]
    assert f"dd.{name}" in example or name in ANSWERS
    run(example, f"the docstring of {name}")


def test_the_reference_has_every_public_name_once() -> None:
    """As itself: `dora_diffusion.extract` would show the module of that name, so such functions are named in full."""
    package = griffe.load("dora_diffusion", search_paths=[ROOT], allow_inspection=False)
    shown = [path for page in REFERENCE for path in re.findall(r"^::: dora_diffusion\.(\S+)$", page.read_text(), re.M)]
    names = [path.rpartition(".")[2] for path in shown if package[path].is_class or package[path].is_function]
    assert sorted(names) == sorted(dd.__all__)
    table = (ROOT / "docs" / "reference" / "index.md").read_text()
    assert [name for name in dd.__all__ if f"`{name}`" not in table] == []
