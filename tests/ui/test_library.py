"""The folder of adapters: what is offered, what is listed as broken and why."""

import os
from pathlib import Path

import pytest

from dora_diffusion.storage import save_tensors
from ui.library import AdapterLibrary


def test_lists_usable_and_broken_files(adapters: Path) -> None:
    (adapters / "more").mkdir()
    (adapters / "more" / "v1.2 style.safetensors").write_bytes((adapters / "ink.safetensors").read_bytes())
    (adapters / ".hidden").mkdir()
    (adapters / ".hidden" / "ink.safetensors").write_bytes((adapters / "ink.safetensors").read_bytes())
    (adapters / "folder.safetensors").mkdir()
    (adapters / "empty.safetensors").touch()
    (adapters / "notes.txt").write_text("no adapter")
    save_tensors({}, adapters / "void.safetensors", {"made": "by a test"})
    os.symlink(adapters / "nowhere", adapters / "dangling.safetensors")
    library = AdapterLibrary(adapters)
    library.refresh()
    assert library.usable == ("ink", "lego", "more/v1.2 style")
    assert {file.name: file.problem for file in library.broken} == {
        "broken": "not a safetensors file, or cut short (14 bytes)",
        "dangling": "cannot be read (No such file or directory)",
        "empty": "not a safetensors file, or cut short (0 bytes)",
        "folder": "cannot be read (Is a directory)",
        "void": "no adapter format known here (diffusers) fits its 0 keys, no tensors",
    }


def test_refresh_sees_new_changed_and_vanished_files(adapters: Path) -> None:
    library = AdapterLibrary(adapters)
    library.refresh()
    good = (adapters / "ink.safetensors").read_bytes()
    (adapters / "broken.safetensors").write_bytes(good)
    (adapters / "lego.safetensors").unlink()
    library.refresh()
    assert library.usable == ("broken", "ink")
    assert library.broken == ()


@pytest.mark.parametrize("name", ["../adapters/ink", "/etc/passwd", "", "Ink", "ink.safetensors"])
def test_only_listed_names_are_found(adapters: Path, name: str) -> None:
    library = AdapterLibrary(adapters)
    library.refresh()
    with pytest.raises(ValueError, match="no such adapter in"):
        library.find(name)
