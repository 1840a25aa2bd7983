"""PEFT's folders: `adapter_config.json` beside `adapter_model.safetensors`, one folder for each component.

PEFT's config has one `use_dora` for all layers, and a layer without a magnitude would become a DoRA of another meaning:
a mixed adapter is refused; its plain layers can be made DoRA exactly (`to_dora`). rsLoRA and alpha live in the config
only.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dora_diffusion.families import family_named
from dora_diffusion.formats import pickles
from dora_diffusion.formats.assembly import parts_of, scaled_to
from dora_diffusion.formats.dialects import COMPONENTS
from dora_diffusion.formats.family_detection import family_of
from dora_diffusion.formats.json_metadata import LONGEST, json_object
from dora_diffusion.formats.keys import PEFT
from dora_diffusion.formats.kohya_hashes import without_hashes
from dora_diffusion.formats.peft_alphas import METADATA_KEY, Scales, peft_config
from dora_diffusion.formats.reading import read, take_apart
from dora_diffusion.formats.safetensors_reader import read_tensors
from dora_diffusion.state import AdapterState, Module, ModuleState, WeightOf, join
from dora_diffusion.utils.atomic import atomic_path, save_tensors, write_atomically
from dora_diffusion.utils.text import shown, shown_path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_CLIP = re.compile(r"^(encoder\.layers|embeddings|final_layer_norm)\b")
_NOTE = "dora_diffusion.json"  # metadata and facts that PEFT's config has no place for
_EXTRA = "extra.safetensors"  # tensors that belong to no layer
_TYPES = ("LORA", "LOHA", "LOKR")
# Ways of PEFT to start that take the pair out of the base: what is saved is right beside that other base only.
_MOVING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_folder(path: Path) -> bool:
    """Whether a folder is an adapter of PEFT's, or holds one for some component."""
    return any((folder / CONFIG).is_file() for folder in (path, *(path / name for name in COMPONENTS)))


@dataclass(frozen=True)
class Folder:
    """What a folder holds.

    Attributes:
        adapter: all its components' layers.
        keys: of the weights, each behind its folder's name.
        sha256s: file -> hash of the very bytes that were read.
    """

    adapter: AdapterState
    keys: tuple[str, ...]
    sha256s: dict[Path, str]


def read_folder(path: Path, weight_of: WeightOf | None = None, told: Mapping[str, str] | None = None) -> Folder:
    """A folder of PEFT's, or one with such folders named by component; `told` are metadata that it does not have.

    Raises:
        ValueError: one line that names the file and what is wrong with it.
    """
    inside = [path / name for name in COMPONENTS if (path / name / CONFIG).is_file()]
    if not inside:
        return _read_one(path, path.name if path.name in COMPONENTS else None, weight_of, told or {})
    note = _json(path / _NOTE) if (path / _NOTE).is_file() else {}
    folders = [_read_one(folder, folder.name, weight_of, told or {}) for folder in inside]
    joined = join([folder.adapter for folder in folders], {str(key): str(value) for key, value in note.items()})
    sha256s = {file: sha256 for folder in folders for file, sha256 in folder.sha256s.items()}
    if (path / _EXTRA).is_file():
        extra = read_tensors(path / _EXTRA)
        joined, sha256s[path / _EXTRA] = replace(joined, extra={**joined.extra, **extra.tensors}), extra.sha256
    return Folder(joined, tuple(key for folder in folders for key in folder.keys), sha256s)


def _read_one(folder: Path, component: str | None, weight_of: WeightOf | None, told: Mapping[str, str]) -> Folder:
    config = _json(folder / CONFIG)
    _check_config(folder / CONFIG, config)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(without_weights(folder))
    contents = read_tensors(folder / WEIGHTS)
    try:
        named = {_with_component(key, component): tensor for key, tensor in contents.tensors.items()}
        metadata = {**contents.metadata, **told}
        reading = take_apart({key: tensor.shape for key, tensor in named.items()}, metadata)
        components = {place.component for place in reading.places.values()}
        with_config = {**metadata, METADATA_KEY: json.dumps(_by_component(config, components))}
        keys = tuple(f"{folder.name}/{key}" for key in contents.tensors)
        adapter = read(named, with_config, reading, weight_of)
        adapter = adapter if _type_of(config) == "LORA" else _with_scales(adapter, config)
        return Folder(adapter, keys, {folder / WEIGHTS: contents.sha256})
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def without_weights(folder: Path) -> str:
    """What is wrong with a folder that has no weights which are read."""
    pickled = [path for path in sorted(folder.iterdir()) if path.suffix in pickles.SUFFIXES]
    return pickles.refusal(shown_path(pickled[0])) if pickled else f"{shown_path(folder)}: no {WEIGHTS} there"


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    if _type_of(config) not in _TYPES:
        raise ValueError(
            f"{path}: peft_type is {shown(config['peft_type'], 40)!r}, expected {', '.join(_TYPES)}; merge it with "
            "PEFT (merge_and_unload) and take an adapter out of the model: dora-diffusion extract"
        )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_MOVING_STARTS):
        raise ValueError(
            f"{path}: init_lora_weights is {shown(start, 40)!r}, which changed the base's weights as well; expected a "
            "LoRA for the base as it was (PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
        )


