"""The folder of adapters: what is offered, what is listed as broken and why, and how little is read again."""

import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline

from dora_diffusion.formats import save_adapter
from dora_diffusion.inspection.header import HeaderSummary, summarise_header
from dora_diffusion.utils.atomic import save_tensors
from tests.pocket_random import random_adapter
from tests.ui.many_adapters import fill
from tests.ui.scripted import until
from ui.library import library as library_module
from ui.library import shelf
from ui.library.library import AdapterLibrary
from ui.library.shelf_index import default_index, read_index


def test_lists_usable_and_broken_files(adapters: Path) -> None:
    (adapters / "more").mkdir()
    (adapters / "more" / "v1.2 style.safetensors").write_bytes((adapters / "ink.safetensors").read_bytes())
    (adapters / ".hidden").mkdir()
    (adapters / ".hidden" / "ink.safetensors").write_bytes((adapters / "ink.safetensors").read_bytes())
    (adapters / "folder.safetensors").mkdir()
    (adapters / "empty.safetensors").touch()
    (adapters / "notes.txt").write_text("no adapter")
    (adapters / "two\nlines.safetensors").touch()
    save_tensors({}, adapters / "void.safetensors", {"made": "by a test"})
    os.symlink(adapters / "nowhere", adapters / "dangling.safetensors")
    library = AdapterLibrary(adapters)
    library.refresh()
    assert library.usable == ("ink", "lego", "more/v1.2 style")
    problems = {file.name: file.problem for file in library.broken}
    assert "fits its 0 keys, no tensors" in str(problems.pop("void"))
    assert problems == {
        "broken": "not a safetensors file, or cut short (14 bytes)",
        "dangling": "cannot be read (No such file or directory)",
        "empty": "not a safetensors file, or cut short (0 bytes)",
        "folder": "a folder without training's adapter.safetensors and without PEFT's adapter_config.json; "
        "expected an adapter file or a folder with one of them",
        r"two\nlines": "its name cannot be shown here; rename the file",
    }


def test_refresh_sees_new_changed_and_vanished_files(adapters: Path) -> None:
    library = AdapterLibrary(adapters)
    library.refresh()
    version = library.version
    library.refresh()
    assert library.version == version
    good = (adapters / "ink.safetensors").read_bytes()
    (adapters / "broken.safetensors").write_bytes(good)
    (adapters / "lego.safetensors").unlink()
    library.refresh()
    assert library.usable == ("broken", "ink")
    assert library.broken == ()
    assert library.version > version


