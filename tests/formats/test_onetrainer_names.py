"""OneTrainer's names for every sort of layer, in the published sizes: read as the layers they are, and written.

`onetrainer_names.json` is what its own conversions make of diffusers' names; where a tool has a name of its own making
for one layer (FLUX.1's `img_in.proj` in OMI's files), that name is left out here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dora_diffusion.formats import FORMATS
from dora_diffusion.formats.family_detection import family_of
from dora_diffusion.formats.reading import FAMILY_KEY, read, take_apart
from dora_diffusion.formats.writing import write
from dora_diffusion.state import AdapterState
from tests.formats.published_layers import layers_of, pair

NAMES = json.loads((Path(__file__).parent / "onetrainer_names.json").read_text())["models"]
# Models whose names one function of OneTrainer's makes -> the model in the list.
SAME = {"SD 2.1": "SD 1.5", "PixArt-Sigma 1024": "PixArt-alpha 1024", "FLUX.2 Klein 9B": "FLUX.2 dev"}
MODELS = [*NAMES, *SAME]
# OneTrainer's comfy and original files of these have diffusers' names; ours have the makers'.
SHIP_AS_DIFFUSERS = ("Sana 1.6B", "Z-Image")
OLDER = [name for name in MODELS if "omi" in NAMES[SAME.get(name, name)][0]]
CASES = [
    *((name, "kohya") for name in MODELS),
    *((name, format) for name in MODELS for format in ("comfyui", "original")),
    *((name, format) for name in OLDER for format in ("omi", "onetrainer-legacy")),
]
READ_ALONE = [(name, format) for name in SHIP_AS_DIFFUSERS for format in ("comfyui", "original")]
COLUMNS = {"comfyui": "original", "onetrainer-legacy": "legacy"}
PREFIXES = {"comfyui": "diffusion_model."}
ODD = {"transformer.img_in.proj"}


def rows_of(name: str) -> list[Mapping[str, Any]]:
    """Of the layers that the model has."""
    _, shapes = layers_of(name)
    rows = NAMES[SAME.get(name, name)]
    part = "unet" if "unet.conv_in" in shapes else "transformer"
    return [row for row in rows if all(f"{part}.{path}" in shapes for path in row["paths"])]


def names_of(name: str, format: str) -> dict[str, list[str]]:
    """OneTrainer's name, without the ending -> diffusers' paths."""
    column, found = COLUMNS.get(format, format), {}
    for row in rows_of(name):
        if isinstance(row[column], list):  # a name for each
            found.update({each: [path] for each, path in zip(row[column], row["paths"], strict=True)})
        else:
            found[PREFIXES.get(format, "") + row[column]] = row["paths"]
    return {each: paths for each, paths in found.items() if each not in ODD}


def adapter_for(name: str, format: str) -> AdapterState:
    family, shapes = layers_of(name)
    part = "unet" if "unet.conv_in" in shapes else "transformer"
    paths = [f"{part}.{path}" for found in names_of(name, format).values() for path in found]
    return AdapterState({path: pair(shapes[path]) for path in paths}, {FAMILY_KEY: family})


def test_the_list_is_of_published_models_and_whole() -> None:
    assert len(MODELS) == 12 and all(len(rows_of(name)) > 20 for name in MODELS)


@pytest.mark.parametrize(
    ("name", "format"), [case for case in CASES if case[0] not in SHIP_AS_DIFFUSERS or case[1] == "kohya"]
)
def test_these_are_the_names_that_we_write(name: str, format: str) -> None:
    tensors, _ = write(adapter_for(name, format), FORMATS[format])
    ends = (".lora_down.weight", ".lora_A.weight")
    assert {key.removesuffix(end) for key in tensors for end in ends if key.endswith(end)} == set(
        names_of(name, format)
    )


@pytest.mark.parametrize(("name", "format"), CASES)
def test_these_names_are_read_as_the_layers_they_are(name: str, format: str) -> None:
    family, shapes = layers_of(name)
    part = "unet" if "unet.conv_in" in shapes else "transformer"
    tensors, paths = {}, set()
    for key, found in names_of(name, format).items():
        sizes = [shapes[f"{part}.{path}"] for path in found]
        module = pair((sum(size[0] for size in sizes), *sizes[0][1:]))
        tensors |= {f"{key}.lora_down.weight": module.down, f"{key}.lora_up.weight": module.up}
        paths |= {f"{part}.{path}" for path in found}
    adapter = read(tensors, {}, take_apart({key: tuple(tensor.shape) for key, tensor in tensors.items()}, {}))
    assert adapter.modules.keys() == paths and not adapter.extra
    assert family_of(adapter) == (None if family == "pixart-sigma" else family)
