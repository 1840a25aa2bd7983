"""`python -m benchmarks.gpu [--output DIR] [--only tests,memory,steps,hotswap,app]` -> gpu.json and gpu.md.

Without a GPU, `--device cpu --tiny --output DIR` runs the same on tiny shapes: it tells that the script works.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu.report import page
from benchmarks.gpu.sections import SECTIONS, Outcome, outcome_of, plain, run_here
from benchmarks.gpu.setting import Setting
from dora_diffusion.utils.atomic import write_atomically

RESULTS = Path(__file__).parents[2] / "docs" / "results"
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes")


def main() -> int:
    """Run the sections and write what they came to; 1 when anything went wrong."""
    arguments = _arguments()
    if arguments.section is not None:
        setting = Setting(arguments.device, arguments.tiny, arguments.seconds)
        return run_here(arguments.section, setting, arguments.file)
    outcomes: dict[str, Outcome] = {}
    for name in arguments.only:
        print(f"{SECTIONS[name].title} ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            outcomes[name] = outcome_of(
                name, arguments.device, Path(folder), is_tiny=arguments.tiny, is_here=arguments.here
            )
        print(f"  {outcomes[name].seconds:.0f} s; {'; '.join(outcomes[name].faults) or 'as it should'}", flush=True)
        _write(arguments.output, outcomes, arguments.device, is_tiny=arguments.tiny)
    print(f"wrote {arguments.output / 'gpu.md'}")
    return int(any(outcome.faults for outcome in outcomes.values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: does it run, not how fast")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, by comma")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of gpu.md and gpu.json")
    parser.add_argument("--here", action="store_true", help="all in this process, without limits of time")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.only = arguments.only.split(",")
    if unknown := [name for name in arguments.only if name not in SECTIONS]:
        parser.error(f"--only {unknown[0]}: expected some of {','.join(SECTIONS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; --device cpu --tiny --output DIR tells that it runs")
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu: expected --tiny beside it; whole models would take hours")
    if arguments.tiny and arguments.section is None and arguments.output.resolve() == RESULTS.resolve():
        parser.error("--tiny: its figures are none for docs/results; name another --output")
    return arguments


def _write(folder: Path, outcomes: dict[str, Outcome], device: str, *, is_tiny: bool) -> None:
    """After each section, so that what was measured is there whatever comes."""
    machine = _machine(device)
    record = {"machine": machine, "tiny": is_tiny, "sections": {name: plain(one) for name, one in outcomes.items()}}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "gpu.json", (json.dumps(record, indent=1) + "\n").encode())
    write_atomically(folder / "gpu.md", page(outcomes, machine, is_tiny=is_tiny).encode())


def _machine(device: str) -> dict[str, object]:
    card: dict[str, object] = {"device": device}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        card = {"device": properties.name, "memory": f"{properties.total_memory / 2**30:.0f} GiB"}
    return {**card, "cores": os.cpu_count(), "python": platform.python_version(), **_versions()}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


if __name__ == "__main__":
    sys.exit(main())
