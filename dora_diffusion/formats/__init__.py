"""Adapter files: `load_adapter`, `save_adapter`, and what a file is, from its header alone (`examine`).

Formats are values (`dialects`); one reader takes them all, and mixtures of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dora_diffusion.families import FAMILIES, family_named
from dora_diffusion.formats import peft, pickles
from dora_diffusion.formats.assembly import ToolMagnitudes
from dora_diffusion.formats.bundled_words import word_of, words_among
from dora_diffusion.formats.dialects import COMPONENTS, DIALECTS, PEFT_FILE, Dialect, Signs
from dora_diffusion.formats.family_detection import FamilyEvidence, family_evidence
from dora_diffusion.formats.kohya_hashes import with_hashes
from dora_diffusion.formats.layer_lookup import Locate
from dora_diffusion.formats.other_kinds import other_kinds, refusal
from dora_diffusion.formats.outline import Entries, file_entries, folder_entries, outline
from dora_diffusion.formats.reading import FAMILY_KEY, Reading, read, take_apart, with_origin
from dora_diffusion.formats.safetensors_reader import Container, read_header
from dora_diffusion.formats.writing import write
from dora_diffusion.state import AdapterState, WeightOf, cast
from dora_diffusion.utils.atomic import save_tensors, sha256_of
from dora_diffusion.utils.checks import check_type
from dora_diffusion.utils.text import shown, shown_path

__all__ = [
    "FORMATS",
    "Examined",
    "detect_format",
    "examine",
    "load_adapter",
    "load_examined",
    "read_header",
    "save_adapter",
]


RUN_FILE = "adapter.safetensors"
"""What training calls an adapter, in the folder of a run and of each checkpoint."""

# Those that people ask for first, then the rest.
_BY_NAME = {dialect.name: dialect for dialect in DIALECTS if dialect.is_written}
FORMATS: dict[str, Dialect] = {
    name: _BY_NAME[name]
    for name in dict.fromkeys(("diffusers", "peft", "kohya", "comfyui", "lycoris", *sorted(_BY_NAME)))
}


@dataclass(frozen=True)
class Examined:
    """What a file is, from its header alone.

    Attributes:
        format: the name of its format.
        matched: keys that belong to layers or words.
        unknown: the other keys.
        layers: layers in the file, fused ones counted once.
        sha256: of the bytes that were read, hex; None where nothing but the header was.
        debris: what stood before layers beside their prefix, and was not looked at: a prefix once more.
        words: new words that the file bundles.
        family: the model family that it is for; None where that is left open.
        family_evidence: what tells it, or what leaves it open, in words.
    """

    format: str
    matched: int
    unknown: tuple[str, ...]
    layers: int
    sha256: str | None = None
    debris: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    family: str | None = None
    family_evidence: str = ""

    def __repr__(self) -> str:
        keys = self.matched + len(self.unknown)
        return f"Examined({self.format}, {self.layers} layers, {self.matched} of {keys} keys understood)"


def place_of(path: str | Path) -> Path:
    """Where an adapter lies: the file or folder of PEFT's itself, or the file in the folder of a run or a checkpoint.

    Raises:
        ValueError: a folder that holds none.
    """
    check_type("adapter", path, str | Path)
    path = Path(path)
    if path.name == peft.WEIGHTS and (path.parent / peft.CONFIG).is_file():
        return path.parent  # its scale stands in the config beside it
    if not path.is_dir() or peft.is_folder(path):
        return path
    if (path / RUN_FILE).is_file():
        return path / RUN_FILE
    pickled = sorted(file for file in path.iterdir() if file.suffix in pickles.SUFFIXES and file.is_file())
    if pickled and not any(path.glob("*.safetensors")) and not (path / "checkpoints").exists():
        raise ValueError(pickles.refusal(shown_path(pickled[0])))
    newest = max(path.glob(f"checkpoints/step-*/{RUN_FILE}"), default=None)
    hint = "an adapter file or a folder with one of them" if newest is None else f"its checkpoint {newest.parent}"
    raise ValueError(
        f"{shown_path(path)}: a folder without training's {RUN_FILE} and without PEFT's {peft.CONFIG}; "
        f"expected {shown_path(hint)}"
    )


def examine(path: str | Path) -> Examined:
    """The format of a file, and how many of its keys are understood.

    Raises:
        ValueError: one line: the file is broken, or no adapter's.

    Examples:
        ```python
        import dora_diffusion as dd

        found = dd.examine("ink.safetensors")
        print(f"{found.format}: {found.matched} keys of {found.layers} layers for {found.family}")
        assert found.unknown == ()
        ```
    """
    path = place_of(path)
    if path.is_dir():
        weights = [file for file in sorted(path.rglob(peft.WEIGHTS)) if file.is_file()]
        if not weights:
            raise ValueError(peft.without_weights(next(file.parent for file in sorted(path.rglob(peft.CONFIG)))))
        found = _folder_examined(
            [f"{file.parent.name}/{key}" for file in weights for key in read_header(file) if key != "__metadata__"]
        )
        return _with_family(found, _header_evidence(*folder_entries(path)))
    with Container(path) as file:
        reading = _taken_apart(path, file)
        return _with_family(_examined(path, file, reading), _header_evidence(*file_entries(file.header), reading))


def _header_evidence(entries: Entries, metadata: Mapping[str, str], reading: Reading | None = None) -> FamilyEvidence:
    try:
        reading = reading or take_apart({key: shape for key, (_, shape) in entries.items()}, metadata)
        return family_evidence(outline(entries, metadata, reading)[0])
    except ValueError as error:  # of layers that `load_adapter` refuses
        return FamilyEvidence(None, str(error))


def _with_family(found: Examined, told: FamilyEvidence) -> Examined:
    return replace(found, family=told.family, family_evidence=told.evidence)


def _folder_examined(keys: Sequence[str]) -> Examined:
    return Examined("peft", len(keys), (), len({key.rpartition(".lora_")[0] for key in keys}))


def _examined(path: Path, file: Container, reading: Reading) -> Examined:
    unknown = tuple(key for key in file.keys if not reading.is_known(key) and word_of(key) is None)
    matched = len(file.keys) - len(unknown)
    debris = sorted({place.prefix + place.debris for place in reading.places.values() if place.debris})
    name = format_of(path, reading, file.keys)
    words = words_among(file.keys)
    return Examined(name, matched, unknown, len(reading.places), debris=tuple(debris), words=words)


def format_of(path: Path, reading: Reading, keys: list[str]) -> str:
    """The name of the format that a file's keys are in; a ValueError of one line when none fits."""
    if reading.places:
        signs = _signs(reading)
        for dialect in DIALECTS:
            if dialect.recognises(signs):
                return dialect.name
    if kinds := other_kinds(keys):
        raise ValueError(f"{path}: {refusal(kinds, is_partial=False)}")
    plain = sum(key.endswith((".weight", ".bias")) for key in keys)
    if len(keys) > 1 and not reading.keys and 5 * plain > 4 * len(keys):
        raise ValueError(
            f"{path}: no adapter, a whole model by its {len(keys)} keys; name it as a base (--base, --model), or take "
            "an adapter out of it: dora-diffusion extract"
        )
    example = f", first key {keys[0][:100]!r}" if keys else ", no tensors"
    known = ", ".join(sorted({dialect.name for dialect in DIALECTS}))
    raise ValueError(f"{path}: no adapter format known here ({known}) fits its {len(keys)} keys{example}")