def test_watching_looks_now_and_then(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(library_module, "time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0]))
    library = AdapterLibrary(adapters)
    version = library.watch()
    (adapters / "newer.safetensors").write_bytes((adapters / "ink.safetensors").read_bytes())
    now[0] += 59.9
    assert library.watch(every=60) == version
    now[0] += 0.2
    assert library.watch(every=60) > version
    assert "newer" in library.usable


def test_a_folder_that_takes_long_is_watched_less_often(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]

    def listed(*arguments: Any) -> Any:
        now[0] += 2.0
        return found(*arguments)

    found = library_module.list_folder
    monkeypatch.setattr(library_module, "list_folder", listed)
    monkeypatch.setattr(library_module, "time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0]))
    library = AdapterLibrary(adapters)
    version = library.watch()
    (adapters / "newer.safetensors").write_bytes((adapters / "ink.safetensors").read_bytes())
    now[0] += 99
    assert library.watch(every=2) == version  # a fiftieth of the time at most: 2 s of 100
    now[0] += 2
    assert library.watch(every=2) > version


@pytest.mark.parametrize("name", ["../adapters/ink", "/etc/passwd", "", "Ink", "ink.safetensors", None, ["ink"]])
def test_only_listed_names_are_found(adapters: Path, name: object) -> None:
    library = AdapterLibrary(adapters)
    library.refresh()
    with pytest.raises(ValueError, match="no such adapter in"):
        library.find(name)  # type: ignore[arg-type]


def test_a_folder_of_pefts_is_one_adapter(pipe: StableDiffusionPipeline, adapters: Path) -> None:
    save_adapter(random_adapter(pipe, 3), adapters / "sub" / "face", format="peft")
    library = AdapterLibrary(adapters)
    library.refresh()
    assert library.usable == ("ink", "lego", "sub/face/")
    face = library.find("sub/face/")
    assert (face.kind, face.rank, face.family, face.path) == ("DoRA", "4", "sd1", adapters / "sub" / "face")


def test_whole_models_and_the_rest_of_checkpoints_are_no_adapters(adapters: Path) -> None:
    good = (adapters / "ink.safetensors").read_bytes()
    for folder, names in {
        "model": ("model_index.json", "weights.safetensors"),
        "run/step-1": ("manifest.json", "optimizer.safetensors", "parameters.safetensors", "adapter.safetensors"),
    }.items():
        (adapters / folder).mkdir(parents=True)
        for name in names:
            (adapters / folder / name).write_bytes(good)
    os.symlink(adapters, adapters / "run" / "round", target_is_directory=True)
    library = AdapterLibrary(adapters)
    library.refresh()
    assert library.usable == ("ink", "lego", "run/step-1/adapter")


def test_pictures_and_words_beside_a_file(adapters: Path) -> None:
    (adapters / "ink.preview.png").touch()
    (adapters / "ink.civitai.info").write_text(json.dumps({"trainedWords": ["inkstyle, ink wash", 7]}))
    (adapters / "lego.json").write_text("{")
    library = AdapterLibrary(adapters)
    library.refresh()
    ink, lego = library.find("ink"), library.find("lego")
    assert ink.thumbnail == str(adapters / "ink.preview.png")
    assert (ink.triggers, lego.triggers) == (("inkstyle", "ink wash"), ())
    (adapters / "ink.civitai.info").write_text(json.dumps({"trainedWords": ["other"]}))
    os.utime(adapters / "ink.civitai.info", ns=(2**61, 2**61))
    library.refresh()
    assert library.find("ink").triggers == ("other",)


def test_too_many_folders_are_said(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        (adapters / str(number)).mkdir()
    monkeypatch.setattr(shelf, "MOST_FOLDERS", 3)
    library = AdapterLibrary(adapters)
    library.refresh()
    assert library.notice == "Only the first 3 files in 3 folders are listed."


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hundred adapters, fifteen of them different."""
    folder = tmp_path_factory.mktemp("many") / "adapters"
    fill(folder, 300, distinct=15)
    return folder


def test_hundreds_are_listed_at_once_and_read_behind(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = threading.Event()

    def held(*arguments: Any) -> HeaderSummary:
        if threading.current_thread() is not threading.main_thread():
            listed.wait()
        return summarise_header(*arguments)

    monkeypatch.setattr(library_module, "summarise_header", held)
    library = AdapterLibrary(many, index=tmp_path / "index.json")
    library.refresh(patience=0)
    assert len(library.usable) == 300
    assert library.unread > 200
    listed.set()
    last = library.find(library.usable[-1])  # read because it is asked for
    assert last.family in ("sd1", "sdxl", "flux")
    _wait(library)
    assert {file.kind for file in library.files} == {"LoRA", "DoRA", "LoHa"}
    assert not library.broken
    library.close()


def _wait(library: AdapterLibrary) -> None:
    until(lambda: not library.unread)


def test_the_index_saves_the_next_start_all_reading(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, index = tmp_path / "adapters", tmp_path / "cache" / "index.json"
    shutil.copytree(many, folder, copy_function=os.link)
    library = AdapterLibrary(folder, index=index)
    library.refresh()
    _wait(library)
    library.close()
    assert len(read_index(index)) == 300
    monkeypatch.setattr(library_module, "summarise_header", None)  # would fail if it were called
    again = AdapterLibrary(folder, index=index)
    again.refresh()
    assert again.files == library.files
    monkeypatch.undo()
    changed = next(folder.rglob("*.safetensors"))
    changed.unlink()
    changed.write_bytes(b"broken now")
    third = AdapterLibrary(folder, index=index)
    third.refresh()
    assert [file.path for file in third.broken] == [changed]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"version":1}', '{"version":1,"structures":[],"files":{"a":[1,2,0,"","","",[],[]]}}', "[" * 99999],
)
def test_an_index_that_cannot_be_understood_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    assert read_index(tmp_path / "index.json") == {}


def test_small_folders_need_no_index(adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_index(adapters).parent == tmp_path / "cache" / "dora-diffusion"
    library = AdapterLibrary(adapters)
    library.refresh()
    library.close()
    assert not (tmp_path / "cache").exists()


def test_many_threads_may_look_and_find(many: Path, tmp_path: Path) -> None:
    library = AdapterLibrary(many, index=tmp_path / "index.json")
    library.refresh(patience=0)
    errors: list[Exception] = []

    def work() -> None:
        try:
            for name in library.usable[::75]:
                library.refresh(patience=0)
                library.find(name)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    library.close()
    assert errors == []
