"""What runs are trained on, where a file does not say otherwise."""

from pathlib import Path

import pytest

from dora_diffusion.pretrain.scenes import background
from tests.pocket_random import random_pocket_pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A pocket base of random weights."""
    folder = tmp_path_factory.mktemp("base")
    random_pocket_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Three pictures without captions."""
    folder = tmp_path_factory.mktemp("images")
    for name in ("red", "blue", "meadow"):
        background(name, 64).save(folder / f"{name}.png")
    return folder
