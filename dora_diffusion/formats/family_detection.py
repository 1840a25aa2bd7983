"""Which family an adapter is for: told by the names of its layers, by their sizes, then by the file's metadata.

Nothing is guessed. A family stays in question while every adapted layer is one of its own. Where several stay, those
whose published models have these very sizes are left; where none has, names alone count if the model is a tiny one.
What the metadata say chooses among those that are left, and never another. What a family's files look like is its
`Signature`; nothing here knows any.
"""

import contextlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from dora_diffusion.families import FAMILIES, family_named
from dora_diffusion.families.record import Family
from dora_diffusion.families.signature import PartSignature, PublishedSize, Signature
from dora_diffusion.formats.json_metadata import json_object
from dora_diffusion.formats.layouts import LAYOUTS
from dora_diffusion.state import AdapterState, Module, ModuleState


@dataclass(frozen=True)
class _Layer:
    """What a layer of an adapter tells, with None for what it does not."""

    path: str
    inputs: int | None = None
    is_convolution: bool | None = None


# No published model is as narrow: a model of these names that is, is a small one made for tests. One that is not, and
# has other sizes than all that are known, is another model.
_NARROWEST = 320
FAMILY_KEY = "dora_diffusion.family"


@dataclass(frozen=True)
class FamilyEvidence:
    """Which family an adapter is for, and what says so.

    Attributes:
        family: its name; None where several are left, or none.
        evidence: in words.
    """

    family: str | None
    evidence: str


def family_of(adapter: AdapterState) -> str | None:
    """The name of the family that an adapter is for, or None where its layers and its metadata leave several."""
    return family_evidence(adapter).family


def family_evidence(adapter: AdapterState) -> FamilyEvidence:
    """The family that an adapter is for, with what tells it, or what leaves it open."""
    if _is_lookalike(adapter.metadata):
        return FamilyEvidence(None, "its metadata name another model, which has layers of these names and sizes")
    layers = _layers(adapter)
    own = family_named(adapter.metadata.get(FAMILY_KEY))
    if own is not None and has_paths(own.signature, _paths_in(layers)):
        # a flat pair may be a convolution's or a linear layer's: shapes say less than who wrote it
        return FamilyEvidence(own.name, f"as was told: {FAMILY_KEY}, --family")
    named = [family for family in FAMILIES if not adapter.families or family.name in adapter.families]
    fitting = [family for family in named if _fits(family.signature, layers)]
    # of another text encoder's size, a denoiser is what it is all the same
    denoiser = {part: found for part, found in layers.items() if not part.startswith("text_encoder")}
    whole = [family for family in fitting if _is_published(family.signature, layers)]
    exact = whole or [family for family in fitting if denoiser and _is_published(family.signature, denoiser)]
    left = [family.name for family in exact or fitting]
    if len(left) == 1 and exact:
        of = "" if whole or len(layers) == len(denoiser) else " of its denoiser"
        return FamilyEvidence(left[0], f"certain: names, sizes and blocks{of} are those of no other model known here")
    if len(left) == 1 and _is_tiny(layers):
        return FamilyEvidence(left[0], "by names alone: it is smaller than any published model")
    return _as_told(left, told_families(adapter.metadata))


def _as_told(left: Sequence[str], told: Collection[str]) -> FamilyEvidence:
    """What metadata choose of the families that layers leave."""
    names = f"{', '.join(left[:-1])} or {left[-1]}" if len(left) > 1 else "".join(left)
    chosen = [name for name in left if name in told]
    by_layers = f"{names} {'fit' if len(left) > 1 else 'fits'}"
    if len(chosen) == 1:
        rest = f"by its layers {by_layers}" if len(left) > 1 else "its sizes are no published model's"
        return FamilyEvidence(chosen[0], f"as its metadata say; {rest}")
    if not left:
        return FamilyEvidence(None, "no model known here has layers of these names")
    if len(left) == 1:
        return FamilyEvidence(None, f"its names are {names}'s, in sizes that no published one has")
    return FamilyEvidence(None, by_layers)


def fitting_families(adapter: AdapterState) -> list[str]:
    """The families that have every layer of an adapter by name, whatever its sizes."""
    paths = _paths_in(_layers(adapter))
    return [family.name for family in FAMILIES if has_paths(family.signature, paths)]


def strange_layer(adapter: AdapterState) -> str | None:
    """A layer that the family which knows most of an adapter does not know; None where one knows all."""
    layers = [(part, layer.path) for part, found in _layers(adapter).items() for layer in found]
    strange = [[f"{part}.{path}" for part, path in layers if not _knows(family, part, path)] for family in FAMILIES]
    fewest: list[str] = min(strange, key=len)
    return fewest[0] if fewest else None


def _knows(family: Family, component: str, path: str) -> bool:
    part = family.signature.parts.get(component)
    return part is not None and has_path(part, path)


def has_paths(signature: Signature, paths: Mapping[str, Iterable[str]]) -> bool:
    """Whether layers have a family's names: component -> their paths."""
    if not paths.keys() <= signature.parts.keys():
        return False
    return all(has_path(signature.parts[component], path) for component, found in paths.items() for path in found)


def has_path(part: PartSignature, path: str) -> bool:
    """Whether a layer has a name of a component's."""
    return _paths(part).fullmatch(path) is not None


