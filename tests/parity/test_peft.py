"""Ours against PEFT's LoRA and DoRA, live, on whole tensors with B != 0: forward, and every gradient."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from dora_diffusion.functional import dora as functional
from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.injection import inject
from tests.tolerances import assert_close


class Model(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=bias)
        self.point = nn.Conv2d(8, 6, 1, bias=bias)
        self.linear = nn.Linear(6, 10, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.point(self.conv(x)).flatten(2).transpose(1, 2))


NAMES = ["conv", "point", "linear"]


def make_pair(bias: bool, use_dora: bool, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The same model and adapter values under our layers and under PEFT's."""
    torch.manual_seed(0)
    ours, theirs = Model(bias).to(dtype), Model(bias).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    inject(ours, DoRAConfig(rank=2, alpha=3, target_modules=NAMES, use_dora=use_dora))
    ours.to(dtype)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=NAMES, use_dora=use_dora), theirs)
    theirs.to(dtype)
    with torch.no_grad():
        for name in NAMES:
            adapter, other = getattr(ours, name).adapter, getattr(theirs, name)
            adapter.up.copy_(torch.randn_like(adapter.up))
            other.lora_A["default"].weight.copy_(adapter.down)
            other.lora_B["default"].weight.copy_(adapter.up)
            if use_dora:
                adapter.magnitude.mul_(1 + torch.rand_like(adapter.magnitude))
                weight = other.lora_magnitude_vector["default"].weight
                weight.copy_(adapter.magnitude.reshape(weight.shape))
    return ours, theirs


def gradients(model: nn.Module, x: Tensor, goal: Tensor) -> tuple[Tensor, ...]:
    model.zero_grad()
    (model(x) * goal).sum().backward()
    found = {}
    for name in NAMES:
        layer = getattr(model, name)
        if hasattr(layer, "adapter"):
            a = layer.adapter
            parts = {"A": a.down, "B": a.up, "m": a.magnitude}
        else:
            m = layer.lora_magnitude_vector["default"].weight if "default" in layer.lora_magnitude_vector else None
            parts = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight, "m": m}
        found.update({f"{name}.{k}": p.grad.flatten() for k, p in parts.items() if p is not None})
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("use_dora", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_and_gradients_equal_peft(bias: bool, use_dora: bool, dtype: torch.dtype) -> None:
    ours, theirs = make_pair(bias, use_dora, dtype)
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    with torch.no_grad():
        assert_close(ours(x), theirs(x), computed_in=dtype)
        goal = torch.randn_like(ours(x))
    expected = gradients(theirs, x, goal)
    assert len(expected) == (9 if use_dora else 6)
    assert_close(gradients(ours, x, goal), expected, computed_in=dtype)


SINGLE = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 2), (2, 2, 3, 4, 4)),
    "embedding": (lambda: nn.Embedding(11, 5, padding_idx=3), None),
}


def single_pair(kind: str, *, use_dora: bool = True, **settings) -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    """A model of one layer under ours and under PEFT's, with the same values, and an input."""
    torch.manual_seed(0)
    make, shape = SINGLE[kind]
    ours = nn.Sequential(make())
    theirs = nn.Sequential(make())
    theirs.load_state_dict(ours.state_dict())
    inject(ours, DoRAConfig(rank=2, alpha=3, target_modules=["0"], use_dora=use_dora, **settings))
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=use_dora, **settings), theirs)
    with torch.no_grad():
        for mine, other in zip(parts_of(ours[0]), parts_of(theirs[0]), strict=True):
            mine.copy_(torch.rand(mine.shape) + 0.5)
            other.copy_(mine.reshape(other.shape))
    return ours, theirs, torch.tensor([[0, 1, 2, 10, 1]]) if shape is None else torch.randn(shape)


def parts_of(layer: nn.Module) -> list[nn.Parameter]:
    """A, B and m under either library's names."""
    if hasattr(layer, "adapter"):
        a = layer.adapter
        return [part for part in (a.down, a.up, a.magnitude) if part is not None]
    if "default" in layer.lora_embedding_A:
        pair = [layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]]
    else:
        pair = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return pair + [m.weight for m in layer.lora_magnitude_vector.values()]


@pytest.mark.parametrize("kind", SINGLE)
@pytest.mark.parametrize("use_dora", [True, False])
@pytest.mark.parametrize("use_rslora", [True, False])
def test_other_kinds_of_layers_equal_peft(kind: str, use_dora: bool, use_rslora: bool) -> None:
    ours, theirs, x = single_pair(kind, use_dora=use_dora, use_rslora=use_rslora)
    assert_close(ours(x), theirs(x))
    goal = torch.randn(ours(x).shape)
    got = torch.autograd.grad((ours(x) * goal).sum(), parts_of(ours[0]))
    expected = torch.autograd.grad((theirs(x) * goal).sum(), parts_of(theirs[0]))
    assert_close([grad.flatten() for grad in got], [grad.flatten() for grad in expected])


def test_embeddings_start_as_peft_starts_them() -> None:
    ours, theirs = nn.Sequential(nn.Embedding(11, 5)), nn.Sequential(nn.Embedding(11, 5))
    inject(ours, DoRAConfig(rank=2, target_modules=["0"]))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], use_dora=True), theirs)
    for mine, other in zip(parts_of(ours[0])[:2], parts_of(theirs[0])[:2], strict=True):
        assert mine.shape == other.shape
        assert bool((mine == 0).all()) == bool((other == 0).all())


@pytest.mark.parametrize(
    "wrong",
    [{"dilation": 2, "padding": 2}, {"padding": 1, "padding_mode": "circular"}],
    ids=["dilation", "padding mode"],
)
def test_where_peft_leaves_the_weights_own_answer_and_ours_does_not(wrong) -> None:
    """PEFT's A is a plain convolution: it forgets the base's dilation and padding mode. Pinned, so that we notice."""
    torch.manual_seed(0)
    base = nn.Conv2d(3, 4, 3, **wrong).double()
    ours, theirs = nn.Sequential(base), nn.Sequential(nn.Conv2d(3, 4, 3, **wrong).double())
    theirs.load_state_dict(ours.state_dict())
    inject(ours, DoRAConfig(rank=2, alpha=2, target_modules=["0"]))
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=["0"], use_dora=True), theirs)
    theirs.double()
    with torch.no_grad():
        ours[0].adapter.up.normal_()
        for mine, other in zip(parts_of(ours[0]), parts_of(theirs[0]), strict=True):
            other.copy_(mine.reshape(other.shape))
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    a = ours[0].adapter
    dense = functional.dora_weight(base.weight, a.down, a.up, a.scale, a.magnitude)
    truth = base._conv_forward(x, dense, base.bias)
    assert_close(ours(x), truth, computed_in=torch.float64)
    try:
        error = float((theirs(x) - truth).detach().abs().max())
    except RuntimeError:  # with a dilation the shapes do not even fit
        error = float("inf")
    assert error > 1e-2
