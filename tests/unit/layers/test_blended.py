"""A blended layer draws with one mix from beginning to end, whatever happens to it meanwhile."""

import torch
from torch import nn

from dora_diffusion.functional.dora import GainForm, gain_form
from dora_diffusion.layers.blended import BlendedLayer
from tests.tolerances import assert_identical


def form(base: nn.Linear, rank: int, seed: int) -> GainForm:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, 6, generator=generator), torch.randn(4, rank, generator=generator)
    magnitude = base.weight.detach().norm(dim=1) * 1.5
    return gain_form(base.weight.detach(), down, up, 1.0, magnitude)


def test_adapters_that_come_in_the_middle_of_a_forward_wait_for_the_next() -> None:
    torch.manual_seed(0)
    base, x = nn.Linear(6, 4), torch.randn(3, 6)
    layer = BlendedLayer(base)
    layer.set_terms([form(base, 2, 1)])
    layer.set_strengths(torch.ones(1))
    expected = layer(x)

    def swap(*_: object) -> None:
        layer.set_terms([form(base, 3, 2), form(base, 1, 3)])
        layer.set_strengths(torch.ones(2))

    hook = base.register_forward_hook(swap)
    assert_identical(layer(x), expected)
    hook.remove()
    assert not torch.allclose(layer(x), expected)
