"""What users rely on is still there: tests/golden/surface.json may grow, and loses nothing."""

import json

import pytest

from tests import surface


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> surface.Surface:
    folder = tmp_path_factory.mktemp("surface")
    demo = surface.page(folder)
    found = surface.collect(folder, demo)
    demo.close(verbose=False)
    return found


@pytest.mark.parametrize("part", json.loads(surface.GOLDEN.read_text()))
def test_nothing_that_users_rely_on_is_gone(part: str, now: surface.Surface) -> None:
    known = json.loads(surface.GOLDEN.read_text())[part]
    assert len(known) >= 5
    assert sorted(set(known) - set(now[part])) == []


def test_a_lost_name_would_be_seen(now: surface.Surface) -> None:
    assert "dora_diffusion.baked" in now["metadata_literals"]
    assert "--adapter" in " ".join(now["flags"])
    assert "generate" in now["names"]
    assert not {"dora_diffusion.cli", "dora_diffusion.formats"} & set(now["metadata_literals"])


def test_the_list_holds_what_it_should() -> None:
    known = json.loads(surface.GOLDEN.read_text())
    assert {"AdapterManager.fuse", "TrainConfig.optim.steps", "inject(config)"} <= set(known["names"])
    assert {"adapters.AdapterManager", "pipelines.load_pipeline"} <= set(known["packages"])
