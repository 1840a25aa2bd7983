"""Where a base's parameters lie on disk: in a diffusers folder, or in one file under its original names.

Paths are an adapter's: the pipeline's component first, `unet.conv_in.weight`, and without the `text_model.` of CLIP.
"""

import json
import re
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dora_diffusion.formats.layouts import LAYOUTS, Fusion, Layout
from dora_diffusion.formats.layouts.clip import TRANSPOSED
from dora_diffusion.formats.layouts.unet import layout_of
from dora_diffusion.formats.safetensors_stream import TensorFile

_COMPONENT = re.compile(r"(unet|transformer|text_encoder)(_\d+)?")
_DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_TEXT_PREFIXES = {
    "cond_stage_model.transformer.": "text_encoder",
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.0.model.": "text_encoder_2",  # the refiner of Stable Diffusion XL has the second alone
    "conditioner.embedders.1.model.": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
}
_CLIP = "text_model."
_TIED = "encoder.embed_tokens."
# What a path begins with in today's transformers, and in files: CLIP's first version, T5's one table under two names,
# language models that see (Qwen, Mistral).
_OTHER_SPELLINGS = (
    *(("", _CLIP), (_CLIP, ""), (_TIED, "shared.")),
    *(("model.language_model.", "language_model.model."), ("model.language_model.", "model.")),
    *(("lm_head.", "language_model.lm_head."), ("model.visual.", "visual."), ("model.vision_tower.", "vision_tower.")),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
# What a parameter is called behind its layer's name: OpenCLIP fuses projections into bare parameters, FLUX has `scale`.
_PARAMETERS = {"weight": (".weight", ".scale", "_weight", ""), "bias": (".bias", "_bias")}
_PARAMETER = re.compile(r"(.*in_proj)_(weight|bias)|(.+)\.(weight|bias|scale)")


@dataclass(frozen=True)
class Place:
    """A parameter of diffusers' model in a file: a whole tensor, or some of its rows.

    Attributes:
        file: the file.
        key: the tensor's.
        share: (rows before, rows, rows in all), in proportion.
        swapped: the two halves of those rows stand the other way round.
        turned: the file has it transposed.
    """

    file: TensorFile
    key: str
    share: tuple[int, int, int] = (0, 1, 1)
    swapped: bool = False
    turned: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter, from the file's header alone."""
        return tuple(self.take(torch.empty(self.file.slots[self.key].shape, device="meta")).shape)

    @property
    def dtype(self) -> str:
        """As the file's header spells it."""
        return self.file.slots[self.key].dtype

    def take(self, whole: Tensor) -> Tensor:
        """The parameter out of its tensor; a view where it can be."""
        part = self._rows(whole)
        if self.swapped:
            part = torch.cat(part.chunk(2)[::-1])
        return part.T if self.turned else part

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Write a parameter back into its tensor, rounded to the tensor's dtype."""
        part = part.T if self.turned else part
        self._rows(whole).copy_(torch.cat(part.chunk(2)[::-1]) if self.swapped else part)

    def read(self) -> Tensor:
        """The parameter, as stored."""
        return self.take(self.file.read(self.key))

    def _rows(self, whole: Tensor) -> Tensor:
        before, count, total = self.share
        if total == 1:
            return whole
        if whole.shape[0] % total:
            raise ValueError(f"{self.file.path}: {self.key} has {whole.shape[0]} rows, expected a multiple of {total}")
        unit = whole.shape[0] // total
        return whole[before * unit : (before + count) * unit]


@dataclass(frozen=True)
class Checkpoint:
    """A base on disk, its headers read.

    Attributes:
        source: the folder or file.
        files: those with weights that adapters may change.
        find: a parameter's path -> its place; None when there is none.
        names: the paths of all parameters, as far as they are known.
    """

    source: Path
    files: tuple[TensorFile, ...]
    find: Callable[[str], Place | None]
    names: Callable[[], Iterator[str]]


def open_checkpoint(source: Path) -> Checkpoint:
    """A diffusers folder or a single .safetensors file.

    Raises:
        ValueError: one line that says what was looked for and what is there.
    """
    return _open_folder(source) if source.is_dir() else _open_file(source)


def _open_folder(folder: Path) -> Checkpoint:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and _COMPONENT.fullmatch(path.name))
    files = {name: [TensorFile(path) for path in weight_files(folder / name)] for name in names}
    if not files:
        raise ValueError(
            f"{folder}: no unet, transformer or text_encoder there; expected a folder in diffusers' layout"
        )
    where = {name: _by_key(folder / name, files[name]) for name in names}

    def find(path: str) -> Place | None:
        component, _, inner = path.partition(".")
        known = where.get(component, {})
        return next((Place(known[key], key) for key in _spellings(inner) if key in known), None)

    def names_of() -> Iterator[str]:
        return (f"{name}.{_live(key, known)}" for name, known in where.items() for key in known)

    return Checkpoint(folder, tuple(file for found in files.values() for file in found), find, names_of)


