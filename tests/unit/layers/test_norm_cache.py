"""`keep_norms`, `refresh_norms`: a norm a layer and optimiser step, and never an old one, whatever changed."""

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer
from torch.utils.checkpoint import checkpoint

from dora_diffusion.functional import dora as functional
from dora_diffusion.layers import dora as layers
from dora_diffusion.layers import injection as injection_module
from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.injection import Injection, inject
from dora_diffusion.layers.step_counter import StepClock
from tests.tolerances import assert_identical

NORM_GRADS = pytest.mark.parametrize("norm_grad", ["detached", "exact"])
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def make(norm_grad: str = "detached", *, keeps: bool = True) -> tuple[nn.Module, Injection]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    injection = inject(model, DoRAConfig(rank=2, target_modules=["0", "2"], norm_grad=norm_grad))
    with torch.no_grad():
        for up in injection.ups():
            up.copy_(torch.randn(up.shape))
    if keeps:
        injection.keep_norms()
    return model, injection


def step(model: nn.Module, optimizer) -> list[Tensor]:
    """Forward, backward, step; what a stale norm would spoil: the answer and the gradients."""
    out = model(X)
    out.square().sum().backward()
    grads = [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
    optimizer.step()
    optimizer.zero_grad()
    return [out.detach(), *grads]


class DataSGD(torch.optim.Optimizer):
    """Updates through `.data`, as many third-party optimisers do: no version changes."""

    def __init__(self, parameters, *, replaces: bool) -> None:
        super().__init__(parameters, {})
        self.replaces = replaces

    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if self.replaces:
                    p.data = p.data - 0.05 * p.grad
                else:
                    p.data.add_(p.grad, alpha=-0.05)


OPTIMIZERS: dict[str, Callable] = {
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "one by one": lambda p: torch.optim.SGD(p, lr=0.05, foreach=False),
    "through data": lambda p: DataSGD(p, replaces=False),
    "new data": lambda p: DataSGD(p, replaces=True),
}


@NORM_GRADS
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_equals_that_without_a_cache(name: str, norm_grad: str) -> None:
    runs = []
    for keeps in (False, True):
        model, injection = make(norm_grad, keeps=keeps)
        optimizer = OPTIMIZERS[name](injection.parameters())
        runs.append([part for _ in range(4) for part in step(model, optimizer)])
        injection.eject()
    assert_identical(*runs)


def _through_data(injection: Injection) -> None:
    for parameter in injection.parameters():
        parameter.data = parameter.data * 1.5


def _in_place(injection: Injection) -> None:
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.mul_(1.5)


def _load(injection: Injection) -> None:
    other = make(keeps=False)[1]
    _in_place(other)
    injection.load(other.state())


def _rescale(injection: Injection) -> None:
    for layer in injection._layers.values():
        layer.adapter.scale *= 2


def _edit_base(injection: Injection) -> None:
    with torch.no_grad():
        for layer in injection._layers.values():
            layer.base.weight.mul_(torch.linspace(0.5, 2, layer.base.weight.shape[1]))


def _replace_base(injection: Injection) -> None:
    for layer in injection._layers.values():
        layer.base.weight.data = layer.base.weight.data * torch.linspace(0.5, 2, layer.base.weight.shape[1])


def _there_and_back(injection: Injection) -> None:
    injection._model.double().float()


def _forgotten(injection: Injection) -> None:
    for parameter in injection.parameters():
        parameter.data.mul_(1.5)  # no optimiser, no version, no address: only `forget_norms` can tell
    injection.forget_norms()


CHANGES = [_through_data, _in_place, _load, _rescale, _edit_base, _replace_base, _there_and_back, _forgotten]


@NORM_GRADS
@pytest.mark.parametrize("change", CHANGES)
def test_no_change_leaves_an_old_norm(change: Callable[[Injection], None], norm_grad: str) -> None:
    answers = []
    for keeps in (False, True):
        model, injection = make(norm_grad, keeps=keeps)
        before = model(X)
        change(injection)
        out = model(X)
        answers.append([before, out, *torch.autograd.grad(out.square().sum(), injection.parameters())])
        injection.eject()
    assert_identical(*answers)
    if change is not _there_and_back:
        assert not torch.equal(answers[0][0], answers[0][1])


@NORM_GRADS
def test_an_ema_swapped_in_through_data_for_a_drawing_is_what_is_drawn(norm_grad: str) -> None:
    model, injection = make(norm_grad)
    model(X)  # the norm of the raw parameters is kept
    raw = [parameter.data.clone() for parameter in injection.parameters()]
    for parameter in injection.parameters():
        parameter.data.copy_(parameter.data * 0.7)
    with torch.no_grad():
        drawn = model(X)
    averaged = injection.state()
    for parameter, value in zip(injection.parameters(), raw, strict=True):
        parameter.data.copy_(value)
    trained = model(X)
    injection.eject()
    fresh, other = make(norm_grad, keeps=False)
    assert_identical(trained, fresh(X))
    other.load(averaged)
    assert_identical(drawn, fresh(X))


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Grows by one whenever a layer reads its base's weight for a norm."""
    calls: list[int] = []
    real = layers.row_sums

    def counting(weight: Tensor, down: Tensor):
        calls.append(1)
        return real(weight, down)

    monkeypatch.setattr(layers, "row_sums", counting)
    return calls


@NORM_GRADS
def test_a_norm_is_taken_once_a_step_with_micro_batches_and_checkpointing(norm_grad: str, counted) -> None:
    model, injection = make(norm_grad)
    optimizer = torch.optim.AdamW(injection.parameters(), lr=0.01, fused=True)
    for _ in range(3):
        for _ in range(3):
            checkpoint(model, X.clone().requires_grad_(), use_reentrant=False).square().sum().backward()
        optimizer.step()
    assert len(counted) == 3 * 2  # steps x layers
    injection.eject()


def test_without_keep_norms_every_forward_takes_its_own(counted) -> None:
    model, _ = make(keeps=False)
    for _ in range(3):
        model(X)
    assert len(counted) == 3 * 2


@pytest.fixture
def own_clock(monkeypatch) -> StepClock:
    """A clock that no other test listens to."""
    clock = StepClock()
    monkeypatch.setattr(layers, "CLOCK", clock)
    monkeypatch.setattr(injection_module, "CLOCK", clock)
    return clock


def test_the_hook_goes_with_the_last_injection(own_clock: StepClock) -> None:
    hooks = torch_optimizer._global_optimizer_post_hooks
    before = len(hooks)
    first, second = make()[1], make()[1]
    first.keep_norms()  # twice is once
    assert len(hooks) == before + 1
    first.eject()
    assert len(hooks) == before + 1
    second.eject()
    assert len(hooks) == before
    model, injection = make()
    assert own_clock.now is not None
    del model, injection  # a model that is forgotten without eject takes its listener along
    gc.collect()
    assert own_clock.now is None
    assert len(hooks) == before


@pytest.mark.parametrize("original_goes", [True, False])
def test_a_deep_copy_trains_as_the_original_would(original_goes: bool) -> None:
    model, injection = make()
    model(X)
    twin = copy.deepcopy(model)
    if original_goes:
        injection.eject()
    parameters = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, fused=True)
    got = [part for _ in range(3) for part in step(twin, optimizer)]
    plain, other = make(keeps=False)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.05, fused=True)
    assert_identical(got, [part for _ in range(3) for part in step(plain, optimizer)])
    injection.eject()
    other.eject()


