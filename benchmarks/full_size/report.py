"""full-size.json -> full-size.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_diffusion.utils.atomic import write_atomically

Results = Mapping[str, Any]
_GIB, _MIB = 2**30, 2**20


def write(results: Results, folder: Path) -> Path:
    """Write the report into a folder."""
    models = results["models"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    sections = [
        f"{_HEAD}\n\nWith {versions}.",
        _parameters(models),
        _layers(models),
        _sizes(models),
        _memory(models),
        _peaks(results["measured"]),
    ]
    path = folder / "full-size.md"
    write_atomically(path, ("\n\n".join(section for section in sections if section) + "\n").encode())
    return path


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def _parameters(models: Results) -> str:
    users: dict[tuple[str, int, float | None], list[str]] = {}
    for name, model in models.items():
        for facts in model["parts"].values():
            key = (facts["kind"], facts["parameters"], facts["published_millions"])
            users.setdefault(key, []).append(name)
    rows = [
        [kind, ", ".join(names), f"{counted / 1e6:,.1f}", "-" if published is None else f"{published:,.0f}"]
        for (kind, counted, published), names in users.items()
    ]
    return _PARAMETERS + _table(["class", "of", "counted, M", "published, M"], rows)


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


_KINDS = ("plain", "checkpointing", "half of the blocks swapped", "low-memory")


def _memory(models: Results) -> str:
    rows = []
    for name, model in models.items():
        plain = model["memory"]["plain"]
        trained = plain["adapters"] + plain["gradients"] + plain["optimiser"]
        weights = sum(plain["weights"].values()), plain["weights"][plain["denoiser"]]
        cells = [f"{number / _GIB:.2f}" for number in (*weights, trained)]
        rows.append([name, str(plain["side"]), *cells, *(_at_worst(model["memory"].get(kind)) for kind in _KINDS)])
    header = ["model", "px", "weights", "of the denoiser", "adapter, gradients, AdamW", *_KINDS]
    return _MEMORY + _table(header, rows)


def _at_worst(memory: Results | None) -> str:
    """The most that is held, and when, where that is no step."""
    if memory is None:
        return "diffusers has none"
    when = "" if memory["worst_moment"].startswith("a step") else f", {memory['worst_moment']}"
    return f"**{memory['total'] / _GIB:.2f}**{when}"


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
    return _PEAKS + _table(header, rows) + _reading(measured)


def _reading(measured: Results) -> str:
    """What the published models' peaks say; the pocket's are measured in another way."""
    facts = [facts for case, facts in measured.items() if not case.startswith("pocket")]
    if not facts:
        return ""
    ratios = [found["measured"] / found["estimate"] for found in facts]
    over = [(found["measured"] - found["estimate"]) / _MIB for found in facts]
    return _READING.format(low=min(ratios), high=max(ratios), least=min(over), most=max(over))


_HEAD = """# Full size, without weights

`make full-size` writes this page and full-size.json: some twenty minutes on one core, 8 GiB of memory for the last
table. `--only NAME ...` and `--cases CASE ...` (`FULL_SIZE_FLAGS`) repeat a part.

No weights are needed or were had: every published architecture is built from its config on torch's meta device, where
tensors have shapes and no numbers. That families predict, train, save and draw as they should is shown on small models
(docs/families.md); this page shows that layers of the real ones are matched, how large adapters get, and what memory
training takes."""

_PARAMETERS = """## Parameters

Counted on the meta device, beside what model cards and papers say, rounded: a wrong config would show here.

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
layers. A step was taken on shapes alone and every storage counted while it lived; norms, softmax and powers in fp32, as
torch documents CUDA's autocast. A component is on the device while it is used: the most that is held at once is given,
and when that is, where it is not in a step (reading captions by a large text encoder, encoding a picture in fp32).
Swapped blocks and the preset `low-memory` (nf4 and bf16) are with gradient checkpointing. `train --dry-run` prints the
same for a config of one's own, and with `--memory 24` the settings that fit.

Not in it: the CUDA context (about half a GiB), workspaces of cuDNN and of attention kernels, and the allocator's gaps.
Nothing here was measured on a GPU. Attention is taken to keep no scores, which needs a kernel that fuses it for the
head's size and the mask.

"""

_PEAKS = """## The estimate beside measured peaks

On one CPU core: resident memory of a process at its peak in a training step (VmHWM), less what it held before there was
a model. The estimate is made for the CPU's kernels and autocast. Random weights; of the published models the denoiser
and the VAE alone, from pixels to AdamW's step. The last column leaves out weights, adapter, gradients and AdamW, which
anyone can count.

"""

_READING = """

Of the published models {low:.2f} to {high:.2f} of the estimate were measured. What is over, {least:.0f} to {most:.0f}
MiB, grows neither with the model nor with the picture: probably kernels that oneDNN compiles, and its scratch memory.
`train` itself is measured after a first run in the same process, whose leftovers the second uses."""
