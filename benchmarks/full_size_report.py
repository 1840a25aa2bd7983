"""full-size.json -> full-size.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Results = Mapping[str, Any]
_GIB, _MIB = 2**30, 2**20


def write(results: Results, folder: Path) -> Path:
    """Write the report into a folder."""
    models = results["models"]
    sections = [
        _HEAD,
        _parameters(models),
        _layers(models),
        _sizes(models),
        _memory(models),
        _peaks(results["measured"]),
    ]
    path = folder / "full-size.md"
    path.write_text("\n\n".join(section for section in sections if section) + "\n")
    return path


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def _millions(number: float) -> str:
    return f"{number / 1e6:,.1f} M"


def _parameters(models: Results) -> str:
    rows = []
    for name, model in models.items():
        for part, facts in model["parts"].items():
            published = facts["published_millions"]
            rows.append(
                [
                    *(name, model["family"], part, facts["kind"], _millions(facts["parameters"])),
                    "-" if published is None else _millions(1e6 * published),
                ]
            )
    return _PARAMETERS + _table(["model", "family", "part", "class", "counted", "published"], rows)


def _layers(models: Results) -> str:
    rows = [
        [name, part, *(f"{found[preset]} of {found['total']}" for preset in ("attention", "all-linear", "all"))]
        + [str(found["outside"]), str(found["unmatched"])]
        for name, model in models.items()
        for part, found in model["coverage"].items()
    ]
    return _LAYERS + _table(["model", "part", "attention", "all-linear", "all", "outside", "unmatched"], rows)


def _sizes(models: Results) -> str:
    ranks = list(next(iter(models.values()))["sizes"]["attention"])
    rows = [
        [name, preset, *(f"{s['numbers'] / 1e6:.2f} M, {s['bytes'] / 1e6:.1f} MB" for s in sizes.values())]
        for name, model in models.items()
        for preset, sizes in model["sizes"].items()
    ]
    return _SIZES + _table(["model", "preset", *(f"rank {rank}" for rank in ranks)], rows)


def _memory(models: Results) -> str:
    rows = []
    for name, model in models.items():
        plain, spared = model["memory"]["plain"], model["memory"].get("checkpointing")
        trained = plain["adapters"] + plain["gradients"] + plain["optimiser"]
        texts = sum(size for part, size in plain["weights"].items() if part.startswith("text_encoder"))
        numbers = [sum(plain["weights"].values()), texts, trained, _activations(plain), plain["total"]]
        numbers += [_activations(spared), spared["total"]] if spared else []
        cells = [f"{number / _GIB:.2f}" for number in numbers]
        rows.append([name, str(plain["side"]), *cells, *["diffusers has none"] * (7 - len(cells))])
    header = [
        "model",
        "px",
        "weights",
        "of them text encoders",
        "adapter, gradients, AdamW",
        "activations",
        "**in all**",
    ]
    return _MEMORY + _table([*header, "activations, checkpointing", "**in all, checkpointing**"], rows)


def _activations(memory: Results) -> float:
    others = sum(memory["weights"].values()) + memory["adapters"] + memory["gradients"] + memory["optimiser"]
    return float(memory["total"] - others)


def _peaks(measured: Results) -> str:
    if not measured:
        return ""
    rows = [
        [
            *(case, f"{facts['estimate'] / _MIB:,.0f}", f"{facts['measured'] / _MIB:,.0f}"),
            f"{facts['measured'] / facts['estimate']:.2f}",
            f"{(facts['measured'] - facts['estimate'] + facts['activations']) / facts['activations']:.2f}",
        ]
        for case, facts in measured.items()
    ]
    header = ["case", "estimate, MiB", "measured, MiB", "measured / estimate", "of the activations alone"]
    return _PEAKS + _table(header, rows)


_HEAD = """# Full size, without weights

`make full-size` writes this page and full-size.json: about ten minutes on one core, and memory for SDXL's UNet in bf16.
No weights are needed or were had: every published architecture is built from its config on torch's meta device, where
tensors have shapes and no numbers. Whether pictures come out right is shown on small models (docs/families.md); this
page shows that the real ones are matched, how large adapters get, and what memory training takes."""

_PARAMETERS = """## Parameters

Counted on the meta device, beside what was published: a wrong config would show here. Where the published number is
round, so is its source.

"""

_LAYERS = """## Layers matched by each preset

Of all linear, convolution and embedding layers of a part. `outside` are those that no preset adapts, by name; nothing
may be left that neither a preset nor a name covers.

"""

_SIZES = """## Size of an adapter

DoRA on the denoiser: A, B and m, fp32 as they are written.

"""

_MEMORY = """## Memory of training

Estimated GiB on a GPU: one picture of the native size, captions of full length, bf16, DoRA of rank 16 on attention
layers. A step was taken on shapes alone and every storage counted while it lived; norms and softmax in fp32, as CUDA's
autocast does. Weights are those of all parts, for `train` keeps text encoders and VAE beside the denoiser. Where
checkpointing spares so much that encoding the picture by the VAE takes more than the step, that is what is given. On
top come the CUDA context (about half a GiB), what cuDNN and the attention kernels use while they run, and the gaps of
the allocator; none of it could be measured here, where there was no GPU.

"""

_PEAKS = """## The estimate beside measured peaks

On the CPU: resident memory of a process at its peak in a training step (VmHWM), less what it held before there was a
model. The estimate is made for the CPU's kernels and autocast. Random weights; for the published models the denoiser
and the VAE alone.

"""
