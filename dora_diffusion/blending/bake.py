"""Adapters baked into a base on disk: a new folder or file that draws the mix and knows nothing of adapters.

Tensors go from file to file one at a time. W' of an adapted layer is computed in fp32 from all its adapters at once and
rounded once, to the dtype that the base has; every tensor and file that no adapter touches keeps its bytes. What cannot
be done is found from the headers, before anything is written.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import dora_diffusion
from dora_diffusion.formats.base_checkpoint import Checkpoint, Place, main_weights, open_checkpoint, weight_files
from dora_diffusion.formats.safetensors_stream import BLOCK_BYTES, TensorFile, write_tensor_file
from dora_diffusion.functional.blend_modes import ACTIVE_AT_ZERO, MODES
from dora_diffusion.functional.strengths import Weight, check_strength, is_meant, strength_at
from dora_diffusion.pipelines.base_weights import is_table, local_base
from dora_diffusion.state import AdapterState, Module, term_of
from dora_diffusion.utils.atomic import atomic_file, sync_folder

NOTE = "dora_diffusion.baked"
"""The metadata key by which a baked file is known; its value is JSON."""

_BAKEABLE = ("F64", "F32", "F16", "BF16")
_HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data", ".gguf")

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)."""


@dataclass(frozen=True)
class BakeReport:
    """What was written.

    Attributes:
        output: the new folder or file.
        layers: how many layers have new weights.
        vectors: how many biases and normalisations have.
        left_out: files of a folder that hold weights a second time (variants, pickles) and so were not copied.
        extra: tensors of the adapters that belong to no layer, which no base can hold.
    """

    output: Path
    layers: int
    vectors: int
    left_out: tuple[str, ...]
    extra: tuple[str, ...]


@dataclass(frozen=True)
class BakeCheck:
    """A baked base read back.

    Attributes:
        error: the largest |stored - W'| / |W'| of a layer (norms over its numbers), W' in fp32.
        layer: which.
        rounding: the most that rounding to that layer's dtype can make of it, subnormal numbers aside.
        checked: how many layers and vectors were compared.
        changed: keys of tensors that no adapter touches and that differ from the base's; expected to be none.
    """

    error: float
    layer: str
    rounding: float
    checked: int
    changed: tuple[str, ...]


@dataclass(frozen=True)
class _Part:
    """What one adapter does to one parameter: a layer's weight, or a vector that is added."""

    adapter: str
    path: str
    strength: float
    what: Module | Tensor


@dataclass(frozen=True)
class _Change:
    """A parameter of the base, and what each adapter does to it."""

    path: str
    place: Place
    parts: list[_Part] = field(default_factory=list)


@dataclass(frozen=True)
class _Plan:
    """All changes of a bake, by file and key of the tensor that they lie in."""

    base: Checkpoint
    mode: str
    changes: Mapping[tuple[Path, str], Sequence[_Change]]
    metadata: Mapping[str, str]

    def of(self, file: TensorFile) -> bool:
        """Whether any tensor of a file changes."""
        return any((file.path, key) in self.changes for key in file.slots)