def _type_of(config: Mapping[str, Any]) -> str:
    return str(config.get("peft_type", "LORA")).upper()


def _with_scales(adapter: AdapterState, config: Mapping[str, Any]) -> AdapterState:
    """LoHa and LoKr as PEFT draws them: its scale is alpha / r of the config, whatever rank the factors have."""
    components = adapter.components
    alphas = _by_component(
        {"lora_alpha": config.get("alpha"), "alpha_pattern": config.get("alpha_pattern")}, components
    )
    ranks = _by_component({"lora_alpha": config.get("r"), "alpha_pattern": config.get("rank_pattern")}, components)
    alpha_of, rank_of = (Scales({METADATA_KEY: json.dumps(each)}) for each in (alphas, ranks))
    scaled = {
        path: module
        if isinstance(module, ModuleState)
        else scaled_to(module, alpha_of.of(path, 8)[0] / rank_of.of(path, 8)[0])
        for path, module in adapter.modules.items()
    }
    return replace(adapter, modules=scaled, metadata={k: v for k, v in adapter.metadata.items() if k != METADATA_KEY})


def _with_component(key: str, component: str | None) -> str:
    bare = key.removeprefix("base_model.model.")
    return bare if component is None or bare == key else f"{component}.{bare}"


def _by_component(config: Mapping[str, Any], components: Iterable[str]) -> dict[str, Any]:
    wanted = ("lora_alpha", "alpha_pattern", "use_rslora")
    return {f"{name}.{key}": config[key] for name in components for key in wanted if config.get(key) is not None}


def _json(path: Path) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({shown(error)})") from None
    return json_object(text, str(path))


def check_place(path: Path) -> None:
    """A ValueError when what is at a path is no adapter of PEFT's, which writing one would replace."""
    if path.exists() and not (path.is_dir() and (is_folder(path) or not any(path.iterdir()))):
        raise ValueError(f"{path} is there already and is no adapter of PEFT's: choose another name")


def write_folder(adapter: AdapterState, path: Path) -> None:
    """Write a folder for each component under `path`, each of which `PeftModel.from_pretrained` takes.

    Raises:
        ValueError: biases, normalisations or mixed layers, which PEFT's LoRA cannot hold.
    """
    if adapter.vectors:
        raise ValueError(
            f"{min(adapter.vectors)}: PEFT's LoRA holds no differences of biases and normalisations; use lycoris"
        )
    check_place(path)
    family = family_named(family_of(adapter))
    files: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}
    for component in adapter.components:
        part = None if family is None else family.signature.parts.get(component)
        # transformers 5 took `text_model.` out of CLIPTextModel's paths and left it in CLIPTextModelWithProjection's
        has_prefix = part is not None and part.is_projected
        found = {
            f"text_model.{inner}" if has_prefix and _CLIP.match(inner) else inner: module
            for inner, module in _under(adapter, component).items()
        }
        files[component] = _files(component, found)
    with atomic_path(path) as new:
        for folder, (tensors, config) in files.items():
            save_tensors(tensors, new / folder / WEIGHTS, {"format": "pt"})
            write_atomically(new / folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())
        kept = without_hashes(adapter.metadata)
        note = {key: text for key, text in kept.items() if key not in (METADATA_KEY, "format")}
        write_atomically(new / _NOTE, json.dumps(note, indent=2, sort_keys=True).encode())
        if adapter.extra:
            save_tensors(dict(adapter.extra), new / _EXTRA)


def _under(adapter: AdapterState, component: str) -> dict[str, Module]:
    start = component + "."
    return {path.removeprefix(start): m for path, m in adapter.modules.items() if path.startswith(start)}


def _files(component: str, modules: Mapping[str, Module]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {
        f"base_model.model.{PEFT.spell(path, part)}": tensor
        for path, module in modules.items()
        for part, tensor in parts_of(f"{component}.{path}", module, PEFT).items()
    }
    return tensors, {"peft_type": "LORA", "bias": "none", "inference_mode": True, **peft_config(component, modules)}