def test_moving_or_casting_a_model_forgets_its_norms() -> None:
    """A base that goes to bf16 and back may come to lie where it lay, with other values: addresses cannot tell."""
    model, injection = make()
    model(X)
    assert all(layer._kept is not None for layer in injection._layers.values())
    model.bfloat16().float()
    assert all(layer._kept is None for layer in injection._layers.values())
    injection.eject()


def refreshed_step(model: nn.Module, injection: Injection, optimizer) -> list[Tensor]:
    """A step whose norms are taken beforehand, with a forward without gradients before and after it."""
    injection.refresh_norms()
    with torch.no_grad():
        before = model(X)
    got = step(model, optimizer)
    with torch.no_grad():
        return [before, *got, model(X)]


@NORM_GRADS
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_with_refreshed_norms_equals_that_without_a_cache(name: str, norm_grad: str) -> None:
    runs = []
    for refreshes in (False, True):
        model, injection = make(norm_grad, keeps=False)
        optimizer = OPTIMIZERS[name](injection.parameters())
        if not refreshes:
            injection.refresh_norms = lambda: None
        runs.append([part for _ in range(4) for part in refreshed_step(model, injection, optimizer)])
        injection.eject()
    assert_identical(*runs)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_no_change_leaves_a_refreshed_norm(change: Callable[[Injection], None], trains: bool) -> None:
    answers = []
    for refreshes in (False, True):
        model, injection = make(keeps=False)
        if refreshes:
            injection.refresh_norms()
        with torch.set_grad_enabled(trains):
            before = model(X)
            change(injection)
            answers.append([before, model(X)])
        injection.eject()
    assert_identical(*answers)