def _signs(reading: Reading) -> Signs:
    places = reading.places.values()
    return Signs(
        prefixes=frozenset(place.prefix for place in places),
        styles=frozenset(key.style for key in reading.keys.values()),
        has_original_names=any(place.is_original for place in places),
        has_pieces=any(place.is_piece for place in places),
        has_debris=any(name.startswith("base_model.model.") for name in reading.places),
    )


def detect_format(path: str | Path) -> str:
    """The name of a file's format, from its header alone; a ValueError of one line when none fits."""
    return examine(path).format


def load_adapter(
    path: str | Path, *, base: WeightOf | None = None, family: str | None = None, strict: bool = True
) -> AdapterState:
    """Read an adapter file; the format is detected. Safetensors only, never a pickle.

    Args:
        path: the file, a folder of PEFT's, or the folder of a training run or of one of its checkpoints.
        base: path of a layer -> the base's weight. Asked only for changes that are made of it (OFT, BOFT, GLoRA,
            (IA)^3), and where a flat magnitude on a square layer, and metadata that say nothing, leave it open whether
            it is per output or per input.
        family: the name of the model family, where names and sizes of layers are several's.
        strict: False loads the layers that can be computed of a file that holds others beside them.

    Raises:
        ValueError: one line that names the file and what is wrong.

    Examples:
        ```python
        import dora_diffusion as dd

        adapter = dd.load_adapter("ink.safetensors")
        print(adapter.origin, adapter.is_dora, adapter.ranks, adapter.components)
        ```
    """
    return load_examined(path, base=base, family=family, strict=strict)[0]


