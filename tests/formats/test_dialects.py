"""Every format, on every family's tiny pipeline: what is written is recognised, comes back, and means the same."""

from collections.abc import Callable

import pytest

from dora_diffusion.families import family_of_pipeline
from dora_diffusion.formats import detect_format, load_adapter, save_adapter
from dora_diffusion.state import AdapterState
from tests.families.pipelines import PIPELINES
from tests.formats.adapters import KINDS, adapter_of, dense, layers_of
from tests.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def layers() -> Callable[[str], list]:
    made: dict[str, list] = {}

    def of(name: str) -> list:
        if name not in made:
            pipe = PIPELINES[name].build()
            components = [part.name for part in family_of_pipeline(pipe).components if getattr(pipe, part.name, None)]
            made[name] = layers_of(pipe, components)
        return made[name]

    return of


def assert_same(got: AdapterState, expected: AdapterState, weights: dict) -> None:
    assert got.modules.keys() == expected.modules.keys()
    for path, module in expected.modules.items():
        assert_close(dense(weights[path], got.modules[path]), dense(weights[path], module))


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("format", ["diffusers", "kohya", "lycoris"])
def test_every_layer_of_every_family_comes_back(layers, tmp_path, name: str, format: str, kind: str) -> None:
    weights = dict(layers(name))
    original = adapter_of(weights.items(), KINDS[kind])
    path = save_adapter(original, tmp_path / "a.safetensors", format=format)
    assert detect_format(path) == format
    assert_same(load_adapter(path), original, weights)
