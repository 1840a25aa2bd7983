"""What an adapter file holds, for people and for programs."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.adapters.matching import kind_in_words
from dora_diffusion.formats import Examined, load_examined, place_of
from dora_diffusion.formats.assembly import ToolMagnitudes
from dora_diffusion.formats.bundled_words import word_of, words_among
from dora_diffusion.formats.family_detection import family_evidence
from dora_diffusion.formats.keys import WIDENED
from dora_diffusion.formats.reading import as_stored
from dora_diffusion.pipelines.base_weights import BaseWeights
from dora_diffusion.state import AdapterState, Module

_SHOWN = 3  # examples of what may be thousands


def inspect_adapter(path: str | Path, *, base: BaseWeights | None = None) -> dict[str, Any]:
    """Facts about a file, ready for JSON: format, kind, ranks, axis, family, layers by part, norms, size, metadata.

    Args:
        path: an adapter file, a folder of PEFT's, or of a training run.
        base: a base to match it against; it also tells the axis where nothing else does.

    Raises:
        ValueError: the file is broken.
    """
    adapter, examined = load_to_inspect(path, base=base)
    return facts_of(Path(path), adapter, examined, base=base)


def load_to_inspect(
    path: str | Path, *, base: BaseWeights | None = None, family: str | None = None, strict: bool = True
) -> tuple[AdapterState, Examined]:
    """`load_examined`; magnitudes made for another tool are shown as they are stored where no base is at hand."""
    try:
        return load_examined(path, base=base, family=family, strict=strict)
    except ToolMagnitudes:
        return load_examined(path, base=as_stored, family=family, strict=strict)


def facts_of(
    path: Path, adapter: AdapterState, examined: Examined, *, base: BaseWeights | None = None
) -> dict[str, Any]:
    """`inspect_adapter` of a file that is loaded already."""
    told = family_evidence(adapter)
    facts: dict[str, Any] = {
        "file": str(path),
        "format": examined.format,
        "kind": kind_in_words(adapter),
        "family": told.family,
        "family_evidence": told.evidence,
        "ranks": list(adapter.ranks),
        "magnitude_axis": "/".join(_axes(adapter)) or None,
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in _tensors(adapter)}),
        "layers": dict(Counter(p.split(".", 1)[0] for p in adapter.modules)),
        "vectors": len(adapter.vectors),
        "keys_matched": examined.matched,
        "keys": examined.matched + len(examined.unknown),
        "unknown": sorted({*examined.unknown, *(key for key in adapter.extra if word_of(key) is None)})[:_SHOWN],
        "words": list(words_among(adapter.extra)),
        "notes": [*notes_of(adapter, examined), *_assumed(path, examined)],
        "parameters": sum(tensor.numel() for tensor in _tensors(adapter)),
        "delta_norm": _delta_norms(adapter),
        "bytes": _size_of(path),
        "sha256": examined.sha256,
        "metadata": {key: text for key, text in sorted(adapter.metadata.items()) if key != "lora_adapter_metadata"},
    }
    if base is not None:
        facts["matched"], facts["misfit"] = _matched(adapter, base)
    return facts


def _tensors(adapter: AdapterState) -> Iterable[Tensor]:
    for module in adapter.modules.values():
        yield from module.tensors.values()
    yield from adapter.vectors.values()


def _axes(adapter: AdapterState) -> list[str]:
    return sorted({module.axis for module in adapter.modules.values() if module.magnitude is not None}, reverse=True)


def _size_of(path: Path) -> int:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def notes_of(adapter: AdapterState, examined: Examined) -> list[str]:
    """What a person should know of a file: each a sentence, with a count and an example."""
    found = {
        "have alpha 0, so they draw nothing": [p for p, m in adapter.modules.items() if m.scale == 0],
        "have a rank above the sides of their weight": [p for p, m in adapter.modules.items() if m.rank > min(m.shape)],
        "have a difference of 0 everywhere": [p for p, m in adapter.modules.items() if _is_nothing(m)],
    }
    notes = [
        f"{len(paths)} of {len(adapter.modules)} layers {what}, such as {paths[0]}"
        for what, paths in found.items()
        if paths
    ]
    orphans = [key for key in adapter.extra if key.endswith(("dora_scale", "lora_magnitude_vector", "alpha"))]
    if orphans:
        notes.append(f"{len(orphans)} tensors belong to no pair, such as {orphans[0]}")
    if widened := [key for key in adapter.extra if key.endswith(f".{WIDENED}")]:
        notes.append(f"{len(widened)} layers are for a base that has more inputs there, such as {widened[0]}")
    if examined.debris:
        notes.append(
            f"a prefix stands twice, {', '.join(examined.debris)}, as broken scripts write it; read without it"
        )
    if examined.unknown:
        example = examined.unknown[0][:100]
        notes.append(f"{len(examined.unknown)} keys are not understood, such as {example}; they are kept")
    return notes


def _assumed(path: Path, examined: Examined) -> list[str]:
    """What is taken for granted of a file of PEFT's that has lost its folder."""
    if examined.format != "peft" or place_of(path).is_dir():
        return []
    return [
        "its scale stood in PEFT's adapter_config.json, which is not beside it; alpha is taken for the rank, scale 1"
    ]


