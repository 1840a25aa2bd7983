"""inject and eject: what is matched, what is refused, and that nothing is left behind."""

import pytest
import torch
from torch import nn

from dora_diffusion.layers.base_layers import dense_weight
from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.injection import inject
from dora_diffusion.layers.targets import target_paths
from tests.kinds import KINDS, disturb, make_input, make_model, with_weight
from tests.pocket_random import random_pocket_pipeline
from tests.tolerances import assert_identical


@pytest.fixture(scope="module")
def pipe():
    return random_pocket_pipeline()


def modules_of(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in model.named_modules()]


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("preset", [None, "attention", "all-linear", "all"])
def test_eject_leaves_the_very_same_modules_and_bytes(pipe, component: str, preset: str | None) -> None:
    model = getattr(pipe, component)
    before = modules_of(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    injection = inject(model, DoRAConfig(rank=2, target_modules=preset))
    assert injection.matched
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(1)
    assert injection.eject() is model
    assert modules_of(model) == before
    assert_identical(model.state_dict(), weights)


def test_presets_grow(pipe) -> None:
    counts = [len(target_paths(pipe.unet, p)) for p in ("attention", "all-linear", "all")]
    assert counts == sorted(set(counts))
    attention = [
        path
        for path, module in pipe.unet.named_modules()
        if isinstance(module, nn.Linear) and (".attn1." in path or ".attn2." in path)
    ]
    assert target_paths(pipe.unet, None) == attention


def test_targets_by_list_and_regular_expression(pipe) -> None:
    by_list = target_paths(pipe.unet, ["attn2.to_q"])
    by_regex = target_paths(pipe.unet, r".*attn2\.to_q")
    assert by_list == by_regex
    assert len(by_list) == sum(path.endswith("attn2.to_q") for path, _ in pipe.unet.named_modules())


@pytest.mark.parametrize(
    "targets, message",
    [
        (["to_q", "nowhere"], "'nowhere' matches no layer"),
        (r"never\d", "matches no layer"),
        ("attn[1", "no regular expression"),
        (["conv_norm_out"], "expected nn.Linear, .*, got GroupNorm"),
    ],
)
def test_bad_targets_are_named_and_change_nothing(pipe, targets, message: str) -> None:
    before = modules_of(pipe.unet)
    with pytest.raises(ValueError, match=message) as caught:
        inject(pipe.unet, DoRAConfig(target_modules=targets))
    assert "\n" not in str(caught.value)
    assert modules_of(pipe.unet) == before


def test_eject_gives_back_what_was_trainable_and_two_adapters_do_not_stack() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    injection = inject(model, DoRAConfig(rank=1, target_modules=["0"]))
    with pytest.raises(ValueError, match="holds an adapter already"):
        inject(model, DoRAConfig(rank=1, target_modules=["1"]))
    injection.eject()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_quantised_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised to torch.int8"):
        inject(model, DoRAConfig(rank=1, target_modules=["0"]))


def test_model_of_no_family_needs_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="name its layers in target_modules"):
        inject(model, DoRAConfig())
    assert inject(model, DoRAConfig(rank=1, target_modules=["0"])).matched == {"0": 1}


@pytest.mark.parametrize("rank, dropout", [(0, 0.0), (4, 1.0), (4, -0.1)])
def test_config_is_checked(rank: int, dropout: float) -> None:
    with pytest.raises(ValueError, match="rank|dropout"):
        DoRAConfig(rank=rank, dropout=dropout)


def test_only_the_adapter_trains_and_it_is_fp32_under_a_bf16_base(pipe) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(torch.bfloat16)
    injection = inject(model, DoRAConfig(rank=2, target_modules=["0"]))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"0.adapter.down", "0.adapter.up", "0.adapter.magnitude"}
    assert {parameter.dtype for parameter in injection.parameters()} == {torch.float32}


def test_magnitudes_move_under_a_bf16_base() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    injection = inject(model, DoRAConfig(rank=2, target_modules=["0"]))
    before = [magnitude.detach().clone() for magnitude in injection.magnitudes()]
    optimizer = torch.optim.SGD(injection.parameters(), lr=1e-5)
    model(torch.randn(8, 64, dtype=torch.bfloat16)).float().square().mean().backward()
    optimizer.step()
    moved = [(a != b).float().mean().item() for a, b in zip(injection.magnitudes(), before, strict=True)]
    assert min(moved) > 0.5


def adapted_weight(layer) -> torch.Tensor:
    """W' by the paper's equation."""
    a, weight = layer.adapter, dense_weight(layer.base)
    dense = weight + a.scale * (a.up.flatten(1) @ a.down.flatten(1)).reshape(weight.shape)
    if a.magnitude is None:
        return dense
    return dense * (a.magnitude / dense.flatten(1).norm(dim=1)).reshape(-1, *[1] * (weight.dim() - 1))


@KINDS
@pytest.mark.parametrize("use_dora", [True, False])
def test_at_a_strength_weights_are_so_far_on_the_way(kind: str, use_dora: bool) -> None:
    model, x = make_model(kind), make_input(kind)
    injection = inject(model, DoRAConfig(rank=2, target_modules=["layer"], use_dora=use_dora))
    layer = model.layer
    disturb(layer)
    weight = dense_weight(layer.base)
    with torch.no_grad():
        whole = model(x)
        for strength in (-1.0, 0.0, 0.5, 2.0):
            with injection.at_strength(strength):
                found = model(x)
            expected = with_weight(layer.base, weight + strength * (adapted_weight(layer) - weight), x)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(x), whole)


@KINDS
def test_row_changes_are_those_of_its_weight(kind: str) -> None:
    model = make_model(kind)
    injection = inject(model, DoRAConfig(rank=2, target_modules=["layer"]))
    assert not injection.row_changes()["layer"].angles.any()
    disturb(model.layer)
    found = injection.row_changes()["layer"]
    before, after = (
        each.detach().double().flatten(1) for each in (dense_weight(model.layer.base), adapted_weight(model.layer))
    )
    alive = before.norm(dim=1) > 1e-8  # an embedding's padding has no direction
    cosines = torch.nn.functional.cosine_similarity(before, after, dim=1)[alive]
    torch.testing.assert_close(found.angles, cosines.acos(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        found.stretches, (after.norm(dim=1) / before.norm(dim=1) - 1).abs()[alive], rtol=1e-3, atol=1e-5
    )
