"""Where A and B start: always at the base's own picture, and PiSSA at the weight's principal part."""

import pytest
import torch
from torch import nn

from dora_diffusion.functional import dora as f
from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.injection import inject
from tests.kinds import KINDS, make_input, make_model, with_weight
from tests.tolerances import TOLERANCES, assert_close, assert_identical

CONFIG = {"rank": 2, "alpha": 3, "target_modules": ["layer"]}


@KINDS
@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_at_the_base_bit_for_bit(kind: str, init: str, dtype: torch.dtype) -> None:
    model, x = make_model(kind, dtype=dtype), make_input(kind, dtype)
    expected = model(x)
    inject(model, DoRAConfig(**CONFIG, init=init))
    assert_identical(model(x), expected)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_rslora", [True, False])
def test_pissa_starts_at_the_base_and_leaves_its_bytes_alone(kind: str, dtype: torch.dtype, use_rslora: bool) -> None:
    model, x = make_model(kind, dtype=dtype), make_input(kind, dtype)
    expected, weight = model(x).detach(), model.layer.weight.clone()
    inject(model, DoRAConfig(**CONFIG, init="pissa", use_rslora=use_rslora))
    size = float(expected.abs().max())
    atol = 3 * TOLERANCES[dtype].absolute
    torch.testing.assert_close(model(x) / size, expected / size, rtol=0, atol=atol)
    assert_identical(model.layer.base.weight, weight)


@pytest.mark.parametrize("shape", [(24, 16), (6, 40)])
@pytest.mark.parametrize("rank", [1, 3])
def test_pissa_holds_the_principal_part(shape: tuple[int, int], rank: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    weight = model[0].weight.detach()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    weight.copy_(u @ torch.diag(0.5 ** torch.arange(len(s))) @ v)  # a trained weight's spectrum falls
    inject(model, DoRAConfig(rank=rank, alpha=5, target_modules=["0"], init="pissa"))
    adapter = model[0].adapter
    u, s, v = torch.linalg.svd(weight)
    best = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
    assert_close(f.low_rank_delta(adapter.down, adapter.up, adapter.scale).detach(), best)


@KINDS
def test_a_trained_pissa_is_a_plain_adapter_of_twice_the_rank_on_the_untouched_base(kind: str) -> None:
    model, x = make_model(kind), make_input(kind)
    injection = inject(model, DoRAConfig(**CONFIG, init="pissa"))
    optimizer = torch.optim.AdamW(injection.parameters(), lr=0.05)
    for _ in range(5):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained, module = model(x), injection.state().modules["layer"]
    assert module.rank == 4
    base = injection.eject().layer
    weight = base.weight.T if kind == "embedding" else base.weight
    dense = f.dora_weight(weight.detach(), module.down, module.up, module.scale, module.magnitude)
    assert_close(with_weight(base, dense, x), trained.detach(), computed_in=torch.float32)
    again = inject(model, DoRAConfig(**CONFIG, init="pissa"), generator=torch.Generator().manual_seed(9))
    again.load(injection_state(module))
    assert_close(model(x), trained)


def injection_state(module):
    from dora_diffusion.state import AdapterState

    return AdapterState({"layer": module})


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa"])
def test_the_generator_alone_decides(init: str) -> None:
    drawn = []
    for seed in (1, 1, 2):
        model = make_model("conv")
        torch.manual_seed(seed * 100)
        injection = inject(model, DoRAConfig(**CONFIG, init=init), generator=torch.Generator().manual_seed(seed))
        drawn.append([parameter.detach() for parameter in injection.downs()])
    assert_identical(drawn[0], drawn[1])
    assert not torch.equal(drawn[0][0], drawn[2][0])


def test_each_init_is_what_its_name_says() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 300))
    downs = {}
    for init in ("default", "gaussian", "orthogonal"):
        injection = inject(model, DoRAConfig(rank=16, target_modules=["0"], init=init))
        downs[init] = injection.downs()[0].detach()
        injection.eject()
    assert_close(downs["orthogonal"] @ downs["orthogonal"].T, torch.eye(16))
    assert downs["gaussian"].std() == pytest.approx(1 / 16, rel=0.05)
    assert downs["default"].abs().max() <= 400**-0.5


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    inject(nn.Sequential(nn.Linear(8, 8).requires_grad_(False)), DoRAConfig(rank=2, target_modules=["0"], init="pissa"))
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(8, 8))
    torch.manual_seed(5)
    inject(model, DoRAConfig(rank=2, target_modules=["0"], init="pissa"))
    assert_identical(torch.randn(3), expected)
