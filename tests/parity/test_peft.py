"""Ours against PEFT's LoRA and DoRA, live, on whole tensors with B != 0: forward, and every gradient."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from dora_diffusion.injection import DoRAConfig, inject
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
