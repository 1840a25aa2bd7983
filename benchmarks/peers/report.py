"""bench.json -> bench.md and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

Results = Mapping[str, Any]
COLOURS = {"PEFT": "#9aa5b1", "LyCORIS": "#c9b79c", "our": "#2f6fab"}


def write(results: Results, folder: Path) -> Path:
    """Write the report and its plots into a folder."""
    sections = [_head(results["machine"])]
    if {"b", "c", "n"} <= results.keys():
        sections.append(_targets(results))
    writers = {"b": _models, "c": _operations, "a": _layers, "n": _norm, "d": _growth}
    sections += [write_part(results[part]) for part, write_part in writers.items() if part in results]
    if "b" in results:
        _plot_steps(results["b"], folder / "bench-steps.png")
    if "c" in results and "d" in results:
        _plot_growth(results, folder / "bench-growth.png")
    path = folder / "bench.md"
    path.write_text("\n\n".join(sections) + "\n")
    return path


def _head(machine: Results) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    return f"""# What it costs

`make bench` writes this page, bench.json and the plots. All variants of a comparison stand on the same base weights in
one process, hold the same A, B and m (that they compute the same is checked first), and are timed in turns. A ratio is
a median over a median; in brackets the quartiles of the ratios round by round. Shared machine: read the brackets.
On Linux glibc's allocator is told to keep freed memory, which spares whoever makes large temporaries the page faults.

Measured on: {facts}."""


def _ratio(timing: Results) -> str:
    return f"{timing['ratio']:.2f} ({timing['low']:.2f}-{timing['high']:.2f})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def _over(timings: Results, name: str, reference: str) -> float:
    """Median over median, whatever the reference in the file."""
    return float(timings[name]["seconds"] / timings[reference]["seconds"])


def _targets(results: Results) -> str:
    unet, ops = results["b"][0], results["c"]
    step, norm, inference = unet["step"], results["n"]["seconds"], ops["inference"]
    text = [a for a in results.get("a", []) if a["shape"]["tokens"] == 77]
    peak = unet["peak_bytes"]

    def whole(name: str) -> float:
        return (unet["weight_bytes"] + peak["our DoRA"]) / (unet["weight_bytes"] + peak[name])

    rows = [
        ("SD1.5 training step over PEFT LoRA's", "<= 1.05", _over(step, "our DoRA", "PEFT LoRA"), True),
        ("SD1.5 training step: PEFT DoRA's over ours", ">= 1.27", _over(step, "PEFT DoRA", "our DoRA"), False),
        ("peak memory of that step, weights and all, over PEFT LoRA's", "<= 1.05", whole("PEFT LoRA"), True),
        ("the same without the base's weights, which both hold", "<= 1.05", peak["our DoRA"] / peak["PEFT LoRA"], True),
        ("the same over PEFT DoRA's", "< 1.00", peak["our DoRA"] / peak["PEFT DoRA"], True),
        ("norm of 3072x3072, rank 16: dense over ours", ">= 15", _over(norm, "dense", "factored"), False),
        ("the same: as PEFT does it over ours", ">= 15", _over(norm, "as PEFT", "factored"), False),
        ("guided step, three DoRAs unfused, over the bare UNet", "<= 1.12", inference["ours x3"]["ratio"], True),
        (
            "guided step, three DoRAs fused, over the bare UNet",
            "1.00 (taken as <= 1.02)",
            inference["ours x3, fused"]["ratio"],
            True,
        ),
        ("re-weighting three, ms", "<= 50", 1e3 * ops["operations"]["re-weight three"]["seconds"], True),
        (
            "fuse of three over reading and writing once",
            "near 1 (taken as <= 1.5)",
            ops["operations"]["fuse three"]["ratio"],
            True,
        ),
    ]
    for layer in text:
        kinds = {"norm taken": "our DoRA, norms not kept", "norm kept (a step's later micro-batches)": "our DoRA"}
        for kind, name in kinds.items():
            ratio = _over(layer["forward_backward"], "PEFT DoRA", name)
            rows.append((f"{layer['shape']['name']}: PEFT DoRA over ours, {kind}", ">= 2", ratio, False))
    cells = [[what, target, f"{got:.2f}", _verdict(target, got, at_most)] for what, target, got, at_most in rows]
    return "## Targets\n\n" + _table(["", "target", "measured", "met"], cells)


def _verdict(target: str, got: float, at_most: bool) -> str:
    bound = float(target.split()[-1].rstrip(")"))
    return "yes" if (got <= bound if at_most else got >= bound) else "no"


def _models(parts: Sequence[Results]) -> str:
    lines = ["## Training step (forward, backward, AdamW), rank 16 on attention, batch 1"]
    for part in parts:
        step, kept, peak = part["step"], part["kept_bytes"], part["peak_bytes"]
        rows = [
            [
                name,
                f"{timing['seconds']:.3f} s",
                f"{_over(step, name, 'base'):.2f}",
                _ratio(timing),
                f"{kept[name] / 2**20:.0f} MiB" if name in kept else "",
                f"{peak[name] / 2**20:.0f} MiB",
            ]
            for name, timing in step.items()
        ]
        header = ["", "median", "over the base", "over PEFT LoRA", "kept for backward", "peak beyond weights"]
        lines.append(f"### {part['model']}, {part['layers']} layers\n\n{_table(header, rows)}")
    lines.append("![training steps](bench-steps.png)")
    return "\n\n".join(lines)


def _operations(part: Results) -> str:
    inference = [[n, f"{t['seconds']:.3f} s", _ratio(t)] for n, t in part["inference"].items()]
    timings = {name: value for name, value in part["operations"].items() if isinstance(value, Mapping)}
    operations = [[n, f"{1e3 * t['seconds']:.1f} ms", f"{t['ratio']:.2f}"] for n, t in timings.items()]
    facts = part["operations"]
    return f"""## Guided inference step of SD1.5's UNet (batch 2, 32x32 latents, rank-16 DoRAs on attention)

