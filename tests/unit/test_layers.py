"""DoRALayer and BlendedLayer against the dense weight."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_diffusion import functional as f
from dora_diffusion.injection import DoRAConfig, inject
from dora_diffusion.layers import BlendedLayer
from dora_diffusion.merge import fold
from tests.tolerances import TOLERANCES, assert_close, assert_identical

LINEAR = pytest.param(lambda bias: nn.Linear(6, 5, bias=bias), (2, 3, 6), id="linear")
CONV = pytest.param(
    lambda bias: nn.Conv2d(4, 5, 3, stride=2, padding=2, dilation=2, bias=bias), (2, 4, 9, 9), id="conv"
)
CIRCULAR = pytest.param(
    lambda bias: nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular", bias=bias), (2, 4, 6, 6), id="circular"
)
# Every model here has a zero row on purpose; that inject says so is tested in test_training_equivalences.
pytestmark = pytest.mark.filterwarnings("ignore:.* rows of .* are zero in the base:UserWarning")

KINDS = pytest.mark.parametrize("make, shape", [LINEAR, CONV, CIRCULAR])


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def holder(make, bias: bool, dtype: torch.dtype = torch.float32) -> Holder:
    torch.manual_seed(0)
    model = Holder(make(bias)).to(dtype)
    with torch.no_grad():
        model.layer.weight[1] = 0  # a zero row, as real models have
    return model


def disturb(model: Holder, *, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    adapter = model.layer.adapter
    with torch.no_grad():
        adapter.up.copy_(torch.randn(adapter.up.shape, generator=generator))
        if adapter.magnitude is not None:
            adapter.magnitude.mul_(1 + 0.3 * torch.rand(adapter.magnitude.shape, generator=generator))


def by_dense_weight(layer: nn.Module, x: Tensor) -> Tensor:
    a, base = layer.adapter, layer.base
    weight = f.dora_weight(base.weight, a.down, a.up, a.scale, a.magnitude).to(x.dtype)
    if isinstance(base, nn.Linear):
        return F.linear(x, weight, base.bias)
    return base._conv_forward(x, weight, base.bias)


@KINDS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_dora", [True, False])
def test_first_forward_is_the_base_bit_for_bit(make, shape, bias: bool, dtype: torch.dtype, use_dora: bool) -> None:
    model = holder(make, bias, dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = model(x)
    inject(model, DoRAConfig(rank=2, target_modules=["layer"], use_dora=use_dora))
    assert_identical(model(x), expected)


@KINDS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_dora", [True, False])
def test_forward_is_that_of_the_dense_weight(make, shape, bias: bool, dtype: torch.dtype, use_dora: bool) -> None:
    model = holder(make, bias, dtype)
    inject(model, DoRAConfig(rank=2, alpha=3, target_modules=["layer"], use_dora=use_dora))
    disturb(model)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = by_dense_weight(model.layer, x).detach()
    scale = float(expected.abs().max())
    torch.testing.assert_close(model(x) / scale, expected / scale, rtol=0, atol=3 * TOLERANCES[dtype].absolute)


@KINDS
@pytest.mark.parametrize("strength", [-0.5, 0.5, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("use_dora", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blended_equals_folded_and_unfolds_bit_for_bit(make, shape, strength, bias, use_dora, dtype) -> None:
    model = holder(make, bias, dtype)
    injection = inject(model, DoRAConfig(rank=2, target_modules=["layer"], use_dora=use_dora))
    disturb(model)
    state = injection.state().modules["layer"]
    base = injection.eject().layer
    before = base.weight.clone()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    plain = base(x)
    blended = BlendedLayer(base)
    assert_identical(blended(x), plain)
    form = f.gain_form(base.weight, state.down, state.up, state.scale, state.magnitude, strength=strength)
    blended.hold([f.gain_form(base.weight, state.down, state.up, state.scale, state.magnitude)])
    blended.weigh(torch.tensor([strength]))
    folded = fold({"layer": (base, form)})
    drawn = base(x).detach()
    folded.undo()
    scale = float(drawn.abs().max())
    torch.testing.assert_close(blended(x) / scale, drawn / scale, rtol=0, atol=3 * TOLERANCES[dtype].absolute)
    assert_identical(base.weight, before)


@pytest.mark.parametrize("norm_grad", ["detached", "exact"])
def test_gradients_are_those_of_the_dense_weight_with_the_norm_held_or_not(norm_grad: str) -> None:
    model = holder(lambda bias: nn.Linear(6, 5, bias=bias), True, torch.float64)
    inject(model, DoRAConfig(rank=2, target_modules=["layer"], norm_grad=norm_grad))
    model.double()
    disturb(model)
    layer, a = model.layer, model.layer.adapter
    x = torch.randn(4, 6, dtype=torch.float64)
    goal = torch.randn(4, 5, dtype=torch.float64)
    parameters = [a.down, a.up, a.magnitude]
    got = torch.autograd.grad((model(x) * goal).sum(), parameters)
    dense = layer.base.weight + a.scale * a.up @ a.down
    norm = dense.norm(dim=1)
    norm = norm.detach() if norm_grad == "detached" else norm
    g = torch.where(layer.base.weight.norm(dim=1) > 0, a.magnitude / norm, torch.ones_like(norm))
    expected = torch.autograd.grad((F.linear(x, g[:, None] * dense, layer.base.bias) * goal).sum(), parameters)
    assert_close(list(got), list(expected), computed_in=torch.float64)


@pytest.mark.parametrize("norm_grad", ["detached", "exact"])
def test_gain_is_fp32_under_autocast(norm_grad: str) -> None:
    model = holder(lambda bias: nn.Linear(64, 48, bias=bias), True)
    inject(model, DoRAConfig(rank=4, target_modules=["layer"], norm_grad=norm_grad))
    disturb(model)
    expected = model.layer.gain()
    with torch.autocast("cpu", torch.bfloat16):
        got = model.layer.gain()
    assert got.dtype == torch.float32
    assert_identical(got, expected)


def test_dropout_acts_on_the_low_rank_branch_only() -> None:
    model = holder(lambda bias: nn.Linear(6, 5, bias=bias), True)
    inject(model, DoRAConfig(rank=2, target_modules=["layer"], dropout=0.5))
    x = torch.randn(4, 6)
    model.train()
    assert_identical(model(x), model.layer.base(x))  # B = 0: whatever is dropped, the base stays whole
    disturb(model)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert_identical(model(x), model(x))
