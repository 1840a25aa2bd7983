"""Tensors and metadata of an adapter file -> AdapterState, whatever tool wrote it.

Keys are taken apart, layers located, their parts put together, fused layers split. What belongs to no layer is kept.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.formats.assembly import Assembled, Hints, assemble
from dora_diffusion.formats.bias_vectors import split_vector
from dora_diffusion.formats.family_detection import FAMILY_KEY as FAMILY_KEY
from dora_diffusion.formats.family_detection import told_families
from dora_diffusion.formats.fused_layers import split
from dora_diffusion.formats.json_metadata import json_object
from dora_diffusion.formats.keys import WIDENED, Key, parse_keys
from dora_diffusion.formats.layer_lookup import Locate, Place, locate
from dora_diffusion.formats.other_models import other_model
from dora_diffusion.formats.peft_alphas import Scales
from dora_diffusion.formats.weight_shapes import weight_shape
from dora_diffusion.functional.dora import Axis
from dora_diffusion.state import AdapterState, Module, WeightOf
from dora_diffusion.utils.text import shown

_MOST_HALVES = 200
_IDLE = ("alpha", "dora_scale", "magnitude", "rescale", "on_input", WIDENED)  # parts that by themselves change nothing
AXIS_KEY = "dora_diffusion.magnitude_axis"
OVER_BASE_KEY = "dora_diffusion.magnitudes_over_base_norms"
"""Of whom the file was made for: a tool that divides magnitudes per output by N(W), where the paper has N(W + D)."""


@dataclass(frozen=True)
class Reading:
    """The layers of a file.

    Attributes:
        keys: key -> what it says, of those that are an adapter's.
        places: name of a layer, as the file spells it -> where it lies.
    """

    keys: Mapping[str, Key]
    places: Mapping[str, Place]

    @property
    def families(self) -> tuple[str, ...]:
        """The only families that call the layers so; empty for any."""
        return next((place.families for place in self.places.values() if place.families), ())

    def is_known(self, key: str) -> bool:
        """Whether a key belongs to a layer that was found."""
        return key in self.keys and self.keys[key].name in self.places


def take_apart(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str], find: Locate | None = None) -> Reading:
    """Keys of a file and their tensors' shapes, from its header alone; `find` says where layers lie in place of us."""
    parsed = parse_keys(shapes)
    _check_halves(parsed.values())
    if parsed and all(found.part in _IDLE for found in parsed.values()):
        raise ValueError(f"none of its {len(shapes)} tensors changes a layer, such as {shown(next(iter(parsed)))}")
    layers: dict[str, dict[str, Sequence[int]]] = {}
    for key, found in parsed.items():
        layers.setdefault(found.name, {})[found.part] = shapes[key]
    names = {name: weight_shape(parts) for name, parts in layers.items()}
    if find is not None:
        return Reading(parsed, find(names))
    if (model := other_model(names)) is not None:
        raise ValueError(
            f"a {model} adapter, by its makers' names; no {model} is drawn here: load it into a pipeline of that "
            "model, AdapterManager(pipe).load_adapter"
        )
    return Reading(parsed, locate(names, told=told_families(metadata)))


def _check_halves(keys: Iterable[Key]) -> None:
    """A ValueError for a file in which pairs lack a half by the hundred, before its layers are looked up."""
    downs = {key.name for key in keys if key.part == "down"}
    ups = {key.name for key in keys if key.part == "up"}
    if len(halves := downs ^ ups) > _MOST_HALVES:
        raise ValueError(f"{len(halves)} layers lack half of their pair, such as {shown(min(halves))}")


