"""AdapterState -> tensors and metadata of one safetensors file, in a dialect. The inverse of `reading`."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from dora_diffusion.families import family_named
from dora_diffusion.formats.assembly import parts_of
from dora_diffusion.formats.bias_vectors import fuse_vector
from dora_diffusion.formats.dialects import Dialect
from dora_diffusion.formats.family_detection import family_of, fitting_families, strange_layer
from dora_diffusion.formats.flat_names import flatten
from dora_diffusion.formats.fused_layers import fuse
from dora_diffusion.formats.keys import PEFT
from dora_diffusion.formats.layouts import LAYOUTS, Fusion, Layout
from dora_diffusion.formats.peft_alphas import METADATA_KEY, peft_config
from dora_diffusion.formats.reading import AXIS_KEY, FAMILY_KEY
from dora_diffusion.state import AdapterState, Module, ModuleState

_CLIP = re.compile(r"^(encoder\.layers|embeddings|final_layer_norm)\b")
_NORMS = re.compile(r"(norm|ln_|group_norm|layer_norm)[\w.]*$")


@dataclass(frozen=True)
class FileLayer:
    """A layer as the file has it.

    Attributes:
        key: without a part.
        component: of the pipeline.
        fusion: the layers of diffusers' that it is.
    """

    key: str
    component: str
    fusion: Fusion

    def of(self, found: Mapping[str, Module]) -> dict[str, Module]:
        """The modules of this layer, by path without the component."""
        return {path: found[f"{self.component}.{path}"] for path in self.fusion.paths if self._has(found, path)}

    @property
    def paths(self) -> tuple[str, ...]:
        """Of all layers that it is, component first, adapted or not."""
        return tuple(f"{self.component}.{path}" for path in self.fusion.paths)

    def is_held(self, found: Mapping[str, Module], dialect: Dialect) -> bool:
        """Whether a dialect has a spelling for what its layers come to: path with component -> module."""
        try:
            parts = parts_of(self.key, fuse(self.fusion, self.of(found)), dialect.suffixes)
        except ValueError:
            return False
        return all(dialect.suffixes.spell(self.key, part) is not None for part in parts)

    def vectors(self, found: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
        """Its vectors of a kind, "weight" or "bias"."""
        paths = {path: f"{self.component}.{path}.{kind}" for path in self.fusion.paths}
        return {path: found[key] for path, key in paths.items() if key in found}

    def _has(self, found: Mapping[str, Module], path: str) -> bool:
        return f"{self.component}.{path}" in found


def write(adapter: AdapterState, dialect: Dialect) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file.

    Raises:
        ValueError: one line with what the format cannot hold, and what to do.
    """
    family = family_of(adapter)
    _check_components(adapter, dialect, family)
    tensors: dict[str, Tensor] = {}
    for layer in file_layers(adapter, dialect, family):
        for part, tensor in _parts(layer, adapter, dialect).items():
            key = dialect.suffixes.spell(layer.key, part)
            if key is None:
                raise ValueError(
                    f"{layer.key}: the {dialect.name} format cannot hold its {part}; use lycoris, kohya or comfyui"
                )
            tensors[key] = tensor
    if both := tensors.keys() & adapter.extra.keys():
        raise ValueError(f"{min(both)}: a tensor kept from the file it came from has the key of a layer")
    return {**tensors, **adapter.extra}, _metadata(adapter, dialect, family)


def _check_components(adapter: AdapterState, dialect: Dialect, family: str | None) -> None:
    for component in adapter.components:
        if dialect.prefix(component, family) is None:
            raise ValueError(
                f"the {dialect.name} format has no name for {component} of {family or 'an unknown family'}; "
                "choose another format"
            )


def file_layers(adapter: AdapterState, dialect: Dialect, family: str | None) -> list[FileLayer]:
    """The layers that a dialect writes of an adapter.

    Raises:
        ValueError: one line with what it has no name for.
    """
    paths = list(dict.fromkeys([*adapter.modules, *(key.rpartition(".")[0] for key in adapter.vectors)]))
    of_path = _original_names(paths, adapter, dialect, family)
    layers: dict[str, FileLayer] = {}
    for path in paths:
        component, inner = path.split(".", 1)
        fusion = of_path(inner) if not component.startswith("text_encoder") else None
        for piece in _pieces(fusion or Fusion(inner, (inner,)), dialect):
            if inner in piece.paths:
                key = _key(component, piece.original, dialect, family)
                layers[key] = FileLayer(key, component, piece)
    return list(layers.values())


def _original_names(
    paths: list[str], adapter: AdapterState, dialect: Dialect, family: str | None
) -> Callable[[str], Fusion | None]:
    """Path of the denoiser -> its fusion; None where it is called as diffusers calls it.

    Raises:
        ValueError: nobody reads a file of this format that holds these layers.
    """
    inner = [path.split(".", 1)[1] for path in paths if not path.startswith("text_encoder")]
    if not inner or dialect.takes_any_model:
        return _no_fusion
    fitting = fitting_families(adapter)
    if not fitting:
        layer = strange_layer(adapter)
        raise ValueError(f"{layer}: no model known here has this layer, and {_unread(dialect)}")
    if family is None and not any(map(dialect.uses_original_names, fitting)):
        return _no_fusion
    if family is None and any(path.startswith("unet.") for path in paths) and set(fitting) & dialect.diffusers_for:
        return _no_fusion  # all tools know a UNet's layers by diffusers' names
    if family is None and len(fitting) > 1 and not _are_named_alike(fitting, dialect):
        raise ValueError(
            f"the {dialect.name} format has the makers' names of layers, and these may be those of "
            f"{' or '.join(fitting)}: say which (--family, load_adapter(family=))"
        )
    family = family or fitting[0]
    if not dialect.uses_original_names(family) or _is_original(family):
        return _no_fusion
    layout = next(layout for layout in LAYOUTS if _is_denoisers(layout, family))
    strange = [path for path in inner if layout.of_path(path) is None]
    if strange or (strange := _disproportionate(layout, adapter.modules)):
        raise ValueError(
            f"{strange[0]}: the {dialect.name} format needs its original name, which is not known here for {family} of "
            f"these dimensions, and {_unread(dialect)}"
        )
    return layout.of_path


