"""Hot swap: a compiled pipeline swaps adapters, ranks, strengths and schedules without compiling anew."""

import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.injection import inject
from dora_diffusion.state import AdapterState
from tests.pocket_random import random_adapter, random_pocket_pipeline
from tests.tolerances import assert_close, assert_identical

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler warns of its own ways


def predict(pipe, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noisy, text = torch.randn(1, 8, 16, 16, generator=generator), torch.randn(1, 32, 256, generator=generator)
    with torch.no_grad():
        return pipe.unet(noisy, torch.tensor([500]), text).sample


def adapter_of(pipe, seed: int, *, rank: int = 4, targets: str | list[str] | None = None) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    injection = inject(pipe.unet, DoRAConfig(rank=rank, target_modules=targets), generator=generator)
    with torch.no_grad():
        for up in injection.ups():
            up.copy_(0.1 * torch.randn(up.shape, generator=generator))
        for magnitude in injection.magnitudes():
            magnitude.mul_(1 + 0.2 * torch.rand(magnitude.shape, generator=generator))
    state = injection.state().under("unet")
    injection.eject()
    return state


@pytest.fixture(scope="module")
def adapters() -> dict[str, AdapterState]:
    pipe = random_pocket_pipeline()
    return {
        "whole": adapter_of(pipe, 1),
        "subset": adapter_of(pipe, 2, targets=["attn2.to_k"]),
        "wide": adapter_of(pipe, 3, rank=7),
        "lora": AdapterState(
            {p: m for p, m in random_adapter(pipe, 4, use_dora=False).modules.items() if p.startswith("unet")}
        ),
    }


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def compiled(backend: str):
    pipe = random_pocket_pipeline()
    manager = AdapterManager(pipe)
    manager.enable_hotswap(max_rank=16)
    before = predict(pipe)
    pipe.unet = torch.compile(pipe.unet, backend=backend, fullgraph=True)
    assert_close(predict(pipe), before)
    torch.compiler.set_stance("fail_on_recompile")
    return pipe, manager


def walk(pipe, manager: AdapterManager, adapters: dict[str, AdapterState]) -> dict[str, Tensor]:
    """Load, mix, replace, fade and clear; the answer after each."""
    seen = {}
    manager.load_adapter(adapters["whole"], name="a")
    manager.set_adapters({"a": 1.0})
    seen["one"] = predict(pipe)
    manager.set_adapters({"a": -0.4})
    seen["other strength"] = predict(pipe)
    manager.load_adapter(adapters["lora"], name="b")
    manager.set_adapters({"a": 0.5, "b": {"unet": 0.9, "unet.mid_block": 0.0}})
    seen["two"] = predict(pipe)
    manager.delete_adapter("a")
    manager.load_adapter(adapters["subset"], name="a")
    manager.set_adapters({"a": 1.0})
    seen["subset"] = predict(pipe)
    manager.delete_adapter("b")
    manager.load_adapter(adapters["wide"], name="b")
    manager.set_adapters({"b": 0.7})
    seen["other rank"] = predict(pipe)
    pipe.scheduler.set_timesteps(10)
    manager.set_schedule("b", [(0.0, 0.0), (1.0, 1.0)])
    seen["schedule"] = predict(pipe)
    manager.set_schedule("b", None)
    manager.set_adapters({})
    seen["none"] = predict(pipe)
    return seen


def test_a_walk_through_everything_recompiles_nothing_and_draws_as_without_hot_swap(adapters) -> None:
    plain = random_pocket_pipeline()
    expected = walk(plain, AdapterManager(plain), adapters)
    pipe, manager = compiled("eager")
    got = walk(pipe, manager, adapters)
    assert_close(got, expected)
    assert not torch.equal(expected["one"], expected["none"])
    assert not torch.equal(expected["schedule"], expected["other rank"])


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler, and there is none here")
def test_a_block_of_generated_code_swaps_without_compiling_anew(adapters) -> None:
    """As diffusers' `compile_repeated_blocks`: one block, compiled in place, by the backend that people use."""
    states = {
        name: AdapterState({p: m for p, m in state.modules.items() if p.startswith("unet.mid_block")})
        for name, state in adapters.items()
    }
    plain = random_pocket_pipeline()
    expected = walk(plain, AdapterManager(plain), states)
    pipe = random_pocket_pipeline()
    manager = AdapterManager(pipe)
    manager.enable_hotswap(max_rank=16)
    attention = pipe.unet.mid_block.attentions[0]
    attention.compile(fullgraph=True)
    predict(pipe)
    torch.compiler.set_stance("fail_on_recompile")
    torch.testing.assert_close(walk(pipe, manager, states), expected, rtol=1e-4, atol=1e-4)


def test_the_guard_of_these_tests_sees_a_recompilation(adapters) -> None:
    pipe = random_pocket_pipeline()
    manager = AdapterManager(pipe)
    manager.load_adapter(adapters["whole"], name="a")
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    predict(pipe)
    torch.compiler.set_stance("fail_on_recompile")
    manager.set_adapters({"a": 1.0})
    with pytest.raises(RuntimeError, match="recompile"):
        predict(pipe)


def test_a_layer_that_an_adapter_lacks_is_the_base(adapters) -> None:
    pipe = random_pocket_pipeline()
    before = predict(pipe)
    manager = AdapterManager(pipe)
    manager.enable_hotswap(max_rank=8)
    assert_identical(predict(pipe), before)
    manager.load_adapter(adapters["subset"], name="a")
    manager.set_adapters({"a": 1.0})
    touched = {path.removeprefix("unet.") for path in adapters["subset"].modules}
    for path, module in pipe.unet.named_modules():
        if hasattr(module, "mix") and path not in touched:
            x = torch.randn(2, module.base.in_features)
            assert_identical(module(x), module.base(x))
    manager.unload()
    assert_identical(predict(pipe), before)
    assert not any(hasattr(module, "mix") for module in pipe.unet.modules())


def test_what_does_not_fit_is_refused_in_one_line_and_changes_nothing(adapters) -> None:
    pipe = random_pocket_pipeline()
    manager = AdapterManager(pipe)
    manager.enable_hotswap(max_rank=5, target_modules=["attn2.to_k"])
    manager.load_adapter(adapters["subset"], name="a")
    manager.load_adapter(adapters["subset"], name="b")
    manager.set_adapters({"a": 1.0})
    drawn = predict(pipe)
    for action, message in (
        (lambda: manager.set_adapters({"a": 1.0, "b": 1.0}), "ranks sum to 8, enable_hotswap's max_rank is 5"),
        (lambda: manager.load_adapter(adapters["whole"], name="c"), "no room aside here"),
        (lambda: manager.enable_hotswap(max_rank=8), "before the first load_adapter"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            action()
        assert "\n" not in str(caught.value)
    assert_identical(predict(pipe), drawn)
    manager.unload()
    manager.enable_hotswap(max_rank=5)
    with pytest.raises(ValueError, match="rank 7 does not fit enable_hotswap's max_rank of 5"):
        manager.load_adapter(adapters["wide"], name="wide")