def _is_nothing(module: Module) -> bool:
    """Whether a plain pair or a whole difference is 0: B is as it was before training."""
    factors = [tensor for name, tensor in module.tensors.items() if name in ("up", "diff")]
    return bool(factors) and not any(bool(factor.any()) for factor in factors)


def _delta_norms(adapter: AdapterState) -> dict[str, float]:
    """Root of the summed squared Frobenius norms of D, by part."""
    totals: dict[str, float] = {}
    for path, module in adapter.modules.items():
        part = path.split(".", 1)[0]
        norm = float(module.to(dtype=torch.float32).delta_norm())
        totals[part] = totals.get(part, 0.0) + norm**2
    return {part: round(total**0.5, 4) for part, total in totals.items()}


def _matched(adapter: AdapterState, base: BaseWeights) -> tuple[str, str | None]:
    """How many layers fit a base, and the first that does not."""
    misfits = [path for path, module in adapter.modules.items() if not _fits(path, module, base)]
    total = len(adapter.modules)
    return f"{total - len(misfits)} of {total} layers", misfits[0] if misfits else None


def _fits(path: str, module: Module, base: BaseWeights) -> bool:
    try:
        weight = base.weight(path)
    except ValueError:
        return False
    return (weight.shape[0], weight[0].numel()) == module.shape


def describe(facts: Mapping[str, Any]) -> str:
    """Facts as aligned lines."""
    ranks = facts["ranks"]
    rank = "/".join(map(str, ranks)) if len(ranks) < 6 else f"{ranks[0]} to {ranks[-1]}"
    axis = f", magnitudes per {facts['magnitude_axis']}put" if facts["magnitude_axis"] in ("in", "out") else ""
    lines = [f"{facts['file']}: {facts['kind']}, rank {rank}{axis}, {facts['format']} format"]
    rows = {"family": family_in_words(facts)}
    for part, count in facts["layers"].items():
        rows[part] = f"{count} layers, delta norm {facts['delta_norm'][part]}"
    if facts["vectors"]:
        rows["vectors"] = f"{facts['vectors']} biases and normalisations"
    if facts["words"]:
        rows["new words"] = ", ".join(map(_short, facts["words"]))
    rows["keys"] = f"{facts['keys_matched']} of {facts['keys']} understood"
    rows["parameters"] = f"{facts['parameters']:,} in {facts['bytes']:,} bytes ({', '.join(facts['dtypes'])})"
    rows["sha256"] = facts["sha256"]
    if "matched" in facts:
        misfit = f"; first that does not fit: {facts['misfit']}" if facts["misfit"] else ""
        rows["matches"] = facts["matched"] + misfit
    lines += [f"  {name:<16} {text}" for name, text in rows.items()]
    lines += [f"  note: {note}" for note in facts["notes"]]
    lines += [f"  {_short(key):<16} {_short(text, 100)}" for key, text in facts["metadata"].items() if text]
    return "\n".join(lines)


def family_in_words(facts: Mapping[str, Any]) -> str:
    """The family with what tells it, or what leaves it open."""
    family, evidence = facts["family"], facts["family_evidence"]
    return f"{family} ({evidence})" if family else f"not told: {evidence}"


def _short(text: str, limit: int = 40) -> str:
    line = " ".join(text.removeprefix("dora_diffusion.").split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