{_table(["", "median", "over the bare UNet"], inference)}

## Operations on it ({facts["weight_bytes"] / 2**20:.0f} MiB of adapted weights)

{_table(["", "median", "over reading and writing the weights once"], operations)}

After PEFT's merge and unmerge of three DoRAs {facts["layers_restored_bitwise_by_peft"]} of {facts["layers"]} layers
hold their old bytes; after ours all do (tests/unit/adapters/test_manager.py)."""


def _layers(parts: Sequence[Results]) -> str:
    names = [name for name in parts[0]["forward"] if name != "base"]
    lines = ["## Single linear layers, rank 16, over the bare layer"]
    for key, title in (("forward", "Forward"), ("forward_backward", "Forward + backward")):
        rows = [[p["shape"]["name"], *(_ratio(p[key][name]) for name in names)] for p in parts]
        lines.append(f"### {title}\n\n{_table(['', *names], rows)}")
    rows = [[p["shape"]["name"], *(f"{p['peak_bytes'][n] / 2**20:.1f}" for n in ("base", *names))] for p in parts]
    lines.append(f"### Peak memory of forward + backward, MiB\n\n{_table(['', 'base', *names], rows)}")
    return "\n\n".join(lines)


def _norm(part: Results) -> str:
    largest = part["largest_tensor_bytes"]
    rows = [
        [name, f"{1e3 * t['seconds']:.1f} ms", _ratio(t), f"{largest[name] / 2**20:.2f} MiB"]
        for name, t in part["seconds"].items()
    ]
    size = part["size"]
    return f"""## Norm of a {size}x{size} layer, rank 16

{_table(["", "median", "over ours", "largest tensor made"], rows)}

Largest relative difference of factored and dense: {part["relative_error"]:.1e}."""


def _growth(part: Results) -> str:
    lines = [f"## How a {part['size']}x{part['size']} layer's forward + backward grows, over the bare layer"]
    for key in ("rank", "tokens"):
        names = [name for name in next(iter(part[key].values())) if name != "base"]
        rows = [[value, *(_ratio(timings[name]) for name in names)] for value, timings in part[key].items()]
        lines.append(_table([key, *names], rows))
    lines.append("![growth](bench-growth.png)")
    return "\n\n".join(lines)


def _colour(name: str) -> str:
    return next((colour for start, colour in COLOURS.items() if name.startswith(start)), "#555555")


def _plot_steps(parts: Sequence[Results], path: Path) -> None:
    figure, axes = plt.subplots(1, len(parts), figsize=(4 * len(parts), 3.2), sharey=True)
    for axis, part in zip(axes, parts, strict=True):
        step = part["step"]
        names = [name for name in step if name != "base"]
        values = [_over(step, name, "base") for name in names]
        bars = axis.barh(names[::-1], values[::-1], color=[_colour(name) for name in names[::-1]])
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.axvline(1, color="#555555", linewidth=1)
        axis.set_xlim(0, 1.2 * max(values))
        axis.set_title(part["model"], fontsize=10)
        axis.set_xlabel("training step over the frozen base")
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _plot_growth(results: Results, path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    for axis, key in zip(axes, ("rank", "tokens"), strict=False):
        table = results["d"][key]
        for name in [name for name in next(iter(table.values())) if name != "base"]:
            places = [int(value) for value in table]
            style = "--" if name.endswith("LoRA") else "-"
            ratios = [timings[name]["ratio"] for timings in table.values()]
            axis.plot(places, ratios, style, marker="o", color=_colour(name), label=name)
        axis.set_xscale("log", base=2)
        axis.set_xlabel(key)
        axis.set_ylabel("forward + backward over the bare layer")
        axis.legend(fontsize=8)
    inference = results["c"]["inference"]
    ours = {int(name[6:]): t["ratio"] for name, t in inference.items() if name.startswith("ours x") and "," not in name}
    axes[2].plot(list(ours), list(ours.values()), marker="o", color=COLOURS["our"], label="ours, unfused")
    theirs = {1: inference["PEFT DoRA x1"]["ratio"], 3: inference["PEFT DoRA x3"]["ratio"]}
    axes[2].plot(list(theirs), list(theirs.values()), marker="o", color=COLOURS["PEFT"], label="PEFT DoRA")
    axes[2].set_xlabel("adapters blended")
    axes[2].set_ylabel("guided step over the bare UNet")
    axes[2].legend(fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
