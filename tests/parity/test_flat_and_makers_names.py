"""Files under kohya's, the makers' and XLabs' names, read by diffusers' own converters: the same layers and rows.

Published widths, two blocks of each stack. What a converter does not know is not asked of it, and said where it stands.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dora_diffusion.formats import FORMATS, detect_format, load_adapter
from dora_diffusion.formats.layouts.flux_xlabs import FLUX_XLABS
from dora_diffusion.formats.reading import FAMILY_KEY
from dora_diffusion.formats.writing import write
from dora_diffusion.state import AdapterState, ModuleState
from tests.formats.published_layers import MODELS, layers_of
from tests.tolerances import assert_near

ROUNDED = 1e-6  # of the largest number: a scale is folded into a factor in fp32
BLOCK = re.compile(r"(?:blocks|layers|refiner)\.(\d+)\.")


def everything(path: str) -> bool:
    return True


def in_blocks(path: str) -> bool:
    """What diffusers' converters of FLUX.1 and Lumina know, and name as their loaders want it."""
    return BLOCK.search(path) is not None


def of_kohya_flux_2(path: str) -> bool:
    """Its modulations and what embeds guidance are left out, with a warning."""
    return not re.search(r"modulation|guidance_embedder|norm_out", path)


def of_dotted_flux_2(path: str) -> bool:
    """The halves of the last modulation stay where they are, though its own reader of checkpoints swaps them."""
    return not path.endswith("norm_out.linear")


@dataclass(frozen=True)
class Case:
    """A layout that diffusers reads of a model.

    Attributes:
        name: the published model.
        format: ours.
        knows: path -> whether the converter takes the layer.
        has_alpha: whether the converter takes alphas; without, alpha is the rank.
    """

    name: str
    format: str
    knows: Callable[[str], bool] = everything
    has_alpha: bool = True


CASES = (
    Case("FLUX.1 dev", "kohya", in_blocks),
    Case("FLUX.2 dev", "kohya", of_kohya_flux_2),
    Case("FLUX.2 Klein 9B", "kohya", of_kohya_flux_2),
    Case("Z-Image", "kohya"),
    Case("Qwen-Image", "kohya"),
    Case("FLUX.2 dev", "comfyui", of_dotted_flux_2, has_alpha=False),
    Case("FLUX.2 Klein 9B", "comfyui", of_dotted_flux_2, has_alpha=False),
    Case("Lumina-Image 2.0", "comfyui", in_blocks, has_alpha=False),
    Case("Qwen-Image", "comfyui"),
)


def some_layers(case: Case, alpha: float) -> AdapterState:
    """Two blocks of every stack, rank 1."""
    family, shapes = layers_of(case.name)
    part = MODELS[case.name].denoiser
    generator, modules = torch.Generator().manual_seed(0), {}
    for path, (out, *rest) in shapes.items():
        number = BLOCK.search(path)
        if path.startswith(f"{part}.") and case.knows(path) and (number is None or int(number[1]) < 2):
            down = torch.randn(1, *rest, generator=generator)
            up = torch.randn(out, 1, *[1] * (len(rest) - 1), generator=generator)
            modules[path] = ModuleState(down, up, alpha)
    return AdapterState(modules, {FAMILY_KEY: family})


def as_diffusers_reads(name: str, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (A, B) with the scale in them."""
    kind: Any = getattr(diffusers, MODELS[name].pipeline)
    found = kind.lora_state_dict(dict(tensors))
    tensors = found[0] if isinstance(found, tuple) else found
    paths = dict.fromkeys(key.rpartition(".lora_")[0] for key in tensors)
    return {path: (tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]) for path in paths}


def assert_same(theirs: Mapping[str, tuple[Tensor, Tensor]], ours: Mapping[str, Any]) -> None:
    """Both move the same input alike; the dense difference would be large."""
    assert theirs.keys() == ours.keys()
    for path, (down, up) in theirs.items():
        pair = ours[path].as_pair().to(dtype=torch.float64)
        x = torch.randn(pair.down[0].numel(), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        moved = up.flatten(1).double() @ (down.flatten(1).double() @ x)
        assert_near(moved, pair.scale * (pair.up.flatten(1) @ (pair.down.flatten(1) @ x)), ROUNDED)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}, {case.format}")
def test_diffusers_reads_what_we_write(case: Case) -> None:
    adapter = some_layers(case, alpha=3.0 if case.has_alpha else 1.0)
    tensors, _ = write(adapter, FORMATS[case.format])
    asked = {key: tensor for key, tensor in tensors.items() if case.has_alpha or not key.endswith(".alpha")}
    assert_same(as_diffusers_reads(case.name, asked), adapter.modules)


@pytest.mark.parametrize("name", ["Qwen-Image", "Z-Image"])
def test_diffusers_reads_bare_names_as_we_do(name: str, tmp_path) -> None:
    """diffusers' names without `transformer.`, kohya's parts: with alphas its converter takes them."""
    tensors, _ = write(some_layers(Case(name, "kohya"), alpha=3.0), FORMATS["ai-toolkit"])
    ends = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    bare = {}
    for key, tensor in tensors.items():
        layer, _, part = key.removeprefix("transformer.").partition(".lora_")
        bare[f"{layer}.{ends['lora_' + part]}"] = tensor
        bare[f"{layer}.alpha"] = torch.tensor(2.0)
    save_file(bare, tmp_path / "theirs.safetensors")
    assert detect_format(tmp_path / "theirs.safetensors") == "bare"
    assert_same(as_diffusers_reads(name, bare), load_adapter(tmp_path / "theirs.safetensors").modules)


def test_diffusers_reads_xlabs_names_as_we_do(tmp_path) -> None:
    """Its converter takes no alphas and spells a second stream's layers as `add_q_proj`."""
    _, shapes = layers_of("FLUX.1 dev")
    generator, tensors = torch.Generator().manual_seed(0), {}
    names = ("qkv_lora1", "qkv_lora2", "proj_lora1", "proj_lora2")
    layers = [f"double_blocks.{number}.processor.{name}" for number in (0, 18) for name in names]
    for name in [*layers, *(f"single_blocks.{n}.processor.{each}_lora" for n in (1, 37) for each in ("qkv", "proj"))]:
        fusion = FLUX_XLABS.of_original(name)
        assert fusion is not None, name
        rows = sum(shapes[f"transformer.{path}"][0] for path in fusion.paths)
        columns = shapes[f"transformer.{fusion.paths[0]}"][1]
        tensors[f"{name}.down.weight"] = torch.randn(2, columns, generator=generator)
        tensors[f"{name}.up.weight"] = torch.randn(rows, 2, generator=generator)
    save_file(tensors, tmp_path / "theirs.safetensors")
    assert detect_format(tmp_path / "theirs.safetensors") == "xlabs"
    assert_same(as_diffusers_reads("FLUX.1 dev", tensors), load_adapter(tmp_path / "theirs.safetensors").modules)
