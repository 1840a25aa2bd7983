"""Every class of denoiser has a tiny one that computes, is the same at every call, and hears its attention."""

import re

import pytest
import torch
from torch import Tensor, nn

from tests.denoisers import DENOISERS, TinyDenoiser, prediction

ATTENTION = re.compile(r"(^|\.)(to_q|q_proj|to_query|to_qkv_mlp_proj|img_qkv_proj)$")
pytestmark = [  # of diffusers' own models
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
]
each = pytest.mark.parametrize("name", DENOISERS)


@torch.no_grad()
def outputs(model: nn.Module, denoiser: TinyDenoiser) -> list[Tensor]:
    """Every tensor that the model's forward returns."""
    return [prediction(model(**denoiser.inputs()))]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    """Bitwise."""
    return len(some) == len(others) and all(map(torch.equal, some, others))


@each
def test_prediction_is_finite_and_the_same_at_every_call(name: str) -> None:
    denoiser = DENOISERS[name]
    model = denoiser.make()
    with torch.no_grad():
        first, second = (prediction(model(**denoiser.inputs())) for _ in range(2))
    assert first.is_floating_point() and first.isfinite().all()
    assert torch.equal(first, second)


@each
def test_two_makes_are_equal_and_leave_the_random_state(name: str) -> None:
    before = torch.get_rng_state()
    first, second = DENOISERS[name].make(), DENOISERS[name].make()
    assert torch.equal(torch.get_rng_state(), before)
    assert type(first).__name__ == name and not first.training
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}
    assert same(list(first.state_dict().values()), list(second.state_dict().values()))


@each
def test_attention_layers_change_what_is_predicted(name: str) -> None:
    """The first one and the last one; a model of two modalities ends with a layer that only the second one hears."""
    denoiser = DENOISERS[name]
    model = denoiser.make()
    before = outputs(model, denoiser)
    layers = [
        module for path, module in model.named_modules() if ATTENTION.search(path) and isinstance(module, nn.Linear)
    ]
    for layer in (layers[0], layers[-1]):
        weight = layer.weight.detach().clone()
        layer.weight.data.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
        after = outputs(model, denoiser)
        layer.weight.data.copy_(weight)
        assert not same(before, after)
    assert same(before, outputs(model, denoiser))
