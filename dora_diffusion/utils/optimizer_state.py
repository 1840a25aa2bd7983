"""An optimiser's state as tensors and plain values, bit for bit: what it keeps of each parameter, and of each group.

Some keep more than moments: Prodigy its estimate of the rate in the groups of parameters, 8-bit ones codes in uint8,
others plain numbers. All come back with the type that they had.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Groups = Sequence[Mapping[str, Any]]

_GROUP = "group"
_SET_BY_OTHERS = ("params", "lr")  # whatever sets the rates sets them anew at every step


@dataclass(frozen=True)
class OptimizerState:
    """What a checkpoint holds of an optimiser.

    Attributes:
        tensors: `INDEX.NAME` -> of a parameter, in the order of the optimiser's; `group.INDEX.NAME` -> of a group.
        values: the same names -> a number, a word, true, false or null.
    """

    tensors: Mapping[str, Tensor]
    values: Mapping[str, float | str | bool | None]


def group_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What its groups are told before the first step; what differs from it later, the optimiser changed itself."""
    groups = optimizer.state_dict()["param_groups"]
    return [{name: _copied(value) for name, value in group.items() if name not in _SET_BY_OTHERS} for group in groups]


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def optimizer_state(optimizer: Optimizer, *, told: Groups = ()) -> OptimizerState:
    """All that an optimiser keeps, but the settings that it was told.

    Args:
        optimizer: any of torch's kind.
        told: its `group_settings` from before the first step; without them its groups are left out.

    Raises:
        ValueError: it keeps something that is neither a tensor nor a plain value, which would be lost.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, float | str | bool | None] = {}
    for name, value in _leaves(_tree(optimizer, told)):
        if type(value) in (Tensor, torch.nn.Parameter):
            tensors[name] = value
        elif value is None or isinstance(value, (int, float, str, bool)):
            values[name] = value
        else:
            raise ValueError(
                f"{type(optimizer).__name__}: keeps {name} as {type(value).__name__}, which a checkpoint cannot hold; "
                "expected a tensor, a number or a word; choose another optimiser"
            )
    return OptimizerState(tensors, values)


def _tree(optimizer: Optimizer, told: Groups) -> dict[str, Any]:
    """Everything that is kept: that of the parameters, of the groups, and of the optimiser as a whole."""
    whole = optimizer.state_dict()
    kept, groups = whole.pop("state"), whole.pop("param_groups")
    changed = {
        str(index): {name: value for name, value in group.items() if _has_changed(name, value, before)}
        for index, (group, before) in enumerate(zip(groups, told, strict=False))
    }
    of_parameters = {
        str(index) if isinstance(index, int) else f"state of {index!r}": values if isinstance(index, int) else (values,)
        for index, values in kept.items()
    }
    return {**of_parameters, _GROUP: changed, **whole}


def _has_changed(name: str, value: Any, before: Mapping[str, Any]) -> bool:
    return name not in _SET_BY_OTHERS and not (name in before and _is_same(before[name], value))


def _leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What is not a mapping, under the names that lead to it."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and not any("." in str(inner) for inner in value):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _grown(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of such leaves."""
    tree: dict[str, Any] = {}
    for name, value in leaves.items():
        *path, last = name.split(".")
        branch = tree
        for step in path:
            branch = branch.setdefault(step, {})
        branch[last] = value
    return tree


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def load_optimizer_state(optimizer: Optimizer, state: OptimizerState, *, told: Groups = ()) -> None:
    """Put back what `optimizer_state` took; what an optimiser is told of its groups stays as it is told now.

    Args:
        optimizer: of the same kind and parameters.
        state: what was taken.
        told: its `group_settings` from before the first step, where it has taken steps since: what it changed itself
            and the state does not name is as it was told. One that is new needs none.

    Raises:
        ValueError: the state is another optimiser's, or of other parameters.
    """
    tree = _grown({**state.tensors, **state.values})
    now = optimizer.state_dict()
    groups = now["param_groups"]
    for place, group in enumerate(groups):
        if place < len(told):
            group |= {name: _copied(value) for name, value in told[place].items()}
        group |= tree.get(_GROUP, {}).get(str(place), {})
    kept = {int(place): values for place, values in tree.items() if place.isdigit()}
    whole = {name: value for name, value in tree.items() if not name.isdigit() and name != _GROUP}
    if strange := sorted(whole.keys() - now.keys()):
        raise ValueError(f"{type(optimizer).__name__}: knows nothing of {strange[0]}; expected its own state")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if kept and max(kept) >= len(parameters):
        raise ValueError(
            f"the optimiser's state is of {max(kept) + 1} parameters or more, expected at most {len(parameters)}"
        )
    optimizer.load_state_dict({"state": kept, "param_groups": groups, **whole})
    for index, values in kept.items():
        _restore_dtypes(optimizer.state[parameters[index]], values)


def _restore_dtypes(loaded: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Torch makes every tensor of a parameter's state of that parameter's dtype as it loads: undo it."""
    for name, value in values.items():
        now = loaded.get(name)
        if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
            loaded[name] = value.to(now.device)