def bake(
    base: str | Path,
    adapters: Mapping[str, AdapterState],
    weights: Mapping[str, Weight],
    output: str | Path,
    *,
    mode: str = "additive",
    on_progress: Progress | None = None,
) -> BakeReport:
    """Write `base` with adapters in its weights, as `output`: whole, or not at all.

    Args:
        base: the name of an embedded base, a folder in diffusers' layout, or a single .safetensors file, which keeps
            its original names and its fused projections.
        adapters: name -> adapter.
        weights: name -> strength, as `AdapterManager.set_adapters` takes it; an adapter not named has 0. Modes that
            depend on order take this one.
        output: a folder, or a file for a single file. One that is there already must have been baked here.
        mode: how adapters mix, a key of `blend_modes.MODES`.
        on_progress: is told of bytes as they are written.

    Raises:
        ValueError: one line: layers that the base lacks, shapes that do not fit, a quantised base, an output that is in
            the way.
    """
    plan = _plan(local_base(base), adapters, weights, mode)
    source, target = plan.base.source, Path(output)
    _check_output(source, target)
    copied, left_out = _other_files(plan) if source.is_dir() else ([], [])
    rewritten = [file for file in plan.base.files if plan.of(file)]
    progress = _Counter(on_progress, rewritten, copied)
    with _taking_the_place_of(target) as staging:
        for path in copied:
            _copy(path, staging / path.relative_to(source), progress)
        for file in rewritten:
            place = staging / file.path.relative_to(source) if source.is_dir() else staging
            write_tensor_file(place, file.slots, _tensors(plan, file, progress), metadata=_metadata(plan, file))
    everything = [change for changes in plan.changes.values() for change in changes]
    vectors = sum(all(isinstance(part.what, Tensor) for part in change.parts) for change in everything)
    return BakeReport(
        output=target,
        layers=len(everything) - vectors,
        vectors=vectors,
        left_out=tuple(str(path.relative_to(source)) for path in left_out),
        extra=tuple(f"{name}: {key}" for name in weights for key in adapters[name].extra),
    )


@torch.no_grad()
def verify(
    output: str | Path,
    base: str | Path,
    adapters: Mapping[str, AdapterState],
    weights: Mapping[str, Weight],
    *,
    mode: str = "additive",
) -> BakeCheck:
    """Read a baked base and compare it with the base and the adapters, tensor by tensor; errors as of `bake`."""
    plan, baked = _plan(local_base(base), adapters, weights, mode), open_checkpoint(Path(output))
    worst, checked = (-1.0, "", 0.0), 0
    for change in (change for changes in plan.changes.values() for change in changes):
        place = baked.find(change.path)
        if place is None:
            raise ValueError(f"{output}: {change.path} is not there; was it baked from {base}?")
        expected, stored = _mixed(change, change.place.read(), mode), place.read()
        error = float((stored.to(expected) - expected).norm() / expected.norm().clamp(min=1e-30))
        worst = max(worst, (error, change.path, torch.finfo(stored.dtype).eps / 2))
        checked += 1
    error, layer, rounding = worst
    return BakeCheck(error, layer.removesuffix(".weight"), rounding, checked, tuple(_unlike(plan, baked)))


def _unlike(plan: _Plan, baked: Checkpoint) -> Iterator[str]:
    """Tensors that should be the base's own and are not."""
    files = {_name_in(baked, file): file for file in baked.files}
    for file in plan.base.files:
        other = files.get(_name_in(plan.base, file))
        for key in (key for key in file.slots if (file.path, key) not in plan.changes):
            if other is None or other.slots.get(key) != file.slots[key]:
                yield key
                continue
            pairs = zip(file.blocks(key), other.blocks(key), strict=True)
            if any(mine != theirs for mine, theirs in pairs):
                yield key


def _name_in(checkpoint: Checkpoint, file: TensorFile) -> Path:
    """A file's place in its folder; nothing for a single file, which may be called anything."""
    return file.path.relative_to(checkpoint.source)


def _plan(source: Path, adapters: Mapping[str, AdapterState], weights: Mapping[str, Weight], mode: str) -> _Plan:
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown: expected one of {', '.join(MODES)}")
    if unknown := [name for name in weights if name not in adapters]:
        raise ValueError(f"no adapter named {unknown[0]!r}; there are: {', '.join(adapters) or 'none'}")
    base, wanted = open_checkpoint(source), _wanted(adapters, weights, mode)
    if not wanted:
        raise ValueError("no adapter has a strength on any layer: there is nothing to bake")
    places = {path: base.find(path) for path in dict.fromkeys(each.path for each in wanted)}
    if missing := [path for path, place in places.items() if place is None]:
        raise ValueError(
            f"{source}: {len(missing)} of the adapters' {len(places)} layers are missing, {missing[0]} first; are they "
            "for another base model? Strengths by part leave parts out"
        )
    found: dict[tuple[Path, str], dict[Place, _Change]] = {}
    for each in wanted:
        place = places[each.path]
        assert place is not None
        _check(each, place)
        here = found.setdefault((place.file.path, place.key), {})
        here.setdefault(place, _Change(each.path, place)).parts.append(each)  # two spellings of a path are one place
    changes = {where: tuple(here.values()) for where, here in found.items()}
    return _Plan(base, mode, changes, _notes(source, weights, mode))


