"""Which layers of two models are compared, and which vectors beside them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dora_diffusion.families import FAMILIES, Component, ends_with
from dora_diffusion.formats.base_checkpoint import open_checkpoint
from dora_diffusion.layers.generic_presets import is_named_attention
from dora_diffusion.layers.targets import named_paths
from dora_diffusion.pipelines.base_weights import BaseWeights, base_weights, is_table, local_base
from dora_diffusion.pipelines.components import adaptable_models, as_pipeline, is_pipeline

_PRESETS = ("attention", "all-linear", "all")


def source_of(model: Any) -> BaseWeights:
    """A model's weights: of all that `base_weights` takes, of a mapping of tensors, or of a function.

    A mapping's keys are paths of parameters, component first, with or without `.weight` for layers. A function knows
    no list of layers.
    """
    if isinstance(model, Mapping):
        return _of_mapping(model)
    if callable(model) and not isinstance(model, BaseWeights) and not is_pipeline(model):
        return BaseWeights("a function", model, model, _no_list)
    return base_weights(model)


def layers_of(source: BaseWeights, targets: str | Sequence[str] | None) -> tuple[str, ...]:
    """The layers of a model that `targets` names: a preset, ends of paths, or a regular expression as in `DoRAConfig`.

    Raises:
        ValueError: nothing is matched.
    """
    if targets is not None and not isinstance(targets, str) and source.paths is _no_list:
        return tuple(targets)
    paths = source.paths()
    if targets is None or targets in _PRESETS:
        found = _of_preset(source, "attention" if targets is None else str(targets))
    else:
        found = tuple(named_paths(paths, targets, owner=source.name, inner=lambda path: path.partition(".")[2]))
    if not found:
        raise ValueError(f"target_modules={targets!r} matches none of the {len(paths)} layers of {source.name}")
    return found


def vectors_of(model: Any) -> tuple[str, ...]:
    """The paths of a model's parameters with one dimension: biases, and weights of normalisations."""
    if isinstance(model, Mapping):
        return tuple(path for path, tensor in model.items() if tensor.dim() == 1)
    if isinstance(model, str | Path):
        checkpoint = open_checkpoint(local_base(model))
        places = ((name, checkpoint.find(name)) for name in checkpoint.names())
        return tuple(dict.fromkeys(name for name, place in places if place is not None and len(place.shape) == 1))
    if not is_pipeline(model):
        raise ValueError("vectors: expected a pipeline, a folder, a file or a mapping to list them; got a function")
    return tuple(_vectors_of_pipeline(model))


def _vectors_of_pipeline(pipe: Any) -> Iterable[str]:
    for name, model in adaptable_models(as_pipeline(pipe)).items():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 1:
                yield f"{name}.{path.removeprefix('text_model.')}"


def _of_mapping(tensors: Mapping[str, Tensor]) -> BaseWeights:
    def at(path: str) -> Tensor:
        found = tensors.get(path, tensors.get(f"{path}.weight"))
        if found is None:
            raise ValueError(f"{path} is not among the {len(tensors)} tensors given")
        return found

    # where layers are spelt out as parameters, what is no weight is a table that no layer has
    ending = ".weight" if any(path.endswith(".weight") for path in tensors) else ""
    matrices = tuple(
        path.removesuffix(ending)
        for path, tensor in tensors.items()
        if path.endswith(ending) and tensor.dim() in (2, 4)
    )
    return BaseWeights("a mapping", at, at, lambda: matrices)


def _no_list() -> tuple[str, ...]:
    raise ValueError("a function does not list its layers: name them in full in target_modules")


def _of_preset(source: BaseWeights, preset: str) -> tuple[str, ...]:
    inner: dict[str, list[str]] = {}
    for path in source.paths():
        component, _, rest = path.partition(".")
        inner.setdefault(component, []).append(rest)
    return tuple(f"{name}.{path}" for name, rest in inner.items() for path in _named(source, name, rest, preset))


def _named(source: BaseWeights, name: str, paths: Sequence[str], preset: str) -> list[str]:
    """The layers of a component in a preset: by its family's record, or by their names where none knows them."""
    component = _component(name, paths)
    if component is not None:
        return [path for path in paths if _ends(path, component.presets[preset])]
    if preset == "attention":
        return [path for path in paths if is_named_attention(path)]
    if preset == "all-linear":
        return [path for path in paths if not is_table(path) and source.weight(f"{name}.{path}").dim() == 2]
    return list(paths)


def _component(name: str, paths: Sequence[str]) -> Component | None:
    """The first family's component of that name whose record names every one of these layers."""
    for part in (part for family in FAMILIES for part in family.components if part.name == name):
        known = (*part.presets["all"], *part.outside)
        if all(_ends(path, known) for path in paths):
            return part
    return None


def _ends(path: str, endings: Iterable[str]) -> bool:
    return any(ends_with(path, ending) for ending in endings)