def _by_key(folder: Path, files: Sequence[TensorFile]) -> dict[str, TensorFile]:
    found: dict[str, TensorFile] = {}
    for file in files:
        if twice := found.keys() & file.slots.keys():
            raise ValueError(f"{folder}: {min(twice)} lies in two files; expected each tensor once")
        found.update(dict.fromkeys(file.slots, file))
    return found


def _spellings(inner: str) -> Iterator[str]:
    """A path in the model -> the keys that files may have for it."""
    yield inner
    for live, stored in _OTHER_SPELLINGS:
        if inner.startswith(live):
            yield stored + inner.removeprefix(live)


def _live(key: str, keys: Container[str]) -> str:
    """A key -> the path in the model, as transformers builds it today; CLIP's without `text_model.`."""
    for live, stored in _OTHER_SPELLINGS:
        is_older = stored != "model." or "visual.patch_embed.proj.weight" in keys  # Qwen's, with eyes beside it
        if stored and live and is_older and live != _TIED and key.startswith(stored):
            return live + key.removeprefix(stored)
    return key.removeprefix(_CLIP)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a component: the plain ones, or one variant's (fp16 first) where there are none.

    Raises:
        ValueError: there are none, or an index names a file that is not there.
    """
    best = main_weights(folder)
    return _shards(best) if best.suffix == ".json" else [best]


def main_weights(folder: Path) -> Path:
    """The file that holds a component, or the index of the files that do; errors as of `weight_files`."""
    wholes = [path for path in folder.glob("*.safetensors") if not re.search(r"-\d+-of-\d+", path.name)]
    found = [*wholes, *folder.glob("*.safetensors.index*.json")]
    if not found:
        raise ValueError(f"{folder}: no .safetensors weights there; convert other files to safetensors first")
    return min(found, key=_preference)


def _preference(path: Path) -> tuple[int, int, str]:
    """Plain before fp16 before other variants, whole before sharded."""
    words = path.name.removesuffix(".json").removesuffix(".safetensors").replace(".safetensors.index", "").split(".")
    variant = 0 if len(words) == 1 else 1 if words[1] == "fp16" else 2
    return variant, int(path.suffix == ".json"), path.name


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index}: not readable as the index of a sharded model") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (index.parent / name).is_file():
            raise ValueError(f"{index}: names the file {name!r}, which is not beside it")
    return [index.parent / name for name in names]


@dataclass(frozen=True)
class _Part:
    """A component in a single file: its prefix, and its original names (None = diffusers' own)."""

    component: str
    prefix: str
    layout: Layout | None


def _open_file(path: Path) -> Checkpoint:
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(f"{path}: expected a .safetensors file or a folder in diffusers' layout")
    file = TensorFile(path)
    parts = _parts(tuple(file.slots))
    if not parts:
        raise ValueError(f"{path}: no denoiser or text encoder known here among its {len(file.slots)} tensors")

    def find(parameter: str) -> Place | None:
        component, _, inner = parameter.partition(".")
        places = (_place(file, part, inner) for part in parts if part.component == component)
        return next((place for place in places if place is not None), None)

    return Checkpoint(path, (file,), find, lambda: (name for part in parts for name in _names(file, part)))


def _parts(keys: Sequence[str]) -> list[_Part]:
    parts = []
    for prefix, component in _TEXT_PREFIXES.items():
        inner = _under(keys, prefix)
        if inner:
            has_two = any(key.startswith("text_encoders.clip_g.") for key in keys)
            moved = component == "text_encoder_3" and not has_two  # FLUX has no second CLIP
            parts.append(_Part("text_encoder_2" if moved else component, prefix, _layout(inner, component)))
    prefix = next(prefix for prefix in _DENOISER_PREFIXES if any(key.startswith(prefix) for key in keys))
    inner = _under(keys, prefix)
    layout = layout_of({_split(key)[0] for key in inner}) or _layout(inner, "transformer")
    if layout is not None:
        parts.append(_Part(layout.component, prefix, layout))
    elif any("blocks." in key or "layers." in key for key in inner) and (prefix or not parts):  # diffusers' names
        is_unet = any(key.startswith("down_blocks.") for key in inner)
        parts.append(_Part("unet" if is_unet else "transformer", prefix, None))
    return parts


def _under(keys: Sequence[str], prefix: str) -> list[str]:
    return [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]


def _layout(keys: Sequence[str], component: str) -> Layout | None:
    """The original names, when they know half of the layers, and as many of them as diffusers' names do."""
    layers = {_split(key)[0] for key in keys}
    layouts = [layout for layout in LAYOUTS if layout.component == component]
    counts = [sum(layout.of_original(layer) is not None for layer in layers) for layout in layouts]
    most = max(counts, default=0)
    if 2 * most < len(layers) or not most:
        return None
    best = layouts[counts.index(most)]
    return best if most >= sum(best.of_path(layer) is not None for layer in layers) else None


def _split(key: str) -> tuple[str, str]:
    """A key in a single file -> its layer, and the parameter as diffusers calls it."""
    found = _PARAMETER.fullmatch(key)
    if found is None:
        return key, "weight"
    parameter = found[2] or found[4]
    return found[1] or found[3], "weight" if parameter == "scale" else parameter


def _place(file: TensorFile, part: _Part, inner: str) -> Place | None:
    layer, _, parameter = inner.removeprefix(_CLIP).rpartition(".")
    fusion = part.layout.of_path(layer) if part.layout is not None else None
    if fusion is not None:
        name = part.prefix + fusion.original
        for key in (name + ending for ending in _PARAMETERS.get(parameter, ())):
            if key in file:
                return _fused_place(file, fusion, layer, key)
    keys = (part.prefix + spelling for spelling in _spellings(inner))
    return next((Place(file, key) for key in keys if key in file), None)


def _fused_place(file: TensorFile, fusion: Fusion, layer: str, key: str) -> Place:
    index = fusion.paths.index(layer)
    share = sum(fusion.shares[:index]), fusion.shares[index], sum(fusion.shares)
    weight = file.slots.get(f"{key.rpartition('.')[0]}.weight")  # a bias has no columns of its own
    rows, columns = weight.shape if weight is not None and len(weight.shape) == 2 else (0, 1)
    swapped = fusion.swaps(rows, columns)
    turned = key.endswith(fusion.original) and fusion.original in TRANSPOSED  # transformers' has `.weight` behind it
    return Place(file, key, share if len(fusion.paths) > 1 else (0, 1, 1), swapped=swapped, turned=turned)


def _names(file: TensorFile, part: _Part) -> Iterator[str]:
    for inner in _under(tuple(file.slots), part.prefix):
        layer, parameter = _split(inner)
        fusion = part.layout.of_original(layer) if part.layout is not None else None
        if fusion is not None:
            yield from (f"{part.component}.{path}.{parameter}" for path in fusion.paths)
        elif part.layout is None or part.layout.of_path(layer) is not None:
            yield f"{part.component}.{_live(inner, ())}"
