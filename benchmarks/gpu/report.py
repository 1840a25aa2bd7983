"""What the sections came to -> gpu.md."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.gpu.sections import SECTIONS, Outcome
from benchmarks.gpu.setting import Row

_MIB = 2**20
_ABOUT = """# On a GPU

`make gpu` writes this page and gpu.json, in under ten minutes; each section runs in a process of its own with a limit
of its own. Models have random weights. On a machine without an environment:

```
python3 -m venv .venv
.venv/bin/python -m pip install -c constraints.txt torch  # on Linux the build with CUDA
.venv/bin/python -m pip install -c constraints.txt -e '.[ui,dev,quantised]'
.venv/bin/python -m benchmarks.gpu --output docs/results
```

Any Python with these packages will do; what is missing costs its section alone."""
_TINY = "**Tiny shapes: this page tells that the script runs, and no more. Where it says 1024 pixels, there were 64.**"


def page(outcomes: Mapping[str, Outcome], machine: Mapping[str, object], *, is_tiny: bool) -> str:
    """The whole page."""
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    head = [
        _ABOUT,
        *([_TINY] if is_tiny else []),
        f"Measured on: {facts}.",
        _sum(outcomes),
    ]
    return "\n\n".join([*head, *(_section(name, outcome) for name, outcome in outcomes.items())]) + "\n"


def _sum(outcomes: Mapping[str, Outcome]) -> str:
    rows = [
        [SECTIONS[name].title, f"{outcome.seconds:.0f} s", "; ".join(outcome.faults) or "as it should"]
        for name, outcome in outcomes.items()
    ]
    return _table(["section", "took", "went"], rows)


def _section(name: str, outcome: Outcome) -> str:
    lines = [f"## {SECTIONS[name].title}"]
    if outcome.error is not None:
        lines.append(f"**Did not come to its end:** {outcome.error}")
    if outcome.rows:
        lines.append(_TABLES[name](outcome.rows))
    return "\n\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _why(row: Row) -> str | None:
    """Why there is nothing in a row."""
    return f"**{row['error']}**" if "error" in row else f"left out: {row['left_out']}" if "left_out" in row else None


def _mib(value: Any) -> str:
    return f"{value / _MIB:,.0f} MiB" if isinstance(value, int | float) else str(value)


def _tests(rows: Sequence[Row]) -> str:
    counts = [[str(row[kind]) for kind in ("passed", "failed", "skipped")] for row in rows]
    wrong = [f"- `{line}`" for row in rows for line in row["wrong"]]
    return _table(["passed", "failed", "skipped"], counts) + "".join(f"\n{line}" for line in ["", *wrong] if wrong)


def _memory(rows: Sequence[Row]) -> str:
    cells = []
    for row in rows:
        name = [row["name"], "yes" if row["checkpointing"] else "no"]
        if why := _why(row):
            cells.append([*name, why, "", ""])
        else:
            share = f"{100 * row['error_share']:+.1f} %" if "error_share" in row else ""
            cells.append([*name, _mib(row["estimate"]), _mib(row["measured"]), share])
    about = (
        "The trainer's own step, DoRA of rank 16 on attention, bf16, one picture of 1024 pixels; the VAE beside the "
        "denoiser, no text encoders. Measured: `torch.cuda.max_memory_allocated`.\n\n"
    )
    return about + _table(["", "checkpointing", "estimate", "measured", "estimate over measured"], cells)


def _steps(rows: Sequence[Row]) -> str:
    cells = []
    for row in rows:
        name = [row["name"], row["way"]]
        if "adapters" not in row:
            cells.append([*name, _why(row) or "", "", "", "", ""])
            continue
        for adapter, one in row["adapters"].items():
            cells.append([*name, adapter, *_adapter(one, row["peaks"].get(adapter, one.get("peak", "")))])
    about = (
        "Forward, backward and AdamW, rank 16 on attention, one picture of 1024 pixels, adapters in fp32. Medians of "
        "rounds in which the adapters take turns on one base; in brackets the quartiles of the ratio. *Block swap*: "
        "half of the blocks in main memory, with checkpointing. *Compile*: block by block, one adapter after another; "
        "the peak is what a step holds beside what was there before.\n\n"
    )
    differ = [f"\n- {row['name']}, {row['way']}: {row['differs']}" for row in rows if "differs" in row]
    table = _table(["", "", "adapter", "step", "over PEFT LoRA", "peak", "compiled"], cells)
    if not differ:
        return about + table
    beyond = "Beyond what bf16's rounding should make of adapters that compute the same, over the largest output:"
    return f"{about}{table}\n\n{beyond}\n{''.join(differ)}"


def _adapter(one: Row, peak: Any) -> list[str]:
    if why := _why(one):
        return [why, "", "", ""]
    ratio = f"{one['over_peft']:.3f}" if "over_peft" in one else ""
    ratio += f" ({one['low']:.3f}-{one['high']:.3f})" if "low" in one else ""
    compiled = ""
    if "first" in one:
        compiled = f"{one['first']:.1f} s, {one['graphs']} graphs, then {one['recompiled']} more"
    return [f"{1000 * one['seconds']:.1f} ms", ratio, _mib(peak), compiled]


def _hot_swap(rows: Sequence[Row]) -> str:
    cells = []
    for row in rows:
        if "swaps" not in row:
            cells.append([row["name"], _why(row) or "", "", "", "", "", ""])
            continue
        times = [f"{row['first_draw']:.1f} s", f"{1000 * row['swap']:.0f} ms", f"{1000 * row['draw']:.0f} ms"]
        cells.append([row["name"], *map(str, (row["swaps"], row["graphs"], row["recompiled"])), *times])
    return _table(["", "swaps", "graphs", "compiled anew", "first draw", "a swap", "a draw of 2 steps"], cells)


def _app(rows: Sequence[Row]) -> str:
    cells = []
    for row in rows:
        if "requests" not in row:
            cells.append([row["name"], _why(row) or "", "", "", "", ""])
            continue
        times = [f"{row['median']:.2f} s", f"{row['worst']:.2f} s", f"{row['a_second']:.2f}"]
        cells.append([row["name"], row["device"], f"{row['done']} of {row['requests']}", *times])
    about = "Random mixes, curves, masks and samplers on a random pocket, 64 x 64 pixels in two steps.\n\n"
    return about + _table(["", "drawn on", "done", "median wait", "worst", "pictures a second"], cells)


_TABLES: Mapping[str, Callable[[Sequence[Row]], str]] = {
    "tests": _tests,
    "memory": _memory,
    "steps": _steps,
    "hotswap": _hot_swap,
    "app": _app,
}
