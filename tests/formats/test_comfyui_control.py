"""What ComfyUI makes of control adapters: weights that take the place of the base's, and layers for wider ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.formats import examine, load_adapter, save_adapter
from dora_diffusion.inspection.header import summarise_header
from dora_diffusion.inspection.report import inspect_adapter
from dora_diffusion.layers.base_layers import dense_weight
from dora_diffusion.state import FactoredState
from tests.pocket_random import random_pocket_pipeline
from tests.tolerances import assert_close, assert_identical

LAYER = "diffusion_model.double_blocks.0.img_attn"


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def written(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


def test_a_set_weight_takes_the_place_of_the_base_s(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", {f"{LAYER}.qkv.set_weight": numbers(24, 8)})
    with pytest.raises(ValueError, match=r"img_attn.qkv: set_weight replaces the base's weight; load it with its base"):
        load_adapter(path)
    assert summarise_header(path).structure.layers == 3
    weights = {f"transformer.transformer_blocks.0.attn.to_{name}": numbers(8, 8) + ord(name) for name in "qkv"}
    read = load_adapter(path, base=weights.__getitem__, family="flux")
    for layer, module in read.modules.items():
        assert isinstance(module, FactoredState) and module.algorithm == "full"
        rows = "qkv".index(layer[-1]) * 8
        assert_close(weights[layer] + module.delta(), numbers(24, 8)[rows : rows + 8])
    again = load_adapter(save_adapter(read, tmp_path / "b.safetensors", format="comfyui"), family="flux")
    for layer, module in read.modules.items():
        assert_identical(dict(again.modules[layer].tensors), dict(module.tensors))


def test_halves_that_stand_the_other_way_round_are_compared_with_their_own(tmp_path: Path) -> None:
    key = "diffusion_model.final_layer.adaLN_modulation.1.set_weight"
    path = written(tmp_path / "a.safetensors", {key: numbers(16, 8)})
    layer, weight = "transformer.norm_out.linear", numbers(16, 8) * 2
    read = load_adapter(path, base={layer: weight}.__getitem__, family="flux")
    shift, scale = numbers(16, 8).chunk(2)
    assert_close(weight + read.modules[layer].delta(), torch.cat([scale, shift]))


def test_a_set_weight_draws_as_the_weight_itself(tmp_path: Path) -> None:
    pipe = random_pocket_pipeline()
    inner = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = pipe.unet.get_submodule(inner)
    new, inputs = numbers(*layer.weight.shape), numbers(2, layer.weight.shape[1])
    path = written(tmp_path / "a.safetensors", {f"lora_unet_{inner.replace('.', '_')}.set_weight": new})
    before = layer(inputs)
    bias = 0 if layer.bias is None else layer.bias
    manager = AdapterManager(pipe)
    manager.load_adapter(path, name="a")
    manager.set_adapters({"a": 1.0})
    assert_close(pipe.unet.get_submodule(inner)(inputs), inputs @ new.T + bias)
    manager.unload()
    assert_identical(pipe.unet.get_submodule(inner)(inputs), before)
    assert_identical(dense_weight(layer), layer.weight.detach())


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"norm.query_norm.set_weight": (8,)}, "a set_weight that replaces the weight of a normalisation is not comp"),
        ({"qkv.set_weight": (24, 4)}, r"set_weight \(24, 4\) cannot replace a weight \(24, 8\)"),
        ({"qkv.set_weight": (24, 8), "qkv.diff": (24, 8)}, "stored as a whole difference and as a new weight"),
    ],
)
def test_what_cannot_be_set_is_refused(tmp_path: Path, tensors: dict[str, tuple[int, ...]], complaint: str) -> None:
    keys = {f"{LAYER}.{key}": numbers(*shape) for key, shape in tensors.items()}
    path = written(tmp_path / "a.safetensors", keys)
    with pytest.raises(ValueError, match=complaint) as caught:
        load_adapter(path, base=lambda path: numbers(8, 8), family="flux")
    assert "\n" not in str(caught.value)


def control(shape: tuple[int, ...] = (8, 128)) -> dict[str, Tensor]:
    """FLUX.1's own control adapters, as ComfyUI has them."""
    return {
        "diffusion_model.img_in.lora_A.weight": numbers(4, 128),
        "diffusion_model.img_in.lora_B.weight": numbers(8, 4),
        "diffusion_model.img_in.reshape_weight": torch.tensor(shape),
    }


def test_a_layer_of_a_wider_base_is_read_and_keeps_what_it_says(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", control())
    assert examine(path).unknown == ()
    read = load_adapter(path, family="flux")
    assert read.modules["transformer.x_embedder"].shape == (8, 128)
    assert_identical(load_file(save_adapter(read, tmp_path / "b.safetensors", format="comfyui")), {
        **control(), "diffusion_model.img_in.alpha": torch.tensor(4.0),
    })  # fmt: skip
    notes = inspect_adapter(path)["notes"]
    told = "1 layers are for a base that has more inputs there, such as diffusion_model.img_in.reshape_weight"
    assert told in notes


@pytest.mark.parametrize("shape", [(8, 64), (128,), (8, 64, 2, 2)])
def test_another_shape_than_the_pair_s_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = written(tmp_path / "a.safetensors", control(shape))
    with pytest.raises(ValueError, match=r"img_in: its reshape_weight \(.*\) is not the shape of its pair, \(8, 128\)"):
        load_adapter(path, family="flux")


def test_a_base_that_is_not_wide_enough_is_told_why(tmp_path: Path) -> None:
    pipe: Any = random_pocket_pipeline()
    inner = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{inner}.lora_down.weight": numbers(4, 1000),
        f"{inner}.lora_up.weight": numbers(8, 4),
        f"{inner}.reshape_weight": torch.tensor((8, 1000)),
    }
    manager = AdapterManager(pipe)
    with pytest.raises(
        ValueError, match=r"the file is for a base whose layers have more inputs \(reshape_weight\), as"
    ):
        manager.load_adapter(written(tmp_path / "a.safetensors", tensors), name="a")


def test_a_shape_alone_changes_nothing_and_is_refused(tmp_path: Path) -> None:
    key = "diffusion_model.img_in.reshape_weight"
    path = written(tmp_path / "a.safetensors", {key: torch.tensor((8, 128))})
    with pytest.raises(ValueError, match="none of its 1 tensors changes a layer"):
        load_adapter(path)