def read(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    reading: Reading,
    weight_of: WeightOf | None = None,
) -> AdapterState:
    """Tensors of a file -> AdapterState; `origin` is left empty.

    Args:
        tensors: by key.
        metadata: the file's.
        reading: its keys, taken apart.
        weight_of: path of a layer -> the base's weight, where a base is at hand; asked only when nothing else tells
            the axis of a magnitude.

    Raises:
        ValueError: half a pair, shapes that do not fit, malformed metadata, a layer twice, an axis that nothing tells.
    """
    scales, axis, is_over_base = Scales(metadata), told_axis(metadata), OVER_BASE_KEY in metadata
    modules: dict[str, Module] = {}
    vectors: dict[str, Tensor] = {}
    extra = {key: tensor for key, tensor in tensors.items() if not reading.is_known(key)}
    for name, keys in _by_layer(reading).items():
        place = reading.places[name]
        found = assemble(
            name,
            {part: tensors[key] for part, key in keys.items()},
            lambda rank, path=place.paths[0]: scales.of(path, rank),  # type: ignore[misc]
            Hints(axis, partial(_base_weight, place, weight_of), is_over_base),
        )
        extra.update({keys[part]: tensors[keys[part]] for part in found.spare})
        _put(modules, _modules(place, found))
        _put(vectors, _vectors(place, found))
    kept = {key: text for key, text in metadata.items() if key != OVER_BASE_KEY}
    return AdapterState(modules, kept, vectors, extra, families=reading.families)


def _by_layer(reading: Reading) -> dict[str, dict[str, str]]:
    """Layer -> part -> key."""
    layers: dict[str, dict[str, str]] = {}
    for key, found in reading.keys.items():
        if found.name in reading.places:
            parts = layers.setdefault(found.name, {})
            if found.part in parts:
                raise ValueError(f"{key} and {parts[found.part]} are both the {found.part} of one layer")
            parts[found.part] = key
    return layers


def _put(have: dict[str, Any], more: Mapping[str, Any]) -> None:
    if both := have.keys() & more.keys():
        raise ValueError(f"{min(both)}: the file holds this layer twice, under two names")
    have.update(more)


def _modules(place: Place, found: Assembled) -> dict[str, Module]:
    if found.module is None:
        return {}
    pieces = split(place.fusion, found.module)
    return {f"{place.component}.{path}": module for path, module in pieces.items()}


def _vectors(place: Place, found: Assembled) -> dict[str, Tensor]:
    return {
        f"{place.component}.{path}.{kind}": piece
        for kind, vector in (("weight", found.weight), ("bias", found.bias))
        if vector is not None
        for path, piece in split_vector(place.fusion, vector.reshape(-1)).items()
    }


def _base_weight(place: Place, weight_of: WeightOf | None) -> Tensor | None:
    """The base's weight as the file's makers have it: a fused layer's pieces one upon another, halves in its order."""
    if weight_of is None:
        return None
    weight = torch.cat([weight_of(path) for path in place.paths])
    swaps = weight.dim() > 1 and place.fusion.swaps(weight.shape[0], weight[0].numel())
    return torch.cat(weight.chunk(2)[::-1]) if swaps else weight


def as_stored(path: str) -> Tensor:
    """A `base` of whose weights nothing is known: beside it magnitudes are read as a file stores them."""
    return torch.empty(0, device="meta")


def told_axis(metadata: Mapping[str, str]) -> Axis | None:
    """What the metadata say of magnitudes: our own note, LyCORIS' arguments, OneTrainer's settings."""
    own = metadata.get(AXIS_KEY)
    if own in ("out", "in"):
        return "out" if own == "out" else "in"
    for key, names in (
        ("ss_network_args", ("wd_on_output", "wd_on_out")),
        ("ot_config", ("lora_decompose_output_axis",)),
    ):
        try:
            settings = json_object(metadata.get(key, "{}"), key)
        except ValueError:  # another tool's note is no part of the adapter
            continue
        said = [settings[name] for name in names if name in settings]
        if said:
            return "out" if str(said[0]).lower() in ("true", "1") else "in"
    return None


def with_origin(adapter: AdapterState, origin: str) -> AdapterState:
    """The same adapter, said to come from a format."""
    return replace(adapter, origin=origin)