def load_examined(
    path: str | Path,
    *,
    base: WeightOf | None = None,
    family: str | None = None,
    strict: bool = True,
    find: Locate | None = None,
) -> tuple[AdapterState, Examined]:
    """`load_adapter` and `examine` at once: the file is opened and read once, and hashed as it is read.

    `find` says where the layers of a file lie, for models whose names are not known here.
    """
    if family is not None and family_named(family) is None:
        raise ValueError(f"family {family!r} is unknown: expected one of {', '.join(each.name for each in FAMILIES)}")
    path = place_of(path)
    if path.is_dir():
        folder = peft.read_folder(path, base, _told(family))
        found = replace(_folder_examined(folder.keys), sha256=sha256_of(path, known=folder.sha256s))
        return with_origin(folder.adapter, found.format), _with_family(found, family_evidence(folder.adapter))
    with Container(path) as file:  # a large file of another kind is known by its header
        reading = _taken_apart(path, file, family, find)
        found = _examined(path, file, reading)
        kinds = other_kinds(found.unknown)
        if strict and kinds:
            raise ValueError(f"{shown_path(path)}: {refusal(kinds, is_partial=True)}")
        contents = file.contents()
    try:
        adapter = read(contents.tensors, {**contents.metadata, **_told(family)}, reading, base)
        if not adapter.modules and not adapter.vectors:
            raise ValueError(f"none of its {len(file.keys)} tensors changes a layer, such as {shown(file.keys[0])}")
        found = _with_family(replace(found, sha256=contents.sha256), family_evidence(adapter))
        return with_origin(adapter, found.format), found
    except ToolMagnitudes as error:
        raise ToolMagnitudes(f"{shown_path(path)}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{shown_path(path)}: {error}") from None


def _told(family: str | None) -> dict[str, str]:
    return {} if family is None else {FAMILY_KEY: family}


def _taken_apart(path: Path, file: Container, family: str | None = None, find: Locate | None = None) -> Reading:
    shapes = {key: file.header[key]["shape"] for key in file.keys}
    try:
        return take_apart(shapes, {**file.metadata, **_told(family)}, find)
    except ValueError as error:
        raise ValueError(f"{shown_path(path)}: {error}") from None


def save_adapter(
    adapter: AdapterState, path: str | Path, *, format: str = "diffusers", dtype: torch.dtype | None = None
) -> Path:
    """Write an adapter atomically; returns its path. The format `peft` writes a folder, all others one file.

    Args:
        adapter: its paths begin with the pipeline's component (`injection.state().under("unet")`).
        path: a name that ends in `.safetensors`; a folder's for `peft`.
        format: a key of `FORMATS`.
        dtype: of pairs, factors and vectors; None leaves them as they are. Magnitudes always stay as they are.

    Raises:
        ValueError: the format is unknown, or cannot hold this adapter: one line that says what and what to do.

    Examples:
        ```python
        import dora_diffusion as dd

        adapter = dd.load_adapter("ink.safetensors")
        dd.save_adapter(adapter, "ink-kohya.safetensors", format="kohya")
        dd.save_adapter(adapter, "ink-peft", format="peft")  # a folder
        ```
    """
    check_type("save_adapter: adapter", adapter, AdapterState)
    check_type("save_adapter: path", path, str | Path)
    check_type("save_adapter: dtype", dtype, torch.dtype | None)
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown: expected one of {', '.join(FORMATS)}")
    check_name(path, format)
    if not adapter.modules and not adapter.vectors:
        raise ValueError(f"{path}: the adapter has no layers")
    _check_components(adapter)
    adapter = adapter if dtype is None else cast(adapter, dtype)
    _check_finite(adapter)
    try:
        if FORMATS[format] is PEFT_FILE:
            peft.write_folder(adapter, path)
        else:
            tensors, metadata = write(adapter, FORMATS[format])
            save_tensors(tensors, path, with_hashes(tensors, metadata))
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from None
    return path


def check_name(path: Path, format: str) -> None:
    """A ValueError of one line when a name does not say what is written under it."""
    is_folder = FORMATS[format] is PEFT_FILE
    if is_folder and path.suffix in (".safetensors", *pickles.SUFFIXES):
        raise ValueError(f"{path}: the peft format is a folder; give a name without {path.suffix}, {path.stem!r}")
    if not is_folder and path.suffix != ".safetensors":
        better = path.stem if path.suffix in pickles.SUFFIXES else path.name
        raise ValueError(f"{path}: expected a name that ends in .safetensors, such as {better + '.safetensors'!r}")


def _check_components(adapter: AdapterState) -> None:
    """An injection knows the paths inside its model, and not what the model is to a pipeline."""
    if strange := [name for name in adapter.components if name not in COMPONENTS]:
        raise ValueError(
            f"{strange[0]!r} is no component of a pipeline, and layers' paths must begin with one; write "
            'save_adapter(injection.state().under("unet"), ...), or "transformer", "text_encoder" ...'
        )


def _check_finite(adapter: AdapterState) -> None:
    """Nothing is written that could not be read again."""
    for path, module in adapter.modules.items():
        for name, tensor in module.tensors.items():
            if not bool(torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all()):
                raise ValueError(f"{path}: {name} holds NaN or infinite values, in {tensor.dtype}; nothing was written")
    for path, vector in adapter.vectors.items():
        if not bool(torch.isfinite(vector).all()):
            raise ValueError(f"{path}: the vector holds NaN or infinite values; nothing was written")
