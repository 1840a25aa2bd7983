"""Per output or per input: which a `dora_scale` is. Row 5 of the test matrix, and the oddities of row 13."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_diffusion.formats import examine, load_adapter, save_adapter
from dora_diffusion.functional.dora import squared_row_norms
from dora_diffusion.state import FactoredState, ModuleState
from tests.formats.adapters import dense
from tests.tolerances import assert_close, assert_identical

LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
PATH = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "lora_unet_mid_block_resnets_0_conv1"
CONV_PATH = "unet.mid_block.resnets.0.conv1"


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(layer: str, out: int, inputs: int, *kernel: int) -> dict[str, Tensor]:
    return {
        f"{layer}.lora_down.weight": numbers(2, inputs, *kernel),
        f"{layer}.lora_up.weight": numbers(out, 2, *[1] * len(kernel)),
        f"{layer}.alpha": torch.tensor(2.0),
    }


def written(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, folder / "a.safetensors", metadata=metadata)
    return folder / "a.safetensors"


SHAPED = {
    "linear, per output": (LAYER, PATH, (6, 4), (6, 1), "out"),
    "linear, per input": (LAYER, PATH, (6, 4), (1, 4), "in"),
    "square, per output": (LAYER, PATH, (5, 5), (5, 1), "out"),
    "square, per input": (LAYER, PATH, (5, 5), (1, 5), "in"),
    "flat, as many as outputs": (LAYER, PATH, (6, 4), (6,), "out"),
    "flat, as many as inputs": (LAYER, PATH, (6, 4), (4,), "in"),
    "convolution, per output": (CONV, CONV_PATH, (5, 5, 3, 3), (5, 1, 1, 1), "out"),
    "convolution, per input": (CONV, CONV_PATH, (5, 5, 3, 3), (1, 5, 1, 1), "in"),
    "one output, per input": (LAYER, PATH, (1, 4), (1, 4), "in"),
}


@pytest.mark.parametrize("case", SHAPED)
def test_the_shape_says_it_and_survives(tmp_path, case: str) -> None:
    layer, path, weight, shape, axis = SHAPED[case]
    scale = numbers(*shape).abs() + 0.1
    read = load_adapter(written(tmp_path, {**pair(layer, *weight), f"{layer}.dora_scale": scale}))
    module = read.modules[path]
    assert module.axis == axis
    assert_identical(module.magnitude, scale.reshape(-1))
    again = load_file(save_adapter(read, tmp_path / "b.safetensors", format="kohya"))[f"{layer}.dora_scale"]
    expected = [1] * len(weight)
    expected[0 if axis == "out" else 1] = -1
    assert_identical(again, scale.reshape(expected))


def square(scale: Tensor) -> dict[str, Tensor]:
    return {**pair(LAYER, 8, 8), f"{LAYER}.dora_scale": scale}


TOLD = {
    "LyCORIS out": ({"ss_network_args": json.dumps({"dora_wd": "True", "wd_on_output": "True"})}, "out"),
    "LyCORIS in": ({"ss_network_args": json.dumps({"dora_wd": "True", "wd_on_output": "False"})}, "in"),
    "OneTrainer": ({"ot_config": json.dumps({"lora_decompose_output_axis": True})}, "out"),
    "our own": ({"dora_diffusion.magnitude_axis": "in"}, "in"),
}


@pytest.mark.parametrize("tool", TOLD)
def test_metadata_tell_a_flat_magnitude_of_a_square_layer(tmp_path, tool: str) -> None:
    metadata, axis = TOLD[tool]
    assert load_adapter(written(tmp_path, square(numbers(8).abs()), metadata)).modules[PATH].axis == axis


@pytest.mark.parametrize("metadata", [{}, {"ss_network_args": "[1"}, {"ss_network_args": "null"}])
def test_without_metadata_and_base_it_is_refused(tmp_path, metadata: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="may be per output or per input.*--base") as caught:
        load_adapter(written(tmp_path, square(numbers(8).abs()), metadata))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_the_base_tells_it(tmp_path, axis: str) -> None:
    weight = numbers(8, 8, seed=1) * torch.linspace(0.5, 3, 8)[:, None] * torch.linspace(2, 0.3, 8)
    norms = squared_row_norms(weight if axis == "out" else weight.T).sqrt()
    path = written(tmp_path, square(norms * (1 + 0.05 * numbers(8, seed=2))))
    asked: list[str] = []

    def base(name: str) -> Tensor:
        asked.append(name)
        return weight

    assert load_adapter(path, base=base).modules[PATH].axis == axis
    assert asked == [PATH]


def test_the_base_is_not_asked_when_shapes_tell(tmp_path) -> None:
    def base(name: str) -> Tensor:
        raise AssertionError(name)

    assert load_adapter(written(tmp_path, square(numbers(8, 1).abs())), base=base).modules[PATH].axis == "out"


def test_magnitudes_of_lengths_that_fit_nothing_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="fits neither 8 outputs nor 8 inputs"):
        load_adapter(written(tmp_path, square(numbers(7).abs())))


def test_flat_convolution_factors_take_a_magnitude_per_input(tmp_path) -> None:
    tensors = {
        **{f"{CONV}.hada_w1_a": numbers(6, 2), f"{CONV}.hada_w1_b": numbers(2, 36)},
        **{f"{CONV}.hada_w2_a": numbers(6, 2, seed=1), f"{CONV}.hada_w2_b": numbers(2, 36, seed=1)},
        f"{CONV}.dora_scale": numbers(1, 4, 1, 1).abs(),
    }
    module = load_adapter(written(tmp_path, tensors)).modules[CONV_PATH]
    assert isinstance(module, FactoredState) and module.axis == "in" and module.magnitude.shape == (4,)
    weight = numbers(6, 4, 3, 3, seed=2)
    halves = [numbers(6, 2, seed=seed).double() @ numbers(2, 36, seed=seed).double() for seed in (0, 1)]
    v = weight + (halves[0] * halves[1]).reshape(6, 4, 3, 3)
    norms = v.transpose(0, 1).flatten(1).norm(dim=1)
    expected = v * (module.magnitude / norms)[None, :, None, None]
    assert_close(dense(weight, module), expected, computed_in=torch.float64)


def test_oddities_are_kept_and_reported(tmp_path) -> None:
    tensors = {
        **pair(LAYER, 3, 2),
        f"{LAYER}.alpha": torch.tensor(0.0),  # nothing of the pair acts
        f"{CONV}.dora_scale": numbers(1, 4, 1, 1).abs(),  # a magnitude without a pair
        "lora_unet_no_such_words.lora_down.weight": numbers(2, 4),
        "emb_params": numbers(3, 8),
    }
    path = written(tmp_path, tensors)
    strange = {"lora_unet_no_such_words.lora_down.weight", "emb_params"}
    assert set(examine(path).unknown) == strange
    read = load_adapter(path)
    assert read.extra.keys() == strange | {f"{CONV}.dora_scale"}
    module = read.modules[PATH]
    assert isinstance(module, ModuleState) and module.scale == 0 and module.rank == 2
    assert_identical(load_file(save_adapter(read, tmp_path / "b.safetensors", format="kohya")), tensors)


def test_rank_above_the_sides_and_rows_of_zeros(tmp_path) -> None:
    weight = numbers(3, 4, seed=3)
    weight[1] = 0
    tensors = {
        f"{LAYER}.lora_down.weight": numbers(7, 4),
        f"{LAYER}.lora_up.weight": numbers(3, 7),
        f"{LAYER}.dora_scale": torch.tensor([[1.0], [0.0], [2.0]]),
    }
    module = load_adapter(written(tmp_path, tensors)).modules[PATH]
    got = dense(weight, module)
    v = weight + numbers(3, 7).double() @ numbers(7, 4).double()
    expected = v / v.norm(dim=1, keepdim=True) * torch.tensor([[1.0], [0.0], [2.0]])
    assert_close(got[[0, 2]], expected[[0, 2]], computed_in=torch.float64)
    assert_close(got[1], v[1], computed_in=torch.float64)  # a row without a direction in the base adapts as LoRA


@pytest.mark.parametrize("shape", [(24, 1, 1, 1), (1, 16, 1, 1)])
@pytest.mark.parametrize("format", ["kohya", "lycoris"])
def test_a_magnitude_beside_flat_factors_of_a_convolution_keeps_its_dimensions(
    tmp_path: Path, format: str, shape: tuple[int, ...]
) -> None:
    """LyCORIS writes a LoHa of a convolution flat and its magnitude not: with two dimensions no tool broadcasts it."""
    prefix = {"kohya": "lora_unet_", "lycoris": "lycoris_"}[format]
    name = f"{prefix}down_blocks_0_resnets_0_conv1"
    factors = {"hada_w1_a": (24, 2), "hada_w1_b": (2, 144), "hada_w2_a": (24, 2), "hada_w2_b": (2, 144)}
    theirs = {f"{name}.{part}": torch.rand(*size) for part, size in factors.items()}
    theirs |= {f"{name}.dora_scale": torch.rand(*shape), f"{name}.alpha": torch.tensor(1.0)}
    save_file(theirs, tmp_path / "theirs.safetensors")
    read = load_adapter(tmp_path / "theirs.safetensors")
    ours = save_adapter(read, tmp_path / "ours.safetensors", format=format)
    assert_identical(load_file(ours), theirs)
