"""What an adapter file holds, for people and for programs."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from dora_diffusion.formats import detect_format, load_adapter
from dora_diffusion.state import AdapterState
from dora_diffusion.storage import sha256_of


def inspect_adapter(path: str | Path, *, model: str | None = None) -> dict[str, Any]:
    """Facts about a file, ready for JSON: format, kind, ranks, layers by part, norms, size, hash, metadata.

    Args:
        path: the file.
        model: a base to match it against; loads it.

    Raises:
        ValueError: the file is broken, or does not fit the base.
    """
    adapter = load_adapter(path)
    facts: dict[str, Any] = {
        "file": str(path),
        "format": detect_format(path),
        "kind": _kind(adapter),
        "ranks": list(adapter.ranks),
        "magnitude_axis": "out" if adapter.is_dora else None,
        "layers": dict(Counter(p.split(".", 1)[0] for p in adapter.modules)),
        "parameters": _parameters(adapter),
        "delta_norm": _delta_norms(adapter),
        "bytes": Path(path).stat().st_size,
        "sha256": sha256_of(Path(path)),
        "metadata": {key: value for key, value in adapter.metadata.items() if key.startswith("dora_diffusion.")},
    }
    if model is not None:
        facts["matched"] = _matched(path, model)
    return facts


def _kind(adapter: AdapterState) -> str:
    with_magnitude = sum(module.magnitude is not None for module in adapter.modules.values())
    if with_magnitude == 0:
        return "LoRA"
    return "DoRA" if with_magnitude == len(adapter.modules) else f"DoRA in {with_magnitude} layers, LoRA in the rest"


def _parameters(adapter: AdapterState) -> int:
    return sum(
        tensor.numel()
        for module in adapter.modules.values()
        for tensor in module.tensors.values()
    )


def _delta_norms(adapter: AdapterState) -> dict[str, float]:
    """Root of the summed squared Frobenius norms of s B A, by part."""
    totals: dict[str, float] = {}
    for path, module in adapter.modules.items():
        part = path.split(".", 1)[0]
        norm = float(torch.linalg.vector_norm(module.to(dtype=torch.float32).delta()))
        totals[part] = totals.get(part, 0.0) + norm**2
    return {part: round(total**0.5, 4) for part, total in totals.items()}


def _matched(path: str | Path, model: str) -> str:
    from dora_diffusion.adapters import AdapterManager
    from dora_diffusion.pipelines import load_pipeline

    report = AdapterManager(load_pipeline(model)).load_adapter(path, name="inspected")
    return f"{report.matched} of {report.total} layers"


def describe(facts: dict[str, Any]) -> str:
    """Facts as aligned lines."""
    lines = [f"{facts['file']}: {facts['kind']}, rank {'/'.join(map(str, facts['ranks']))}, {facts['format']} format"]
    for part, count in facts["layers"].items():
        lines.append(f"  {part:<16} {count} layers, delta norm {facts['delta_norm'][part]}")
    lines.append(f"  {'parameters':<16} {facts['parameters']:,} in {facts['bytes']:,} bytes")
    lines.append(f"  {'sha256':<16} {facts['sha256']}")
    if "matched" in facts:
        lines.append(f"  {'matches':<16} {facts['matched']}")
    lines += [
        f"  {key.removeprefix('dora_diffusion.'):<16} {value}" for key, value in facts["metadata"].items() if value
    ]
    return "\n".join(lines)
