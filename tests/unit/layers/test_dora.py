"""What a DoRALayer does beside its mathematics: zero rows, precision, dropout, frozen magnitudes, masters."""

import pytest
import torch
from torch import nn

from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.injection import inject
from tests.kinds import KINDS, disturb, make_input, make_model, reference
from tests.tolerances import assert_close, assert_identical

CONFIG = {"rank": 2, "alpha": 3, "target_modules": ["layer"]}


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped", "embedding"])
@pytest.mark.parametrize("norm_grad", ["detached", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_rows_are_told_once_and_adapt_as_lora(kind: str, norm_grad: str, dtype: torch.dtype) -> None:
    model, x = make_model(kind, dtype=dtype), make_input(kind, dtype)
    weight = model.layer.weight.detach()
    (weight.T if kind == "embedding" else weight)[1] = 0
    plain = model(x)
    with pytest.warns(UserWarning, match="^1 rows of 1 layers .layer first. are zero") as caught:
        injection = inject(model, DoRAConfig(**CONFIG, norm_grad=norm_grad))
    assert len(caught) == 1
    assert_identical(model(x), plain)
    disturb(model.layer)
    gain = model.layer.gain()
    assert gain[1] == 1
    assert bool((gain[torch.arange(len(gain)) != 1] != 1).all())
    model(x).float().square().sum().backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in injection.parameters())
    assert model.layer.adapter.magnitude.grad[1] == 0
    assert model.layer.adapter.up.grad[1].abs().max() > 0


def test_a_row_that_the_adapter_cancels_exactly_is_finite() -> None:
    model = make_model("linear")
    injection = inject(model, DoRAConfig(rank=1, alpha=1, target_modules=["layer"], norm_grad="exact"))
    with torch.no_grad():
        model.layer.adapter.down.copy_(-model.layer.base.weight[2:3])
        model.layer.adapter.up[2] = 1
    out = model(make_input("linear"))
    out.square().sum().backward()
    assert bool(torch.isfinite(out).all())
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in injection.parameters())


@pytest.mark.parametrize("norm_grad", ["detached", "exact"])
def test_gain_is_fp32_under_autocast(norm_grad: str) -> None:
    model = nn.Sequential(nn.Linear(64, 48))
    inject(model, DoRAConfig(rank=4, target_modules=["0"], norm_grad=norm_grad))
    disturb(model[0])
    expected = model[0].gain()
    with torch.autocast("cpu", torch.bfloat16):
        got = model[0].gain()
        assert model(torch.randn(2, 64)).dtype == torch.bfloat16
    assert got.dtype == torch.float32
    assert_identical(got, expected)


@KINDS
def test_dropout_acts_on_the_low_rank_branch_only(kind: str) -> None:
    model, x = make_model(kind), make_input(kind)
    inject(model, DoRAConfig(**CONFIG, dropout=0.5))
    plain = model.layer.base(x)
    model.train()
    assert_identical(model(x), plain)  # nothing to drop yet: whatever is dropped, the base stays whole
    disturb(model.layer)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert_identical(model(x), model(x))
    assert_close(model(x), reference(model.layer, x))


@KINDS
def test_dropout_near_0_trains_as_none(kind: str) -> None:
    answers = []
    for dropout in (0.0, 1e-9):
        model, x = make_model(kind), make_input(kind)
        injection = inject(model, DoRAConfig(**CONFIG, dropout=dropout))
        disturb(model.layer)
        out = model.train()(x)
        answers.append([out, *torch.autograd.grad(out.square().sum(), injection.parameters())])
    assert_close(*answers)


@KINDS
def test_a_frozen_magnitude_does_not_train_and_keeps_no_activation(kind: str) -> None:
    kept = {}
    for train_magnitude in (True, False):
        model, x = make_model(kind), make_input(kind)
        injection = inject(model, DoRAConfig(**CONFIG, train_magnitude=train_magnitude))
        disturb(model.layer)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, into=saved: into.append(t.numel()), lambda t: t):
            out = model(x)
        kept[train_magnitude] = sum(saved)
        count = 3 if train_magnitude else 2
        assert len(injection.parameters()) == count
        assert len(injection.named_parameters()) == 3
        assert len(injection.magnitudes()) == count - 2
    assert kept[True] - kept[False] >= out.numel()
    assert_close(out, reference(model.layer, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_stay_fp32_when_the_model_is_cast(dtype: torch.dtype) -> None:
    model = make_model("linear")
    injection = inject(model, DoRAConfig(**CONFIG, init="pissa"))
    disturb(model.layer)
    before = {name: tensor.clone() for name, tensor in injection.named_tensors().items()}
    model.to(dtype)
    assert model.layer.base.weight.dtype == dtype
    assert_identical(injection.named_tensors(), before)
    model.double()
    assert {tensor.dtype for tensor in injection.named_tensors().values()} == {torch.float64}


def test_a_model_on_the_meta_device_can_be_injected() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 32), nn.Conv2d(4, 4, 3))
    injection = inject(model, DoRAConfig(rank=4, target_modules=["0", "1"]))
    assert sum(parameter.numel() for parameter in injection.parameters()) == 4 * 96 + 32 + 4 * 40 + 4


@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own ways
def test_a_compiled_layer_trains_as_an_eager_one() -> None:
    answers = []
    for is_compiled in (False, True):
        model, x = make_model("linear"), make_input("linear")
        injection = inject(model, DoRAConfig(**CONFIG, norm_grad="exact"))
        disturb(model.layer)
        call = torch.compile(model, backend="aot_eager") if is_compiled else model
        answers.append(list(torch.autograd.grad(call(x).square().sum(), injection.parameters())))
    assert_close(*answers)
