"""What training starts from: an adapter that exists, in any format, put into the layers that are trained.

The function is that of the file. A lower rank is filled up with a pair whose product is zero, another scale goes into
B, and a LoRA in a DoRA run gets the magnitudes that its own weights have. Where a layer cannot hold what the file has
(a higher rank, magnitudes of the in axis), the nearest is sought, and how near it is is told.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.adapters.files import AdapterReader
from dora_diffusion.adapters.matching import kind_in_words
from dora_diffusion.conversion import Report, resize, to_out_axis
from dora_diffusion.formats import place_of, read_header
from dora_diffusion.formats.outline import file_entries, folder_entries, outline
from dora_diffusion.formats.reading import FAMILY_KEY, take_apart
from dora_diffusion.functional.dora import row_norms
from dora_diffusion.layers.injection import Injection
from dora_diffusion.pipelines.base_weights import weights_of
from dora_diffusion.pipelines.modules import PipelineModules
from dora_diffusion.state import AdapterState, Module, ModuleState, WeightOf, rank_in_words
from dora_diffusion.training.config import AdapterConfig
from dora_diffusion.utils.text import shown_path


@dataclass(frozen=True)
class Start:
    """An adapter to start from, as the pipeline spells its layers.

    Attributes:
        file: where it lies.
        kind: "DoRA", "LoRA", "LoHa" ...
        modules: layer, component first -> its pair, fp32.
        dropped: tensors of the file that belong to no layer.
    """

    file: Path
    kind: str
    modules: Mapping[str, Module]
    dropped: int = 0


def outline_of(file: Path, family: str) -> AdapterState:
    """An adapter as its header alone tells it, its tensors without numbers, for a plan.

    Raises:
        ValueError: one line that names the file.
    """
    place = place_of(file)
    entries, metadata = folder_entries(place) if place.is_dir() else file_entries(read_header(place))
    shapes = {key: shape for key, (_, shape) in entries.items()}
    try:
        return outline(entries, metadata, take_apart(shapes, {FAMILY_KEY: family, **metadata}))[0]
    except ValueError as error:
        raise ValueError(f"{shown_path(place)}: {error}") from None


def plan_start(injections: Mapping[str, Injection], adapter: AdapterConfig, family: str) -> str | None:
    """What `install` will say, but for how near a start of other ranks is; None without one; errors likewise."""
    if adapter.start is None:
        return None
    try:
        found = outline_of(adapter.start, family)
    except ValueError as error:
        raise ValueError(f"adapter.start: {error}") from None
    layers = _layers(injections)
    live = {path.replace(".text_model.", ".", 1): path for path in layers}
    modules = {live.get(path, path): module for path, module in found.modules.items()}
    start = Start(adapter.start, kind_in_words(found), modules, len(found.extra))
    _check(start, layers, injections, adapter)
    return describe(start, layers, {})


def read_start(pipe: Any, adapter: AdapterConfig) -> Start | None:
    """The adapter that a config starts from, read beside its base before anything is injected; None without one.

    Raises:
        ValueError: one line: it cannot be read, is of another base, or is a kind that this run does not train.
    """
    if adapter.start is None:
        return None
    file, modules = adapter.start, PipelineModules(pipe)
    try:
        found, fitted, _ = AdapterReader(pipe, modules, weights_of(pipe)).read(file, "adapter.start", strict=True)
    except ValueError as error:
        raise ValueError(f"adapter.start: {error}") from None
    if fitted.vectors:
        raise ValueError(
            f"adapter.start: {shown_path(file)} adds to {len(fitted.vectors)} biases or normalisations, "
            f"{min(fitted.vectors)} first, which are not trained; put it in base.adapters"
        )
    return Start(file, kind_in_words(found), fitted.modules, len(found.extra))


@torch.no_grad()
def install(start: Start, pipe: Any, injections: Mapping[str, Injection], adapter: AdapterConfig) -> str:
    """Put a start into what was injected; what was done, on one line.

    Raises:
        ValueError: one line: the file has layers that are not trained, or magnitudes in a run that trains none.
    """
    layers = _layers(injections)
    _check(start, layers, injections, adapter)
    weights = weights_of(pipe)
    errors: dict[str, float] = {}
    for path, module in start.modules.items():
        component, _, inner = path.partition(".")
        held, error = _held(path, module.as_pair(), layers[path], weights)
        errors |= error
        _put(held, injections[component], inner, weights(path))
    return describe(start, layers, errors)


def _layers(injections: Mapping[str, Injection]) -> dict[str, int]:
    """Every layer that is trained, component first -> its rank."""
    return {f"{name}.{path}": rank for name, part in injections.items() for path, rank in part.matched.items()}


def _check(
    start: Start, layers: Mapping[str, int], injections: Mapping[str, Injection], adapter: AdapterConfig
) -> None:
    """Refuse a file with layers that would be lost, for the config does not train them, and a DoRA in a LoRA run."""
    name, lost = shown_path(start.file), [path for path in start.modules if path not in layers]
    if lost:
        component = lost[0].partition(".")[0]
        key = "adapter.train_text_encoder" if component.startswith("text_encoder") else "adapter.train_unet"
        mend = "widen adapter.target_modules" if component in injections else f"set {key} to true"
        raise ValueError(
            f"adapter.start: {len(lost)} of {len(start.modules)} layers of {name} are not trained here, "
            f"{', '.join(lost[:3])} first; {mend}, or put the file in base.adapters"
        )
    if not adapter.use_dora and any(module.magnitude is not None for module in start.modules.values()):
        raise ValueError(
            f"adapter.start: {name} is a DoRA, and adapter.use_dora is false; set it true, or make a LoRA of the file "
            "first: dora-diffusion convert --lora"
        )


def _held(path: str, module: ModuleState, rank: int, weights: WeightOf) -> tuple[ModuleState, dict[str, float]]:
    """A module as a layer of a rank can hold it, and by how much it misses, where it does."""
    errors: dict[str, float] = {}

    def note(report: Report) -> None:
        errors.update(report.errors)

    adapter = AdapterState({path: module})
    if module.magnitude is not None and module.axis == "in":
        adapter = to_out_axis(adapter, base=weights, rank=rank, report=note)
    elif module.rank > rank:
        adapter = resize(adapter, rank=rank, base=weights, report=note)
    return adapter.modules[path].to(dtype=torch.float32).as_pair(), errors


def _put(module: ModuleState, injection: Injection, path: str, weight: Tensor) -> None:
    """A pair and its magnitude in place of a layer's own; of a higher rank, the layer keeps what its product lacks."""
    own = injection.named_tensors()
    down, up, magnitude = (own.get(f"{path}.{name}") for name in ("down", "up", "magnitude"))
    assert down is not None and up is not None
    scale, rank = injection.scale(path), module.rank
    down[:rank] = module.down.reshape(-1, *down.shape[1:])
    up[:, :rank] = (module.up if module.scale == scale else module.up * (module.scale / scale)).reshape(
        up.shape[0], -1, *up.shape[2:]
    )
    if magnitude is None:
        return
    # of a LoRA: by the very operations of the layer, so that every gain is exactly 1
    magnitude.copy_(row_norms(weight, down, up, scale) if module.magnitude is None else module.magnitude)


def describe(start: Start, layers: Mapping[str, int], errors: Mapping[str, float]) -> str:
    """What was started from, and how near the start is to it; `layers`: those that are trained -> their rank."""
    had = rank_in_words([module.rank for module in start.modules.values()])
    now = rank_in_words([layers[path] for path in start.modules])
    parts = [f"{start.file.name}: {start.kind}, {len(start.modules)} layers", had if had == now else f"{had} in {now}"]
    if errors:
        worst, mean = max(errors, key=lambda path: errors[path]), sum(errors.values()) / len(errors)
        parts.append(
            f"{len(errors)} layers are only near it: relative error {mean:.2g} on average, {errors[worst]:.2g} at most "
            f"({worst})"
        )
    if fresh := len(layers) - len(start.modules):
        parts.append(f"{fresh} layers start fresh")
    if start.dropped:
        parts.append(f"{start.dropped} tensors of no layer are left out")
    return "; ".join(parts)
