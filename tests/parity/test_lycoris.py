"""Ours against LyCORIS' DoRA, live: it differentiates the norm, so `norm_grad="exact"`; and it knows the other axis."""

import pytest
import torch
from lycoris.modules.locon import LoConModule
from torch import Tensor, nn

from dora_diffusion.functional import dora as f
from dora_diffusion.layers.blended import BlendedLayer
from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.injection import inject
from tests.tolerances import assert_close

LAYERS = {
    "linear": (lambda: nn.Linear(6, 10), (3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 10, bias=False), (3, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7)),
    "dilated conv": (lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2), (2, 4, 7, 7)),
    "grouped conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 7, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
}
KINDS = pytest.mark.parametrize("kind", LAYERS)


def theirs_on(base: nn.Module, *, rank: int, alpha: float, on_out: bool) -> LoConModule:
    module = LoConModule("layer", base, 1.0, rank, alpha, weight_decompose=True, wd_on_out=on_out)
    with torch.no_grad():
        module.lora_up.weight.normal_(generator=torch.Generator().manual_seed(1))
        module.dora_scale.mul_(1 + torch.rand(module.dora_scale.shape, generator=torch.Generator().manual_seed(2)))
    return module.double()


def setting(kind: str, *, on_out: bool) -> tuple[nn.Module, LoConModule, Tensor]:
    torch.manual_seed(0)
    base = LAYERS[kind][0]().double().requires_grad_(False)
    x = torch.randn(LAYERS[kind][1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return base, theirs_on(base, rank=2, alpha=3, on_out=on_out), x


@KINDS
def test_forward_and_every_gradient(kind: str) -> None:
    base, theirs, x = setting(kind, on_out=True)
    model = nn.Sequential(base)
    inject(model, DoRAConfig(rank=2, alpha=3, target_modules=["0"], norm_grad="exact"))
    adapter = model[0].adapter
    with torch.no_grad():
        adapter.down.copy_(theirs.lora_down.weight)
        adapter.up.copy_(theirs.lora_up.weight)
        adapter.magnitude.copy_(theirs.dora_scale.flatten())
    got, expected = model(x), theirs(x)
    assert_close(got, expected, computed_in=torch.float64)
    goal = torch.randn(got.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ours = torch.autograd.grad((got * goal).sum(), [adapter.down, adapter.up, adapter.magnitude])
    other = torch.autograd.grad(
        (expected * goal).sum(), [theirs.lora_down.weight, theirs.lora_up.weight, theirs.dora_scale]
    )
    assert_close([grad.flatten() for grad in ours], [grad.flatten() for grad in other], computed_in=torch.float64)


@KINDS
def test_the_in_axis_draws_as_theirs(kind: str) -> None:
    base, theirs, x = setting(kind, on_out=False)
    down, up = theirs.lora_down.weight.detach(), theirs.lora_up.weight.detach()
    form = f.gain_form(base.weight, down, up, 1.5, theirs.dora_scale.detach().flatten(), axis="in")
    blended = BlendedLayer(base)
    blended.set_terms([form])
    blended.set_strengths(torch.ones(1, dtype=torch.float64))
    assert_close(blended(x), theirs(x).detach(), computed_in=torch.float64)
    merged = theirs.get_merged_weight()[0].detach()
    assert_close(f.apply_gain_form(base.weight, form), merged.reshape(base.weight.shape), computed_in=torch.float64)