@NORM_GRADS
def test_a_refreshed_step_waits_for_the_device_once(norm_grad: str, monkeypatch) -> None:
    waits: list[int] = []
    real = layers.rare_rows

    def counting(squared):
        waits.append(len(squared))
        return real(squared)

    for home in (layers, functional):
        monkeypatch.setattr(home, "rare_rows", counting)
    model, injection = make(norm_grad, keeps=False)
    optimizer = torch.optim.AdamW(injection.parameters(), lr=0.01)
    for _ in range(3):
        injection.refresh_norms()
        injection.refresh_norms()  # nothing is old
        for _ in range(2):
            checkpoint(model, X.clone().requires_grad_(), use_reentrant=False).square().sum().backward()
        with torch.no_grad():
            model(X)
        optimizer.step()
    assert [count for count in waits if count] == 3 * [2]  # steps, each with both layers
    injection.eject()


def test_refreshing_finds_rows_that_vanish_or_cancel() -> None:
    """Such rows are taken apart from the others, as the layer itself does."""
    answers = []
    for refreshes in (False, True):
        model, injection = make(keeps=False)
        with torch.no_grad():
            model[0].base.weight[1].zero_()
            adapter = model[2].adapter
            adapter.down.copy_(model[2].base.weight[:2] / adapter.scale)
            adapter.up.copy_(-torch.eye(5, 2))  # rows 0 and 1 of W + D are 0
        if refreshes:
            injection.refresh_norms()
        answers.append([model(X), *(layer.gain() for layer in injection._layers.values())])
        injection.eject()
    assert_identical(*answers)
    assert answers[1][1][1] == 1


compiles = pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself


@compiles
@NORM_GRADS
def test_a_compiled_step_is_one_graph(norm_grad: str) -> None:
    """`fullgraph` raises at the first break; and no step after the first compiles anything."""
    runs = []
    for is_compiled in (False, True):
        model, injection = make(norm_grad, keeps=False)
        optimizer = torch.optim.AdamW(injection.parameters(), lr=0.05)
        torch._dynamo.reset()
        ran = torch.compile(model, backend="aot_eager", fullgraph=True) if is_compiled else model
        outputs = []
        for number in range(4):
            injection.refresh_norms()
            with torch._dynamo.config.patch(error_on_recompile=number > 0):
                outputs += step(ran, optimizer)
        runs.append(outputs)
        injection.eject()
    assert_identical(*runs)


@compiles
def test_a_compiled_model_never_draws_with_an_old_norm() -> None:
    model, injection = make(keeps=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(injection.parameters(), lr=0.05)
    injection.refresh_norms()
    compiled(X).square().sum().backward()
    optimizer.step()  # not refreshed since
    assert_identical(compiled(X), model(X))
    twin = copy.deepcopy(model)
    injection.refresh_norms()
    assert all(layer._fresh is None for layer in twin.modules() if isinstance(layer, layers.DoRALayer))
    injection.eject()
