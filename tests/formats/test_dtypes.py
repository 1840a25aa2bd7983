"""Files in half and in double precision: every number keeps its bits where no scale is folded, and its dtype always."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dora_diffusion.formats import FORMATS, load_adapter, save_adapter
from dora_diffusion.functional.dora import dora_weight
from dora_diffusion.state import AdapterState, Module
from tests.families.pipelines import PIPELINES
from tests.formats.adapters import KINDS, Make, adapter_of, dora, layers_of, lora, place
from tests.tolerances import assert_identical

# How far W' may be from that of the fp32 adapter, of the largest number.
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-6}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES)
PLAIN = "old-diffusers"  # holds no DoRA
DENOISER = {"sd1": "unet", "flux-dev": "transformer"}
CASES = [(name, format) for name in DENOISER for format in FORMATS if (name, format) != ("flux-dev", PLAIN)]  # refused
# Made of q, k and v of one layer: the pair that comes back is another, of the same product.
FUSING = {"kohya", "comfyui", "original"}


@cache
def weights_of(name: str) -> Mapping[str, Tensor]:
    """Every fifth layer of Stable Diffusion's UNet; of FLUX, those which files have fused."""
    layers = layers_of(PIPELINES[name].build(), [DENOISER[name]])
    return dict(layers[::5] if name == "sd1" else [each for each in layers if ".attn." in each[0] or "mlp" in each[0]])


def adapter(name: str, make: Make, dtype: torch.dtype, *, alpha: float | None = None) -> AdapterState:
    """Alpha is the rank, or the one that is given."""
    made = adapter_of(weights_of(name).items(), make)
    return AdapterState({path: _with_alpha(module.to(dtype=dtype), alpha) for path, module in made.modules.items()})


def _with_alpha(module: Module, alpha: float | None) -> Module:
    return replace(module, alpha=float(module.rank) if alpha is None else alpha)


def merged(weight: Tensor, module: Module) -> Tensor:
    """W' in fp64, of the numbers as they are stored."""
    pair = module.as_pair().to(dtype=torch.float64)
    down = pair.down.reshape(-1, *weight.shape[1:])
    return dora_weight(weight.double(), down, pair.up, pair.scale, pair.magnitude, axis=pair.axis)


@DTYPES
@pytest.mark.parametrize(("name", "format"), CASES)
def test_without_a_scale_every_bit_survives(tmp_path: Path, name: str, format: str, dtype: torch.dtype) -> None:
    original = adapter(name, lora if format == PLAIN else dora, dtype)
    read = load_adapter(save_adapter(original, place(tmp_path, format), format=format))
    assert read.modules.keys() == original.modules.keys()
    for path, module in original.modules.items():
        got = read.modules[path]
        assert {tensor.dtype for tensor in got.tensors.values()} == {dtype}
        if name == "flux-dev" and format in FUSING:
            weight = weights_of(name)[path]
            torch.testing.assert_close(merged(weight, got), merged(weight, module), rtol=0, atol=1e-12)
            kept = {"magnitude"} & module.tensors.keys()
            assert_identical(*({part: each.tensors[part] for part in kept} for each in (got, module)))
        else:
            assert got.scale == 1.0
            assert_identical(got.tensors, module.tensors)


@DTYPES
@pytest.mark.parametrize(("name", "format"), CASES)
def test_with_a_scale_weights_are_those_of_fp32(tmp_path: Path, name: str, format: str, dtype: torch.dtype) -> None:
    """Where the format keeps alpha, bits survive as well; where it is folded into B, B is rounded once."""
    make = lora if format == PLAIN else dora
    exact = adapter(name, make, torch.float32, alpha=2.9)
    original = adapter(name, make, dtype, alpha=2.9)
    read = load_adapter(save_adapter(original, place(tmp_path, format), format=format))
    for path, module in exact.modules.items():
        got, weight = read.modules[path], weights_of(name)[path]
        assert {tensor.dtype for tensor in got.tensors.values()} == {dtype}
        expected = merged(weight, module)
        assert (merged(weight, got) - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max(), path
        if not FORMATS[format].suffixes.folds_scale and not (name == "flux-dev" and format in FUSING):
            assert_identical(got.tensors, original.modules[path].tensors)


@DTYPES
@pytest.mark.parametrize("kind", ["in-axis DoRA", "Tucker", "LoHa", "full"])
def test_other_kinds_keep_their_dtype_and_bits(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    made = adapter_of(weights_of("sd1").items(), KINDS[kind])
    original = AdapterState({path: module.to(dtype=dtype) for path, module in made.modules.items()})
    read = load_adapter(save_adapter(original, tmp_path / "a.safetensors", format="lycoris"))
    for path, module in original.modules.items():
        assert_identical(read.modules[path].tensors, module.tensors)


@DTYPES
def test_a_file_of_one_dtype_is_of_that_dtype_but_for_alpha(tmp_path: Path, dtype: torch.dtype) -> None:
    """Alpha stays fp32: bf16 has three digits, and 2.9 would not be among them."""
    path = save_adapter(adapter("sd1", dora, dtype, alpha=2.9), tmp_path / "a.safetensors", format="kohya")
    for key, tensor in load_file(path).items():
        assert tensor.dtype == (torch.float32 if key.endswith(".alpha") else dtype), key


def test_dtypes_may_differ_within_a_layer(tmp_path: Path) -> None:
    """Some trainers keep magnitudes in fp32 beside a pair in fp16."""
    half = adapter("sd1", dora, torch.float16)
    whole = adapter("sd1", dora, torch.float32)
    mixed = {path: replace(module, magnitude=whole.modules[path].magnitude) for path, module in half.modules.items()}
    for format in ("diffusers", "kohya", "peft"):
        read = load_adapter(save_adapter(AdapterState(mixed), place(tmp_path, format, format), format=format))
        for path, module in mixed.items():
            assert_identical(read.modules[path].tensors, module.tensors)


@pytest.mark.parametrize("format", ["diffusers", "peft", "ai-toolkit"])
def test_a_scale_that_does_not_fit_into_half_precision_is_refused(tmp_path: Path, format: str) -> None:
    original = adapter("sd1", dora, torch.float16, alpha=1e6)
    with pytest.raises(ValueError, match="does not fit into .*float16") as caught:
        save_adapter(original, place(tmp_path, format), format=format)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
