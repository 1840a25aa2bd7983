"""A random pocket with two adapters on disk, and a session over them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from dora_diffusion.formats import save_adapter
from tests.pocket_random import random_adapter, random_pocket_pipeline
from ui.backend.session import Session


@pytest.fixture(scope="session")
def pipe() -> StableDiffusionPipeline:
    """Shared: every session over it leaves it drawing as the base."""
    return random_pocket_pipeline()


@pytest.fixture(scope="session")
def adapter_bytes(pipe: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """File name -> content: `ink` is a DoRA, `lego` a LoRA."""
    folder = tmp_path_factory.mktemp("adapters")
    save_adapter(random_adapter(pipe, 1), folder / "ink.safetensors")
    save_adapter(random_adapter(pipe, 2, use_dora=False), folder / "lego.safetensors")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def make_adapters(adapter_bytes: dict[str, bytes]) -> Callable[[Path], Path]:
    """Makes the folder `adapters` in a given one, with both adapters and a broken file."""

    def make(within: Path) -> Path:
        folder = within / "adapters"
        folder.mkdir()
        for name, content in {**adapter_bytes, "broken.safetensors": b"not an adapter"}.items():
            (folder / name).write_bytes(content)
        return folder

    return make


@pytest.fixture
def adapters(make_adapters: Callable[[Path], Path], tmp_path: Path) -> Path:
    """A folder with both adapters and a broken file."""
    return make_adapters(tmp_path)


@pytest.fixture
def session(pipe: StableDiffusionPipeline, adapters: Path, tmp_path: Path) -> Iterator[Session]:
    """A session that writes into `tmp_path / "out"`."""
    session = Session(pipe, model="random", folder=adapters, output=tmp_path / "out")
    yield session
    session.close()