def _are_named_alike(families: list[str], dialect: Dialect) -> bool:
    """Whether the layers of these have the same original names, and all are written under them."""
    names = {next((layout.name for layout in LAYOUTS if _is_denoisers(layout, family)), family) for family in families}
    return len(names) == 1 and all(dialect.uses_original_names(family) for family in families)


def _is_denoisers(layout: Layout, family: str) -> bool:
    return layout.component in ("unet", "transformer") and family in layout.families


def _unread(dialect: Dialect) -> str:
    return (
        f"nobody reads a {dialect.name} file with it; write peft or diffusers, which the model's own pipeline reads, "
        "or lycoris, for LyCORIS' wrapper"
    )


def _is_original(family: str | None) -> bool:
    """Whether its makers call its layers as diffusers does."""
    found = family_named(family)
    return found is not None and found.signature.is_original


def _disproportionate(layout: Layout, modules: Mapping[str, Module]) -> list[str]:
    """Layers that are parts of a fused one in other proportions than the published model's."""
    units: dict[str, float] = {}
    found = []
    for path, module in modules.items():
        inner = path.split(".", 1)[1]
        fusion = None if path.startswith("text_encoder") else layout.of_path(inner)
        if fusion is not None and len(fusion.paths) > 1:
            unit = module.shape[0] / fusion.shares[fusion.paths.index(inner)]
            if units.setdefault(fusion.original, unit) != unit:
                found.append(inner)
    return found


def _no_fusion(path: str) -> None:
    """Layers are called as diffusers calls them."""


def _pieces(fusion: Fusion, dialect: Dialect) -> list[Fusion]:
    """The layer itself; or a numbered piece for each of its layers."""
    if not dialect.has_pieces or len(fusion.paths) == 1:
        return [fusion]
    return [Fusion(f"{fusion.original}.{number}", (path,)) for number, path in enumerate(fusion.paths)]


def _key(component: str, name: str, dialect: Dialect, family: str | None) -> str:
    if component.startswith("text_encoder") and dialect.keeps_text_model and _CLIP.match(name):
        name = f"text_model.{name}"
    prefix = dialect.prefix(component, family)
    return f"{prefix}{flatten(name) if dialect.is_flat else name}"


def _parts(layer: FileLayer, adapter: AdapterState, dialect: Dialect) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    if modules := layer.of(adapter.modules):
        parts.update(parts_of(layer.key, _fused(layer.fusion, modules), dialect.suffixes))
    if weights := layer.vectors(adapter.vectors, "weight"):
        parts["w_norm"] = fuse_vector(layer.fusion, weights)
    if biases := layer.vectors(adapter.vectors, "bias"):
        is_norm = "w_norm" in parts or (not modules and _NORMS.search(layer.fusion.paths[0]) is not None)
        parts["b_norm" if is_norm else "diff_b"] = fuse_vector(layer.fusion, biases)
    return parts


def _fused(fusion: Fusion, modules: Mapping[str, Module]) -> Module:
    try:
        return fuse(fusion, modules)
    except ValueError as error:
        hint = "lycoris, onetrainer-legacy and diffusers write such layers one by one"
        raise ValueError(f"{error}; {hint}") from None


def _metadata(adapter: AdapterState, dialect: Dialect, family: str | None) -> dict[str, str]:
    kept = {key: text for key, text in adapter.metadata.items() if key not in (METADATA_KEY, AXIS_KEY)}
    kept.update(_dimensions(adapter, kept))
    if family is not None and any(component.startswith("text_encoder") for component in adapter.components):
        kept.setdefault(FAMILY_KEY, family)  # a T5 does not tell whether it is the second encoder or the third
    axes = {module.axis for module in adapter.modules.values() if module.magnitude is not None}
    noted = {AXIS_KEY: next(iter(axes))} if len(axes) == 1 and not dialect.suffixes.flat_magnitude else {}
    if dialect.suffixes is not PEFT:
        return {**kept, **noted}
    config = {
        f"{component}.{name}": value
        for component in adapter.components
        for name, value in peft_config(component, _under(adapter, component)).items()
    }
    return {**kept, "format": "pt", METADATA_KEY: json.dumps(config, sort_keys=True)}


def _dimensions(adapter: AdapterState, metadata: Mapping[str, str]) -> dict[str, str]:
    """kohya's rank and alpha where the file says others; "Dynamic" is what kohya's own resizing writes."""
    pairs = [module for module in adapter.modules.values() if isinstance(module, ModuleState)]
    as_written = {
        "ss_network_dim": {f"{module.rank}" for module in pairs},
        "ss_network_alpha": {f"{module.scale * module.rank:g}" for module in pairs},
    }
    return {
        key: next(iter(found)) if len(found) == 1 else "Dynamic"
        for key, found in as_written.items()
        if found and key in metadata and not _same_numbers(metadata[key], found)
    }


def _same_numbers(text: str, found: set[str]) -> bool:
    try:
        return {float(text)} == {float(number) for number in found}
    except ValueError:
        return len(found) > 1  # "Dynamic" already, or something of another tool's


def _under(adapter: AdapterState, component: str) -> dict[str, Module]:
    start = component + "."
    return {path.removeprefix(start): m for path, m in adapter.modules.items() if path.startswith(start)}
