"""training.json -> training.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.training.beside import CAPTION, DORA
from benchmarks.training.parts import LISTED
from dora_diffusion.utils.atomic import write_atomically

Results = Mapping[str, Any]
_OUTSIDE = {
    "latents and captions kept": 0.05,
    "no latents kept": 0.10,
    "no latents kept, every caption another": 0.10,
}
_ROUNDS_THAT_TELL = 4
_ABOUT = """# What a training step costs

`make bench-train` writes this page and training.json; leave the machine alone meanwhile. User CPU seconds of one
thread. Ways of doing the same work take turns in one process, one step each; of the rounds counts the third in which
all ways together took the least. A figure is the median of those rounds, in brackets its quartiles; a ratio is taken
round by round. A target is met when the upper quartile meets it, missed when the lower does not, and open between,
or where fewer than four rounds count.

*diffusers' recipe* is examples/dreambooth/train_dreambooth_lora.py at commit 58eb52c, said again in
benchmarks/training/dreambooth.py for it is no part of the library: a LoRA, every picture read and encoded at every
step, the prompt too unless `--pre_compute_text_embeddings` is given. *Ours* is the trainer's own step of a default
run, which keeps latents and captions; *no latents kept* sees another crop and mirroring at every step. Both train the
same attention layers of one base at the same rank on the same pictures, without trackers, previews and checkpoints."""


def write(results: Results, folder: Path) -> Path:
    """Write the page into a folder."""
    facts = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    sections = [_ABOUT, f"Measured on: {facts}.", _targets(results)]
    if "beside" in results:
        sections.append(_outside(results["beside"]))
    sections += [_beside(case) for case in results.get("beside", [])]
    if "validation" in results:
        sections.append(_validation(results["validation"]))
    if "peft" in results:
        sections.append(_peft(results["peft"]))
    path = folder / "training.md"
    write_atomically(path, ("\n\n".join(sections) + "\n").encode())
    return path


def verdict(spread: Results, limit: float) -> str:
    """Whether a value is at most a limit, as far as its quartiles tell; those of three rounds tell nothing."""
    if spread["rounds"] < _ROUNDS_THAT_TELL:
        return "open"
    return "yes" if spread["high"] <= limit else "no" if spread["low"] > limit else "open"


def _number(spread: Results, *, digits: int = 3) -> str:
    return f"{spread['median']:.{digits}f} ({spread['low']:.{digits}f}-{spread['high']:.{digits}f})"


def _percent(spread: Results) -> str:
    return f"{100 * spread['median']:.1f} % ({100 * spread['low']:.1f}-{100 * spread['high']:.1f})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def _name(case: Results) -> str:
    return f"{case['base']}, {case['side']} px, batch {case['batch_size']}"


def _targets(results: Results) -> str:
    rows = []
    for case in results.get("beside", []):
        found = case["ways"][DORA]["over_recipe"]
        row = [f"our DoRA's step over diffusers' LoRA recipe; {_name(case)}", "<= 1"]
        rows.append([*row, _number(found), verdict(found, 1.0)])
    if "validation" in results:
        share = results["validation"]["share"]
        rows.append(["validation's share of a default run", "<= 10 %", _percent(share), verdict(share, 0.1)])
    if "peft" in results:
        found = results["peft"]["ways"]["our DoRA"]["over_peft"]
        rows.append(["SD1.5's step over PEFT LoRA's", "<= 1.05", _number(found), verdict(found, 1.05)])
    return "## Targets\n\n" + _table(["", "target", "measured", "met"], rows)


def _outside(cases: Sequence[Results]) -> str:
    rows = []
    for case in cases:
        for kept, limit in _OUTSIDE.items():
            row = [_name(case), kept, f"<= {100 * limit:.0f} %"]
            for spread in case["outside"][kept].values():
                row += [_percent(spread), verdict(spread, limit)]
            rows.append(row)
    header = ["", "", "target", "norms counted as forward", "met", "norms counted outside", "met"]
    return (
        "## Our DoRA's step outside its forward and backward passes\n\n"
        "The norms of W + s B A are part of DoRA's forward pass by its equation; our trainer takes them once a step, "
        "before it. Captions that are made up anew (shuffled tags) are encoded for 64 steps at a time, which turns of "
        "one step do not show: as many as a step has pictures are added.\n\n" + _table(header, rows)
    )


def _beside(case: Results) -> str:
    header = ["", "seconds", "over the recipe", *LISTED, "rest"]
    rows = []
    for name, way in case["ways"].items():
        if name == CAPTION:
            rows.append([name, _number(way["seconds"]), *["" for _ in header[2:]]])
            continue
        shares = [way["shares"][part]["median"] for part in LISTED]
        told = [f"{100 * value:.1f} %" for value in (*shares, 1 - sum(shares))]
        rows.append([name, _number(way["seconds"]), _number(way["over_recipe"]), *told])
    rounds = next(iter(case["ways"].values()))["seconds"]["rounds"]
    return (
        f"## Beside diffusers' recipe: {_name(case)}\n\n{rounds} of {case['of_rounds']} rounds. Shares of a step: "
        "*batch* is reading and encoding pictures and text, *norms* what DoRA needs before its forward pass, *rest* "
        "noise, loss, cutting gradients and the guard.\n\n" + _table(header, rows)
    )


def _validation(found: Results) -> str:
    return (
        f"## Validation\n\nThe pocket, batch 1, {found['share']['rounds']} of {found['of_rounds']} rounds. "
        f"A step takes {_number(found['step'])} s, a measurement {_number(found['measurement'])} s. A default run has "
        f"{found['steps']} steps and {found['times']} measurements, which so take {_percent(found['share'])} of it."
    )


def _peft(found: Results) -> str:
    rows = [[name, _number(way["seconds"]), _number(way["over_peft"])] for name, way in found["ways"].items()]
    rounds = next(iter(found["ways"].values()))["seconds"]["rounds"]
    return (
        f"## SD1.5's UNet beside PEFT\n\nForward, backward and AdamW with random weights, rank 16 on attention, "
        f"256 px, batch 1, fp32; {rounds} of {found['of_rounds']} rounds.\n\n"
        + _table(["", "seconds", "over PEFT's LoRA"], rows)
    )
