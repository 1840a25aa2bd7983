"""Every kind of layer: forward, gradients, blending and folding against the dense weight; what cannot be adapted."""

import pytest
import torch
from torch import nn

from dora_diffusion.functional import dora as f
from dora_diffusion.layers.base_layers import check_adaptable, check_shapes, dense_weight, logical_shape
from dora_diffusion.layers.blended import BlendedLayer
from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.fuse import fuse_weights
from dora_diffusion.layers.injection import inject
from dora_diffusion.state import ModuleState
from tests.kinds import KINDS, disturb, make_input, make_model, reference, with_weight
from tests.tolerances import TOLERANCES, assert_close, assert_identical

CONFIG = {"rank": 2, "alpha": 3, "target_modules": ["layer"]}
NORM_GRADS = pytest.mark.parametrize("norm_grad", ["detached", "exact"])


@KINDS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_dora", [True, False])
def test_first_forward_is_the_base_bit_for_bit(kind: str, bias: bool, dtype: torch.dtype, use_dora: bool) -> None:
    model, x = make_model(kind, bias=bias, dtype=dtype), make_input(kind, dtype)
    expected = model(x)
    inject(model, DoRAConfig(**CONFIG, use_dora=use_dora))
    assert_identical(model(x), expected)


@KINDS
@NORM_GRADS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("use_dora", [True, False])
def test_forward_and_gradients_are_those_of_the_dense_weight(kind, norm_grad, bias: bool, use_dora: bool) -> None:
    model = make_model(kind, bias=bias, dtype=torch.float64)
    injection = inject(model, DoRAConfig(**CONFIG, use_dora=use_dora, norm_grad=norm_grad))
    disturb(model.layer)
    x = make_input(kind, torch.float64)
    goal = torch.randn(model(x).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    wanted = [*injection.parameters(), *([x.requires_grad_()] if x.is_floating_point() else [])]
    if kind == "embedding":
        goal[x == model.layer.base.padding_idx] = 0
    expected = reference(model.layer, x, norm_grad=norm_grad)
    assert_close(model(x), expected, computed_in=torch.float64)
    got = torch.autograd.grad((model(x) * goal).sum(), wanted)
    assert_close(list(got), list(torch.autograd.grad((expected * goal).sum(), wanted)), computed_in=torch.float64)


@KINDS
def test_exact_gradients_pass_gradcheck(kind: str) -> None:
    model = make_model(kind, dtype=torch.float64)
    inject(model, DoRAConfig(**CONFIG, norm_grad="exact"))
    disturb(model.layer)
    adapter, x = model.layer.adapter, make_input(kind, torch.float64)

    def answer(down, up, magnitude):
        parts = {"layer.adapter.down": down, "layer.adapter.up": up, "layer.adapter.magnitude": magnitude}
        return torch.func.functional_call(model, parts, (x,))

    assert torch.autograd.gradcheck(answer, (adapter.down, adapter.up, adapter.magnitude))


@KINDS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength", [-0.5, 0.5, 1.0])
@pytest.mark.parametrize("use_dora", [True, False])
def test_blended_equals_folded_and_unfolds_bit_for_bit(kind, bias, dtype, strength, use_dora) -> None:
    model, x = make_model(kind, bias=bias, dtype=dtype), make_input(kind, dtype)
    injection = inject(model, DoRAConfig(**CONFIG, use_dora=use_dora))
    disturb(model.layer)
    state = injection.state().modules["layer"]
    base = injection.eject().layer
    before, address, plain = base.weight.clone(), base.weight.data_ptr(), base(x)
    blended = BlendedLayer(base)
    assert_identical(blended(x), plain)
    term = f.gain_form(dense_weight(base), state.down, state.up, state.scale, state.magnitude)
    blended.set_terms([term])
    blended.set_strengths(torch.tensor([strength]))
    drawn = blended(x)
    folded = fuse_weights({"layer": (base, f.scale_gain_form(term, strength))})
    expected = base(x).detach()
    folded.undo()
    size = float(expected.abs().max())
    torch.testing.assert_close(drawn / size, expected / size, rtol=0, atol=3 * TOLERANCES[dtype].absolute)
    assert_identical(base.weight, before)
    assert base.weight.data_ptr() == address
    blended.set_strengths(torch.tensor([0.0]))
    torch.testing.assert_close(blended(x), plain, rtol=0, atol=0)
    blended.set_terms([])
    assert_identical(blended(x), plain)


def test_a_fold_that_fails_half_way_changes_nothing() -> None:
    layers = [nn.Linear(6, 5), nn.Linear(6, 5)]
    before = [layer.weight.clone() for layer in layers]
    good = f.GainForm(torch.ones(5), torch.ones(5, 1), torch.ones(1, 6))
    bad = f.GainForm(torch.ones(5), torch.ones(5, 1), torch.ones(1, 7))
    with pytest.raises(RuntimeError):
        fuse_weights({"0": (layers[0], good), "1": (layers[1], bad)})
    assert_identical([layer.weight for layer in layers], before)


@pytest.mark.parametrize("kind", ["linear", "conv", "circular", "grouped", "depthwise", "conv1d", "conv3d"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mix", ["in", "in and lora", "in and out"])
def test_magnitudes_of_the_in_axis_draw_as_their_dense_weight(kind: str, bias: bool, mix: str) -> None:
    model, x = make_model(kind, bias=bias), make_input(kind)
    base, weight = model.layer, dense_weight(model.layer)
    generator = torch.Generator().manual_seed(0)
    expected, terms = weight.clone(), []
    for axis in {"in": ["in"], "in and lora": ["in", None], "in and out": ["in", "out"]}[mix]:
        down = torch.randn(2, *weight.shape[1:], generator=generator)
        up = 0.3 * torch.randn(len(weight), 2, *[1] * (weight.dim() - 2), generator=generator)
        magnitude = None
        if axis is not None:
            magnitude = f.initial_magnitude(weight if axis == "out" else weight.transpose(0, 1)) * 1.4
        terms.append(f.gain_form(weight, down, up, 0.7, magnitude, axis=axis or "out"))
        tuned = weight + 0.7 * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        if axis == "in":
            norm = tuned.transpose(0, 1).flatten(1).norm(dim=1)
            tuned = tuned * (magnitude / norm).reshape(1, -1, *[1] * (weight.dim() - 2))
        elif axis == "out":
            tuned = tuned * (magnitude / tuned.flatten(1).norm(dim=1)).reshape(-1, *[1] * (weight.dim() - 1))
        expected += 0.6 * (tuned - weight)
    blended = BlendedLayer(base)
    blended.set_terms(terms)
    blended.set_strengths(torch.tensor([0.6] * len(terms)))
    assert_close(blended(x), with_weight(base, expected, x).detach())


def test_a_padding_token_stays_what_it_is() -> None:
    model = make_model("embedding")
    injection = inject(model, DoRAConfig(**CONFIG))
    optimizer = torch.optim.SGD(injection.parameters(), lr=1.0)
    ids = torch.tensor([[3, 3, 1]])
    for _ in range(3):
        model(ids).square().sum().backward()
        optimizer.step()
    assert_identical(model(ids)[0, :2], torch.zeros(2, 5))


@pytest.mark.parametrize(
    "module, message",
    [
        (nn.LayerNorm(4), "expected nn.Linear, .* got LayerNorm"),
        (nn.MultiheadAttention(4, 2).out_proj, "reads this weight past the layer"),
        (nn.Embedding(4, 2, max_norm=1.0), "max_norm"),
        (nn.ConvTranspose2d(2, 2, 3), "got ConvTranspose2d"),
    ],
)
def test_what_cannot_be_adapted_is_named_in_one_line(module: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_adaptable("some.path", module)
    assert str(caught.value).startswith("some.path: ")
    assert "\n" not in str(caught.value)


@KINDS
def test_the_matrix_of_a_layer_has_the_shape_it_says(kind: str) -> None:
    base = make_model(kind).layer
    assert tuple(dense_weight(base).shape) == logical_shape(base)
    assert not dense_weight(base).requires_grad


@pytest.mark.parametrize(
    "down, up, magnitude, axis, message",
    [
        ((2, 7), (5, 2), None, "out", "do not fit a weight"),
        ((2, 6), (5, 3), None, "out", "do not fit a weight"),
        ((2, 6), (5, 2), 6, "out", r"expected \(5,\)"),
        ((2, 6), (5, 2), 5, "in", r"expected \(6,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(down, up, magnitude, axis, message: str) -> None:
    state = ModuleState(
        torch.zeros(down), torch.zeros(up), 1.0, None if magnitude is None else torch.ones(magnitude), axis=axis
    )
    with pytest.raises(ValueError, match=message):
        check_shapes("layer", state, nn.Linear(6, 5))


def test_an_embedding_takes_no_magnitudes_of_the_in_axis() -> None:
    state = ModuleState(torch.zeros(2, 11), torch.zeros(5, 2), 1.0, torch.ones(11), axis="in")
    with pytest.raises(ValueError, match="token ids"):
        check_shapes("layer", state, nn.Embedding(11, 5))
