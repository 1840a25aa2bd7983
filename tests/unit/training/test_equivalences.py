"""Two ways to the same gradients: checkpointing or not, small batches or a big one; and what patterns decide."""

import pytest
import torch
from torch import Tensor

from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.injection import Injection, inject
from tests.pocket_random import random_pocket_pipeline
from tests.tolerances import assert_close, assert_identical

NORM_GRADS = pytest.mark.parametrize("norm_grad", ["detached", "exact"])


@pytest.fixture(scope="module")
def unet():
    return random_pocket_pipeline().unet.train()


@pytest.fixture
def injected(unet, request):
    """The UNet with an adapter on its convolutions too, away from its start."""
    injection = inject(unet, DoRAConfig(rank=2, target_modules="all", norm_grad=request.param))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for up in injection.ups():
            up.copy_(0.1 * torch.randn(up.shape, generator=generator))
    yield injection
    unet.disable_gradient_checkpointing()
    injection.eject()


def inputs(count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(count, 8, 8, 8, generator=generator)
    return latents, torch.linspace(1, 900, count), torch.randn(count, 5, 256, generator=generator)


def gradients(unet, injection: Injection, parts: list[slice]) -> list[Tensor]:
    """Of the mean loss over all samples, taken part by part."""
    latents, timesteps, text = inputs(4)
    for parameter in injection.parameters():
        parameter.grad = None
    for part in parts:
        loss = unet(latents[part], timesteps[part], text[part]).sample.square().mean()
        (loss * len(latents[part]) / 4).backward()
    return [parameter.grad.clone() for parameter in injection.parameters()]


@pytest.mark.parametrize("injected", ["detached", "exact"], indirect=True)
@pytest.mark.parametrize("keeps", [True, False])
def test_checkpointing_and_accumulation_change_nothing(unet, injected, keeps: bool) -> None:
    whole = gradients(unet, injected, [slice(0, 4)])
    assert min(float(grad.abs().max()) for grad in whole) > 0
    if keeps:
        injected.keep_norms()
    assert_close(gradients(unet, injected, [slice(0, 1), slice(1, 4)]), whole)
    unet.enable_gradient_checkpointing()
    assert_close(gradients(unet, injected, [slice(0, 4)]), whole)


def test_patterns_give_layers_their_rank_and_alpha(unet) -> None:
    config = DoRAConfig(
        rank=4,
        alpha=8,
        use_rslora=True,
        rank_pattern={"mid_block.*to_k": 16, "to_k": 2},
        alpha_pattern={"to_out.0": 1.0},
    )
    injection = inject(unet, config)
    try:
        for path, rank in injection.matched.items():
            expected = 16 if "mid_block" in path and path.endswith("to_k") else 2 if path.endswith("to_k") else 4
            assert rank == expected, path
            alpha = 1.0 if path.endswith("to_out.0") else 8.0
            assert injection.state().modules[path].scale == pytest.approx(alpha / rank**0.5)
        assert {16, 2, 4} == set(injection.matched.values())
    finally:
        injection.eject()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank_pattern": {"to_nowhere": 4}}, "rank_pattern: 'to_nowhere' decides for none of the"),
        ({"alpha_pattern": {"to_k": 4.0, "attn1.to_k": 2.0}}, "alpha_pattern: 'attn1.to_k' decides for none"),
        ({"rank_pattern": {"to_k[": 4}}, "rank_pattern: .* is no regular expression"),
        ({"rank_pattern": {"to_k": 0}}, "rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be a positive number, got 0"),
        ({"alpha_pattern": {"to_k": float("nan")}}, "alpha must be a positive number, got nan"),
        ({"init": "magic"}, "init must be one of default, gaussian, orthogonal, pissa, got 'magic'"),
        ({"norm_grad": "none"}, "norm_grad must be one of detached, exact"),
    ],
)
def test_settings_that_do_nothing_or_cannot_be_are_refused_in_one_line(unet, settings, message: str) -> None:
    before = [id(module) for module in unet.modules()]
    with pytest.raises(ValueError, match=message) as caught:
        inject(unet, DoRAConfig(**settings))
    assert "\n" not in str(caught.value)
    assert [id(module) for module in unet.modules()] == before


def test_eject_leaves_no_hook_and_gives_back_what_trained(unet) -> None:
    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in unet.modules()]

    before, weights = hooks(), {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    trained = [parameter.requires_grad for parameter in unet.parameters()]
    injection = inject(unet, DoRAConfig(rank=2, target_modules="all", init="pissa"))
    injection.keep_norms()
    latents, timesteps, text = inputs(1)
    unet(latents, timesteps, text).sample.sum().backward()
    torch.optim.AdamW(injection.parameters(), lr=1.0).step()
    injection.eject()
    assert hooks() == before
    assert [parameter.requires_grad for parameter in unet.parameters()] == trained
    assert_identical(unet.state_dict(), weights)
