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
BLOCK = re.compile(r"^( *)```(python|diff) title=\"([^\"]+)\"\n(.*?)^ *```$", flags=re.DOTALL | re.MULTILINE)
# What the tests of families and formats import; the embedded bases are large and of no use here.
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
    for indent, language, title, indented in blocks:
        path, text = root / title, re.sub(f"^{indent}", "", indented, flags=re.MULTILINE)
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


WHICH = "(toy or every_family) and not SD and not FLUX"  # without the toy dialect's files of real models' sizes

pytestmark = pytest.mark.slow


def test_toys_pass_what_real_ones_must(copy) -> None:
    tests = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/families", "tests/formats", "-k", WHICH)
    assert int(re.search(r"(\d+) passed", tests)[1]) > 30


# A DoRA of every layer that the preset names: told by its file's header, written and read under every format's names.
FROM_FILE = """
from dora_diffusion.adapters import AdapterManager
from dora_diffusion.cli import main
from dora_diffusion.families import coverage, family_of_pipeline
from dora_diffusion.formats import detect_format, load_adapter, save_adapter
from dora_diffusion.formats.family_detection import family_of
from safetensors import safe_open
from tests.families.pipelines import PIPELINES
from tests.formats.adapters import adapter_of, dora, layers_of

pipe = PIPELINES["toy"].build()
family = family_of_pipeline(pipe)
counted = coverage(family.denoiser, pipe.unet)
assert counted.matched == {"attention": 8, "all-linear": 10, "all": 12} and counted.outside == 1
original = adapter_of(layers_of(pipe, ("unet", "text_encoder")), dora)
names = {
    "diffusers": "unet.waves.1.attn.to_k.lora_A.weight",
    "kohya": "lora_unet_ripples_1_mix_kv.lora_down.weight",
    "comfyui": "diffusion_model.ripples.1.mix.kv.lora_A.weight",
    "omi": "unet.ripples.1.mix.kv.0.lora_down.weight",
    "toybox": "toybox.unet.waves.1.attn.to_k.lora_A.weight",
}
for format, name in names.items():
    path = save_adapter(original, "toy.safetensors", format=format)
    with safe_open(path, "pt") as file:
        assert name in file.keys(), format
    read = load_adapter(path)
    assert (read.origin, family_of(read)) == (format, "toy") and read.modules.keys() == original.modules.keys()
    manager = AdapterManager(pipe)
    report = manager.load_adapter(path, name="toy")
    assert report.matched == report.total == len(original.modules)
    manager.set_adapters({"toy": 0.5})
    manager.unload()
assert main(["convert", "toy.safetensors", "again.safetensors", "--to", "toybox"]) == 0
assert detect_format("again.safetensors") == "toybox"
"""


def test_a_toy_s_file_is_told_read_and_drawn_with(copy) -> None:
    run(copy, "-c", FROM_FILE)
