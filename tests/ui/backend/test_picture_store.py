"""Pictures get names of their own, and the base's is found for as long as it is there."""

from pathlib import Path

import pytest
from PIL import Image

from dora_diffusion.generation.generate import GenerationSettings
from dora_diffusion.generation.img2img import Canvas
from dora_diffusion.generation.inputs import find_input
from dora_diffusion.generation.png_metadata import Origin, read_metadata
from ui.backend import picture_store
from ui.backend.picture_store import Drawn, PictureStore, base_key, origin_of

SETTINGS = GenerationSettings("a cat", seed=3)
DOT = Image.new("RGB", (8, 8), "red")


def test_no_picture_is_written_over_another(tmp_path: Path) -> None:
    store = PictureStore(tmp_path / "out")
    paths = [store.save(Drawn(DOT, SETTINGS, (), Origin(), "pocket", 0.0)) for _ in range(3)]
    assert len({*paths}) == 3 and all(path.parent == tmp_path / "out" and "-seed3" in path.name for path in paths)
    record = read_metadata(paths[0])
    assert record is not None and (record.settings, record.model) == (SETTINGS, "pocket")


def test_what_the_metadata_name_by_hash_is_kept_in_the_output_folder(tmp_path: Path) -> None:
    store, canvas = PictureStore(tmp_path / "out"), Canvas(DOT, None)
    origin = origin_of(canvas, ())
    path = store.save(Drawn(DOT, SETTINGS, (), origin, "pocket", 0.0, (DOT,)), tmp_path / "out" / "maps")
    assert path.parent.name == "maps" and origin.canvas is not None
    kept = find_input(tmp_path / "out", origin.canvas)
    assert kept is not None and kept.tobytes() == DOT.tobytes()


def test_a_base_is_known_by_all_that_decides_it_while_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture_store, "MAX_BASES", 2)
    store = PictureStore(tmp_path)
    keys = [
        base_key("pocket", SETTINGS, None),
        base_key("other", SETTINGS, None),
        base_key("pocket", SETTINGS, Canvas(DOT, None)),
    ]
    for number, key in enumerate(keys):
        (tmp_path / f"{number}.png").touch()
        store.remember_base(key, tmp_path / f"{number}.png")
    assert [store.known_base(key) for key in keys] == [None, tmp_path / "1.png", tmp_path / "2.png"]
    (tmp_path / "1.png").unlink()
    assert store.known_base(keys[1]) is None