def _wanted(adapters: Mapping[str, AdapterState], weights: Mapping[str, Weight], mode: str) -> list["_Part"]:
    """What the adapters do wherever their strengths speak of it; 0 counts in modes to which it is not nothing."""
    found = []
    for name, weight in weights.items():
        adapter = adapters[name]
        check_strength(name, weight, (*adapter.modules, *adapter.vectors))
        for path, module in adapter.modules.items():
            strength = strength_at(path, weight)
            if is_meant(path, weight) and (strength or mode in ACTIVE_AT_ZERO):
                found.append(_Part(name, f"{path}.weight", strength, module))
        for path, vector in adapter.vectors.items():
            if strength := strength_at(path, weight):
                found.append(_Part(name, path, strength, vector))
    return found


def _check(part: _Part, place: Place) -> None:
    """Refuse what does not fit a tensor, and tensors that are not plain floating-point numbers."""
    label, shape, what = f"{part.adapter}: {part.path}", place.shape, part.what
    if place.dtype not in _BAKEABLE:
        raise ValueError(
            f"{label} is stored as {place.dtype} in {place.file.path}: a quantised base cannot be baked; take its fp16 "
            "or bf16 version"
        )
    if isinstance(what, Tensor):
        if what.numel() != math.prod(shape):
            raise ValueError(f"{label} has shape {tuple(what.shape)}, expected {shape}; is this another base model?")
        return
    out, *rest = reversed(shape) if _is_table(part.path) else shape
    scaled = out if what.axis == "out" else rest[0]
    if what.shape != (out, math.prod(rest)) or (what.magnitude is not None and what.magnitude.numel() != scaled):
        raise ValueError(
            f"{label} is for a weight of {what.shape}, expected {(out, *rest)}; is this another base model?"
        )


def _is_table(path: str) -> bool:
    return is_table(path.removesuffix(".weight"))


def _notes(source: Path, weights: Mapping[str, Weight], mode: str) -> dict[str, str]:
    strengths = {name: dict(weight) if isinstance(weight, Mapping) else weight for name, weight in weights.items()}
    note = {"base": source.name, "mode": mode, "adapters": strengths, "version": dora_diffusion.__version__}
    return {NOTE: json.dumps(note), "modelspec.merged_from": ", ".join((source.name, *weights))}


def _metadata(plan: _Plan, file: TensorFile) -> dict[str, str]:
    """The file's own, without hashes of the numbers that it no longer holds."""
    kept = {key: value for key, value in file.metadata.items() if key not in _HASHES}
    return {**kept, **plan.metadata}


@torch.no_grad()
def _tensors(plan: _Plan, file: TensorFile, progress: "_Counter") -> Iterator[tuple[str, Tensor | Iterator[bytes]]]:
    for key, slot in file.slots.items():
        changes = plan.changes.get((file.path, key))
        if changes is None:
            yield key, file.blocks(key)
        else:
            whole = file.read(key)
            for change in changes:
                _bake_in(change, whole, plan.mode)
            yield key, whole
        progress.add(slot.bytes)


def _bake_in(change: _Change, whole: Tensor, mode: str) -> None:
    change.place.put(whole, _mixed(change, change.place.take(whole), mode))
    if not bool(torch.isfinite(change.place.take(whole)).all()):
        raise ValueError(f"{change.path}: the new weight does not fit {whole.dtype}: lower the strengths")