def is_published(part: PartSignature, inputs: Mapping[str, int | None]) -> bool:
    """Whether a published model has all these layers: path -> its input features, None for any."""
    return _has_sizes(part, [_Layer(path, width) for path, width in inputs.items()])


def _layers(adapter: AdapterState) -> dict[str, list[_Layer]]:
    """The adapted layers by component."""
    found: dict[str, list[_Layer]] = {}
    for path, module in adapter.modules.items():
        component, _, inner = path.partition(".")
        found.setdefault(component, []).append(_layer(inner.removeprefix("text_model."), module))
    for path in adapter.vectors:
        component, _, inner = path.rpartition(".")[0].partition(".")
        found.setdefault(component, []).append(_Layer(inner.removeprefix("text_model.")))
    return found


def _paths_in(layers: Mapping[str, list[_Layer]]) -> dict[str, list[str]]:
    return {part: [layer.path for layer in found] for part, found in layers.items()}


def _layer(path: str, module: Module) -> _Layer:
    if isinstance(module, ModuleState):
        return _Layer(path, module.down.shape[1], module.down.dim() == 4)
    # a flat factorisation does not say whether the weight has taps
    is_convolution = module.factors["diff"].dim() == 4 if "diff" in module.factors else None
    return _Layer(path, module.shape[1] or None, is_convolution)  # 0 where only the base tells


def _fits(signature: Signature, layers: Mapping[str, list[_Layer]]) -> bool:
    """Whether every layer has a name of this family's."""
    if not has_paths(signature, _paths_in(layers)):
        return False
    return all(_convolves(signature.parts[part], layer) for part, found in layers.items() for layer in found)


def _convolves(part: PartSignature, layer: _Layer) -> bool:
    """Whether a projection around attention is the convolution or the linear layer that it should be."""
    is_projection = layer.path.endswith((".proj_in", ".proj_out")) and part.convolves is not None
    return not is_projection or layer.is_convolution in (None, part.convolves)


def _is_published(signature: Signature, layers: Mapping[str, list[_Layer]]) -> bool:
    """Whether a published model of the family has all these layers, in these sizes."""
    return all(_has_sizes(signature.parts[component], found) for component, found in layers.items())


def _has_sizes(part: PartSignature, layers: Sequence[_Layer]) -> bool:
    return any(all(_has_size(size, layer) for layer in layers) for size in part.sizes)


def _is_tiny(layers: Mapping[str, list[_Layer]]) -> bool:
    return all((layer.inputs or 0) < _NARROWEST for found in layers.values() for layer in found)


def _has_size(size: PublishedSize, layer: _Layer) -> bool:
    if size.layout and all(known.name != size.layout or known.of_path(layer.path) is None for known in LAYOUTS):
        return False
    for pattern, count in size.blocks.items():
        block = _expression(f"{pattern}(.*|)").fullmatch(layer.path)
        if block and int(block[1][:6]) >= count:
            return False
    if layer.inputs is None:
        return True
    widths = (width for pattern, width in size.inputs.items() if _expression(pattern).fullmatch(layer.path))
    return next(widths, None) in (None, layer.inputs)


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    """A signature's pattern as an expression whose groups are the numbers."""
    literal = re.escape(pattern.replace("(", "(?:"))
    for escaped, meant in ((r"\(\?:", "(?:"), (r"\|", "|"), (r"\)", ")"), (r"\#", r"(\d+)"), (r"\*", ".*")):
        literal = literal.replace(escaped, meant)
    return re.compile(literal)


def _paths(part: PartSignature) -> re.Pattern[str]:
    return _expression("|".join(part.paths))


def told_families(metadata: Mapping[str, str]) -> frozenset[str]:
    """The families that the metadata allow: our own note, else all that tools say, so far as they agree."""
    own = metadata.get(FAMILY_KEY, "")
    if any(family.name == own for family in FAMILIES):
        return frozenset({own})
    said = [_called(name) for name in _model_names(metadata)]
    return frozenset.intersection(*filter(None, said)) if any(said) else frozenset()


def _called(name: str) -> frozenset[str]:
    """The families that a tool may mean by a name."""
    return frozenset(family.name for family in FAMILIES if re.match(family.signature.called, name))


def _is_lookalike(metadata: Mapping[str, str]) -> bool:
    """Whether the metadata name a model that has the layers of a family, and is another."""
    others = [family.signature.lookalikes for family in FAMILIES if family.signature.lookalikes]
    return any(re.match(other, name) for other in others for name in _model_names(metadata))


def _model_names(metadata: Mapping[str, str]) -> list[str]:
    """What Stability's modelspec, kohya's and OneTrainer's metadata call the base, as words joined by hyphens.

    `stable-diffusion-xl-v1-base/lora` and `org/FLUX.1-dev` are two names each.
    """
    names = [metadata.get("modelspec.architecture", ""), metadata.get("ss_base_model_version", "")]
    with contextlib.suppress(ValueError):  # another tool's note is no part of the adapter
        names.append(str(json_object(metadata.get("ot_config", "{}"), "ot_config").get("model_type", "")))
    pieces = [piece for name in names for piece in name[:200].lower().split("/")]
    return [re.sub(r"[^a-z0-9]+", "-", piece).strip("-") for piece in pieces]
