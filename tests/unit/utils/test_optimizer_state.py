"""What an optimiser keeps comes back bit for bit: moments, codes of 8 bits, numbers, values of groups."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dora_diffusion.utils.atomic import load_tensors, save_tensors
from dora_diffusion.utils.optimizer_state import OptimizerState, group_settings, load_optimizer_state, optimizer_state
from tests.tolerances import assert_identical

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


class EstimatesItsRate(torch.optim.Optimizer):
    """As Prodigy does: what it has learnt of the rate lies in the groups."""

    def __init__(self, groups) -> None:
        super().__init__(groups, {"lr": 1.0, "d": 1e-3, "k": 0, "seen": torch.zeros(()), "growth": 1.1})

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            group["seen"] = group["seen"] + sum(float(parameter.grad.abs().sum()) for parameter in group["params"])
            group["d"] = group["d"] * group["growth"] + 1e-4 * float(group["seen"]) / group["k"]
            for parameter in group["params"]:
                parameter.data -= group["lr"] * group["d"] * parameter.grad


class CodesOfEightBits(torch.optim.Optimizer):
    """As bitsandbytes does: moments in uint8 beside their scale, steps as a number, all in a mapping of its own."""

    def __init__(self, groups) -> None:
        super().__init__(groups, {"lr": 1e-2})

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(step=0, codes=torch.full(parameter.shape, 128, dtype=torch.uint8), scale=1.0)
                moment = (state["codes"].float() - 128) / 128 * state["scale"] * 0.9 + parameter.grad
                state["step"] += 1
                state["scale"] = float(moment.abs().max())
                state["codes"] = (moment / state["scale"] * 127 + 128).to(torch.uint8)
                state["half"] = moment.half()
                parameter.data -= group["lr"] * moment + 1e-3 * state["half"].float() / state["step"]


class KeepsAMapping(CodesOfEightBits):
    """As bitsandbytes of today does: what is of 8 bits is wrapped when it is saved."""

    def state_dict(self) -> dict[str, object]:
        whole = super().state_dict()
        wrapped = {i: {"step": kept["step"], "wrapped": _without(kept, "step")} for i, kept in whole["state"].items()}
        return {**whole, "state": wrapped, "version": 2}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        assert state_dict["version"] == 2
        opened = {i: {"step": kept["step"], **kept["wrapped"]} for i, kept in state_dict["state"].items()}
        codes = {i: kept["codes"] for i, kept in opened.items()}
        super().load_state_dict({"state": opened, "param_groups": state_dict["param_groups"]})
        for index, parameter in enumerate(parameter for group in self.param_groups for parameter in group["params"]):
            self.state[parameter]["codes"] = codes[index]
            self.state[parameter]["half"] = opened[index]["half"]


def _without(mapping: dict[str, object], name: str) -> dict[str, object]:
    return {key: value for key, value in mapping.items() if key != name}


def from_library(module: str, name: str, **options: object) -> Make:
    def make(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        library = pytest.importorskip(module)
        return getattr(library, name)(parameters, **options)

    return make


OPTIMISERS: dict[str, Make] = {
    "a rate that it estimates": EstimatesItsRate,
    "codes of 8 bits": CodesOfEightBits,
    "a mapping of its own": KeepsAMapping,
    "AdamW": lambda parameters: torch.optim.AdamW(
        [{"params": parameters[:1], "lr": 1e-2}, {"params": parameters[1:], "lr": 3e-3, "weight_decay": 0.0}]
    ),
    "AdamW amsgrad": lambda parameters: torch.optim.AdamW(parameters, amsgrad=True),
    "torch's Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
    "Adafactor": from_library("transformers.optimization", "Adafactor", lr=1e-2, relative_step=False),
    "Prodigy": from_library("prodigyopt", "Prodigy"),
    "schedule-free": from_library("schedulefree", "AdamWScheduleFree", lr=1e-2),
    "Lion": from_library("lion_pytorch", "Lion", lr=1e-2),
    "CAME": from_library("came_pytorch", "CAME", lr=1e-2, betas=(0.9, 0.99, 0.999)),
}


def begun(make: Make) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    parameters = [torch.nn.Parameter(torch.ones(64, 80)), torch.nn.Parameter(torch.zeros(5))]
    optimizer = make(parameters)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return parameters, optimizer


def train(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Deterministic steps: the gradient depends on the step's number and on the parameters."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = parameter.detach() * 0.1 + torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def through_files(state: OptimizerState, folder: Path) -> OptimizerState:
    save_tensors(state.tensors, folder / "optimizer.safetensors")
    (folder / "values.json").write_text(json.dumps(state.values))
    tensors = load_tensors(folder / "optimizer.safetensors")
    return OptimizerState(tensors, json.loads((folder / "values.json").read_text()))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_values_in_groups_and_dtypes_of_an_optimiser_come_back_and_it_goes_on_bit_for_bit(tmp_path, name) -> None:
    whole, of_whole = begun(OPTIMISERS[name])
    told_whole = group_settings(of_whole)
    train(whole, of_whole, range(10))
    first, of_first = begun(OPTIMISERS[name])
    told = group_settings(of_first)
    train(first, of_first, range(6))
    saved = through_files(optimizer_state(of_first, told=told), tmp_path)
    second, of_second = begun(OPTIMISERS[name])
    with torch.no_grad():
        for new, old in zip(second, first, strict=True):
            new.copy_(old)
    load_optimizer_state(of_second, saved)
    back = optimizer_state(of_second, told=told)
    assert_identical(back.tensors, optimizer_state(of_first, told=told).tensors)
    assert back.values == optimizer_state(of_first, told=told).values
    assert {key: type(value) for key, value in back.values.items()} == {
        key: type(value) for key, value in optimizer_state(of_first, told=told).values.items()
    }
    train(second, of_second, range(6, 10))
    assert_identical(second, whole)
    ended, expected = optimizer_state(of_second, told=told), optimizer_state(of_whole, told=told_whole)
    assert_identical(ended.tensors, expected.tensors)
    assert ended.values == expected.values


def test_settings_that_an_optimiser_is_told_are_those_of_now() -> None:
    """Accepted changes, of weight decay for one, count."""
    parameters, optimizer = begun(lambda given: torch.optim.AdamW(given, lr=1e-2, weight_decay=0.1))
    told = group_settings(optimizer)
    train(parameters, optimizer, range(2))
    saved = optimizer_state(optimizer, told=told)
    assert not [name for name in (*saved.tensors, *saved.values) if name.startswith("group.")]
    _, other = begun(lambda given: torch.optim.AdamW(given, lr=1e-3, weight_decay=0.2))
    load_optimizer_state(other, saved)
    assert [(group["lr"], group["weight_decay"]) for group in other.param_groups] == [(1e-3, 0.2)]


def test_a_state_that_is_put_back_later_undoes_what_the_groups_have_become() -> None:
    """As the guard does: at the beginning the groups are as they were told, and nothing is noted of them."""
    parameters, optimizer = begun(EstimatesItsRate)
    told = group_settings(optimizer)
    first = optimizer_state(optimizer, told=told)
    assert not first.tensors and not first.values
    train(parameters, optimizer, range(3))
    assert optimizer.param_groups[0]["k"] == 3
    load_optimizer_state(optimizer, first, told=told)
    again = optimizer_state(optimizer, told=told)
    assert (optimizer.param_groups[0]["k"], optimizer.param_groups[0]["d"]) == (0, 1e-3)
    assert not again.tensors and not again.values


def test_what_cannot_be_saved_is_refused_and_not_lost() -> None:
    parameters, optimizer = begun(lambda given: torch.optim.SGD(given, lr=0.1, momentum=0.9))
    train(parameters, optimizer, range(1))
    optimizer.state[parameters[0]]["history"] = [torch.ones(1)]
    with pytest.raises(ValueError, match=r"^SGD: keeps 0\.history as list, which a checkpoint cannot hold"):
        optimizer_state(optimizer)
    del optimizer.state[parameters[0]]["history"]
    optimizer.state["shared"] = {"d": 1.0}
    with pytest.raises(ValueError, match="SGD: keeps state of 'shared'"):
        optimizer_state(optimizer)


def test_the_state_of_more_parameters_than_there_are_is_refused() -> None:
    parameters, optimizer = begun(lambda given: torch.optim.AdamW(given))
    train(parameters, optimizer, range(1))
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(64, 80))])
    with pytest.raises(ValueError, match="of 2 parameters or more, expected at most 1"):
        load_optimizer_state(other, optimizer_state(optimizer))


def test_a_state_of_something_else_is_refused() -> None:
    _, optimizer = begun(lambda given: torch.optim.AdamW(given))
    with pytest.raises(ValueError, match="AdamW: knows nothing of weight"):
        load_optimizer_state(optimizer, OptimizerState({"weight.deep": torch.ones(1)}, {}))


def test_a_state_from_before_values_were_kept_is_read() -> None:
    parameters, optimizer = begun(lambda given: torch.optim.AdamW(given))
    train(parameters, optimizer, range(3))
    tensors: dict[str, Tensor] = {
        f"{index}.{name}": value
        for index, kept in optimizer.state_dict()["state"].items()
        for name, value in kept.items()
    }
    _, other = begun(lambda given: torch.optim.AdamW(given))
    load_optimizer_state(other, OptimizerState(tensors, {}))
    assert_identical(optimizer_state(other).tensors, tensors)