def _mixed(change: _Change, stored: Tensor, mode: str) -> Tensor:
    """The new parameter in fp32 (fp64 stays), in the shape of the stored one."""
    mixed = stored if stored.dtype == torch.float64 else stored.float()
    terms = [
        term_of(part.what.to(dtype=torch.float32, device="cpu"), part.strength)
        for part in change.parts
        if not isinstance(part.what, Tensor)
    ]
    if terms:
        weight = mixed.T if _is_table(change.path) else mixed
        try:
            weight = MODES[mode](weight, terms)
        except ValueError as error:
            raise ValueError(f"{change.path}: {error}") from None
        mixed = weight.T if _is_table(change.path) else weight
    for part in change.parts:
        if isinstance(part.what, Tensor):
            mixed = mixed + part.strength * part.what.to(mixed.dtype).reshape(mixed.shape)
    return mixed


class _Counter:
    """Bytes written, for those who watch."""

    def __init__(self, report: Progress | None, rewritten: Sequence[TensorFile], copied: Sequence[Path]) -> None:
        self._report, self._done = report, 0
        self._total = sum(slot.bytes for file in rewritten for slot in file.slots.values())
        self._total += sum(path.stat().st_size for path in copied)

    def add(self, count: int) -> None:
        """So many more."""
        self._done += count
        if self._report is not None:
            self._report(self._done, self._total)


def _other_files(plan: _Plan) -> tuple[list[Path], list[Path]]:
    """The files of a folder to copy, and those to leave out: weights that would contradict the baked ones."""
    source, copied, left_out = plan.base.source, [], []
    rewritten = {file.path for file in plan.base.files if plan.of(file)}
    baked_folders = {path.parent for path in rewritten}
    for folder, names, files in os.walk(source):
        here = Path(folder)
        left_out += [here / name for name in names if name.startswith(".")]
        names[:] = [name for name in names if not name.startswith(".")]
        own = {*weight_files(here), main_weights(here)} if here in baked_folders else set()
        for path in (here / name for name in sorted(files)):
            is_second = here == source or here in baked_folders
            is_weights = path.name.endswith(_WEIGHTS) or ".index." in path.name
            if is_second and is_weights and path not in own:
                left_out.append(path)
            elif path not in rewritten:
                copied.append(path)
    return copied, left_out


def _copy(path: Path, target: Path, progress: _Counter) -> None:
    with open(path, "rb") as source, atomic_file(target) as file:
        while block := source.read(BLOCK_BYTES):
            file.write(block)
            progress.add(len(block))


def _check_output(source: Path, target: Path) -> None:
    mine, theirs = target.resolve(), source.resolve()
    if mine == theirs or theirs in mine.parents or mine in theirs.parents:
        raise ValueError(f"output {target} and base {source} lie one in the other: choose another name")
    if (target.suffix == ".safetensors") == source.is_dir():
        kind = "a folder" if source.is_dir() else "a .safetensors file"
        raise ValueError(f"output {target}: the base is {kind}, so expected the name of {kind}")
    if target.exists() and not _is_ours(target):
        raise ValueError(f"output {target} is there already and was not baked here: choose another name, or remove it")


def _is_ours(path: Path) -> bool:
    try:
        return any(NOTE in file.metadata for file in open_checkpoint(path).files)
    except ValueError:
        return False


@contextlib.contextmanager
def _taking_the_place_of(output: Path) -> Iterator[Path]:
    """A place to build in, beside `output`, which it becomes when the block ends without an error."""
    staging = output.with_name(f".{output.name}.baking")
    shutil.rmtree(staging, ignore_errors=True)  # of one that was killed
    staging.mkdir(parents=True)
    try:
        yield staging / output.name
        if output.is_dir():  # a folder cannot be replaced by another in one step
            os.rename(output, staging / "before")
        os.replace(staging / output.name, output)
        sync_folder(output.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
