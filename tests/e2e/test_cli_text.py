"""Any bytes as arguments, in any locale: a result, or one line and status 2; never a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dora_diffusion.formats import save_adapter
from dora_diffusion.generation.png_metadata import read_metadata
from tests.pocket_random import random_adapter, random_pocket_pipeline

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux alone")

BYTES = b"x\xff\xfe"
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii:strict"}
UTF8 = {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8:strict"}
# One process runs many commands, each with arguments as a process gets them; after each, its status.
DRIVER = """
import json, os, sys
from dora_diffusion.cli import main
for line in json.load(sys.stdin):
    try:
        status = main([os.fsdecode(bytes(word)) for word in line])
    except SystemExit as stop:
        status = stop.code
    print(f"\\n== {status}", flush=True)
    print("\\n==", file=sys.stderr, flush=True)
"""
DRAW = [b"generate", b"--model", b"base", b"--steps", b"1", b"--width", b"64", b"--height", b"64", b"--prompt"]
MIX = [b"blend", b"--base", b"base", b"--adapter", BYTES + b".safetensors", b"--adapter", "é.safetensors".encode()]


def run(folder: Path, environment: dict[str, str], commands: list[list[bytes]]) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of each command."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([[list(word) for word in command] for command in commands]).encode(),
        capture_output=True,
        cwd=folder,
        env={**os.environ, **environment},
    )
    out, errors = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0 and "Traceback" not in errors, errors
    said = out.split("\n== ")
    statuses = [int(text.partition("\n")[0]) for text in said[1:]]
    return list(zip(statuses, [text.partition("\n")[2] or text for text in said], errors.split("\n=="), strict=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names")
    pipe = random_pocket_pipeline()
    pipe.save_pretrained(folder / "base")
    ink = save_adapter(random_adapter(pipe), folder / "ink.safetensors")
    for name in (BYTES + b".safetensors", "é.safetensors".encode()):
        Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(ink.read_bytes())
    (folder / "bad.yaml").write_text("output_dir: out\ndata:\n  instance_dir: é\n", encoding="utf-8")
    (folder / "latin.yaml").write_bytes(b"output_dir: caf\xe9\n")
    return folder


@pytest.mark.parametrize("environment", [C_LOCALE, UTF8], ids=["C", "UTF-8"])
def test_names_that_are_no_text_are_read_and_written(folder: Path, environment: dict[str, str]) -> None:
    file, accented = BYTES + b".safetensors", "é.safetensors".encode()
    results = run(
        folder,
        environment,
        [
            [b"inspect", file],
            [b"inspect", b"--json", accented, file],
            [b"convert", file, BYTES + b"-2.safetensors"],
            [b"convert", accented, "ö.safetensors".encode()],
            [*DRAW, "日".encode(), b"--adapter", file, b"--adapter", accented, b"--output", BYTES + b".png"],
            *([[*MIX, b"mix.safetensors"]] if environment is C_LOCALE else []),  # the slowest
        ],
    )
    assert {status for status, _, _ in results} == {0}, results
    names = set(os.listdir(os.fsencode(folder)))
    assert {BYTES + b"-2.safetensors", "ö.safetensors".encode(), BYTES + b".png"} <= names
    record = read_metadata(folder / os.fsdecode(BYTES + b".png"))
    assert record is not None and record.settings.prompt == "日"
    assert [use.name for use in record.adapters] == ["x\\udcff\\udcfe", "é"]
    with Image.open(folder / os.fsdecode(BYTES + b".png")) as picture:
        assert r"<lora:x\udcff\udcfe:1> <lora:é:1>" in picture.info["parameters"]


@pytest.mark.parametrize("environment", [C_LOCALE, UTF8], ids=["C", "UTF-8"])
def test_mistakes_are_one_line_whatever_the_bytes(folder: Path, environment: dict[str, str]) -> None:
    commands = [
        [b"inspect", BYTES],
        [b"convert", BYTES, "é".encode()],
        [b"doctor", BYTES],
        [b"train", b"--dry-run", BYTES + b".yaml"],
        [b"train", b"--dry-run", b"bad.yaml"],
        [b"train", b"--dry-run", b"latin.yaml"],
        [b"train", b"--dry-run", b"bad.yaml", b"--data.instance_prompt", BYTES],
        [b"train", b"bad.yaml", BYTES],
        [*DRAW, BYTES],
        [*DRAW, b"x", b"--negative-prompt", BYTES],
        [*DRAW, b"x", b"--model", BYTES],
        [*DRAW, b"x", b"--adapter", BYTES + b":" + BYTES],
        [*DRAW, b"x", b"--output", BYTES],
    ]
    for command, (status, _, errors) in zip(commands, run(folder, environment, commands), strict=True):
        last = errors.strip().splitlines()
        assert status == 2 and len(last) == 1 and last[0].startswith("dora-diffusion: "), (command, errors)


@pytest.mark.parametrize(
    "command", [["-m", "dora_diffusion.cli", "generate", "--help"], ["-m", "ui", "--port"], ["-m", "ui", "--adapters"]]
)
def test_a_process_of_its_own(tmp_path: Path, command: list[str]) -> None:
    words = [*(word.encode() for word in command), *([] if command[-1] == "--help" else [BYTES])]
    done = subprocess.run(
        [sys.executable.encode(), *words], capture_output=True, cwd=tmp_path, env={**os.environ, **C_LOCALE}
    )
    assert done.returncode == (0 if command[-1] == "--help" else 2)
    assert b"Traceback" not in done.stderr
