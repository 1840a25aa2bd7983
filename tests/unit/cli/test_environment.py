"""`dora-diffusion env`: facts for a bug report, whatever is missing or broken, and nothing that names a person."""

import getpass
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from dora_diffusion._version import __version__
from dora_diffusion.cli import main
from dora_diffusion.cli.environment import facts, without_paths


def printed(capsys, *arguments: str) -> str:
    assert main(["env", *arguments]) == 0
    return capsys.readouterr().out


def test_text_and_json_tell_the_same(capsys) -> None:
    found = json.loads(printed(capsys, "--json"))
    assert found["versions"]["dora_diffusion"] == __version__
    assert found["versions"]["python"].startswith(platform.python_version())
    assert found["versions"]["diffusers"] == importlib.metadata.version("diffusers")
    assert found["torch"]["threads"] == torch.get_num_threads()
    assert "float32" in found["torch"]["cpu_dtypes"].split()
    rows = [line.split(maxsplit=1) for line in printed(capsys).splitlines()]
    assert dict(rows) == {name: str(value) for section in found.values() for name, value in section.items()}


def test_a_package_that_nobody_needs_is_left_out_and_a_needed_one_is_missed(monkeypatch) -> None:
    real = importlib.metadata.distribution

    def distribution(name: str) -> importlib.metadata.Distribution:
        if name in ("peft", "diffusers"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    versions = facts()["versions"]
    assert "peft" not in versions
    assert versions["diffusers"] == "not installed"


def test_a_broken_torch_is_a_line(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # import torch raises
    assert "broken: ModuleNotFoundError" in printed(capsys)
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))  # what a failed removal leaves
    found = facts()["torch"]
    assert found["threads"].startswith("broken: AttributeError")
    assert found["cuda"].startswith("broken: AttributeError")


def test_cards_are_described(monkeypatch) -> None:
    card = types.SimpleNamespace(name="A card", total_memory=24 * 2**30, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch, "ones", lambda *size, dtype, device: torch.zeros(size, dtype=dtype))
    assert facts()["torch"]["cuda"] == ["A card, 24.0 GiB, capability 8.9, float32 bfloat16 float16"]


def test_what_torch_warns_of_is_told_without_paths(monkeypatch) -> None:
    def is_available() -> bool:
        warnings.warn("the driver in /home/ann/drivers is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert facts()["torch"]["warning"] == "the driver in ... is too old"


@pytest.mark.parametrize("path", ["/home/ann/x.so", r"C:\Users\ann\x.dll", "file:///home/ann", "~/x", "'/home/ann/x'"])
def test_paths_are_left_out(path: str) -> None:
    assert without_paths(f"OSError: {path}: no such\n file") == "OSError: ... no such file"


def test_nothing_names_a_person_a_place_or_a_secret(tmp_path: Path) -> None:
    secret = {"HF_TOKEN": "hf_secret_value", "HOME": str(tmp_path / "ann"), "USER": "ann-of-the-test"}
    code = (
        "import sys; from dora_diffusion.cli import main; status = main(['env']); assert 'diffusers' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **secret}, capture_output=True, text=True, check=True
    )
    for private in (*secret.values(), getpass.getuser() + "@", platform.node(), str(Path.cwd()), sys.prefix):
        assert not private or private not in done.stdout
    assert "/" not in done.stdout
