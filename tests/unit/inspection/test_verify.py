"""What is read back is compared honestly: an error that is no number is reported, and nothing is no change."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dora_diffusion.inspection.verify import Verified, verify_blend, verify_copy, verify_tuned
from dora_diffusion.state import AdapterState, ModuleState

PATHS = ("unet.a", "unet.b", "unet.c")
VECTOR = "unet.a.bias"


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


BASE = {path: _normal(4, 3, seed=number) for number, path in enumerate(PATHS)}


def _adapter(scale: float = 1.0) -> AdapterState:
    modules = {
        path: ModuleState(_normal(2, 3, seed=10 + number), scale * _normal(4, 2, seed=20 + number), 2.0)
        for number, path in enumerate(PATHS)
    }
    return AdapterState(modules, vectors={VECTOR: scale * _normal(4, seed=30)})


def _blend(written: AdapterState, meant: AdapterState) -> Verified:
    return verify_blend(written, {"a": meant}, {"a": 1.0}, base=BASE.__getitem__)


def _tuned(written: AdapterState, meant: AdapterState) -> Verified:
    tuned = {path: BASE[path] + module.delta() for path, module in meant.modules.items()}
    return verify_tuned(written, tuned.__getitem__, base=BASE.__getitem__)


Verify = Callable[[AdapterState, AdapterState], Verified]
every_way = pytest.mark.parametrize("verify", [_blend, _tuned, verify_copy])


def _with(adapter: AdapterState, path: str, value: float) -> AdapterState:
    module = adapter.modules[path]
    up = module.up.clone()
    up[0, 0] = value
    return replace(adapter, modules={**adapter.modules, path: replace(module, up=up)})


@every_way
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_layer_that_is_no_number_is_reported_wherever_it_stands(verify: Verify, path: str, value: float) -> None:
    adapter = _adapter()
    found = verify(_with(adapter, path, value), adapter)
    assert (found.error, found.layer) == (math.inf, path)
    assert f"largest relative error inf of 3 layers ({path})" in found.sentence()


@pytest.mark.parametrize("verify", [_blend, verify_copy])
def test_a_vector_that_is_no_number_is_reported(verify: Verify) -> None:
    adapter = _adapter()
    found = verify(replace(adapter, vectors={VECTOR: torch.full((4,), math.nan)}), adapter)
    assert (found.error, found.layer) == (math.inf, VECTOR)


@every_way
def test_the_worst_layer_is_named(verify: Verify) -> None:
    adapter = _adapter()
    assert verify(adapter, adapter).error < 1e-6
    found = verify(_with(adapter, "unet.b", 5.0), adapter)
    assert found.layer == "unet.b" and 0.1 < found.error < math.inf


@every_way
def test_where_nothing_should_change_nothing_is_exact_and_anything_infinitely_off(verify: Verify) -> None:
    nothing = _adapter(0.0)
    assert verify(nothing, nothing).error == 0
    assert verify(_with(nothing, "unet.b", 1e-3), nothing).error == math.inf
