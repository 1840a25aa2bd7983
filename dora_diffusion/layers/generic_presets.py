"""Presets for models that no family's record knows: which layers are attention is told by names and classes.

A layer belongs to attention when a module that it lies in says so: by its own name (`attn1`, `self_attn`, `attention`)
or by its class's (`FluxAttention`, `GPT2Attention`). Blocks that hold attention beside other things, such as
`CrossAttnDownBlock2D` or the lists called `attentions`, say it of what they hold and do not count.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from torch import nn

from dora_diffusion.layers.base_layers import LINEAR, Base, check_adaptable, kind_of

_NAME = re.compile(r"(?:.*_)?attn(?:_?\d+|_layer|_op)?|(?:.*_)?attention(?:_?\d+|_layer|_op)?", re.IGNORECASE)
_CLASS = re.compile(r".*(?:Attention|Attn)(?:\d|Layer|Module)?", re.IGNORECASE)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def _attention(model: nn.Module) -> list[str]:
    """Linear layers inside modules that are attention."""
    says = {path for path, module in model.named_modules() if path and _is_attention(path, module)}
    return [path for path in _linear(model) if any(parent in says for parent in _parents(path))]


def _linear(model: nn.Module) -> list[str]:
    """Every linear layer but the one that gives an LLM's words."""
    return [path for path, layer in _layers(model) if kind_of(layer) is LINEAR]


def _all(model: nn.Module) -> list[str]:
    """Every layer that can carry an adapter, but for that one and for tables and layers that share one weight."""
    return [path for path, _ in _layers(model)]


GENERIC: Mapping[str, Callable[[nn.Module], list[str]]] = {
    "attention": _attention,
    "all-linear": _linear,
    "all": _all,
}
"""Preset -> the paths of a model's layers in it, in the model's order."""


def _layers(model: nn.Module) -> Iterator[tuple[str, Base]]:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        if not path or module is output or not _is_adaptable(path, module):
            continue
        if owners[id(module._parameters.get("weight"))] < 2:  # an adapter on one of two would be folded into both
            yield path, module


def _is_adaptable(path: str, module: nn.Module) -> bool:
    try:
        check_adaptable(path, module)
    except ValueError:
        return False
    return True


def is_named_attention(path: str) -> bool:
    """Whether a layer lies in attention by the names in its path alone, where no model is at hand."""
    return any(_NAME.fullmatch(name) for name in path.split(".")[:-1])


def _is_attention(path: str, module: nn.Module) -> bool:
    if isinstance(module, _CONTAINERS):
        return False
    name = path.rpartition(".")[2]
    return _NAME.fullmatch(name) is not None or _CLASS.fullmatch(type(module).__name__) is not None


def _parents(path: str) -> Iterator[str]:
    while path := path.rpartition(".")[0]:
        yield path
