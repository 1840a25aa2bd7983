"""`python -m benchmarks.chaos [--kills N]`: training runs killed and given full disks -> docs/results/chaos.md."""

import argparse
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

# Before torch: a process that is forked has no threads but the one that forked it.
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from transformers.utils import logging  # noqa: E402

from benchmarks.chaos.features import KINDS, make_inputs  # noqa: E402
from benchmarks.chaos.report import Outcome, report, summary  # noqa: E402
from benchmarks.chaos.run import chaos_of  # noqa: E402
from dora_diffusion.training.base.trainable import load_base  # noqa: E402
from dora_diffusion.utils.atomic import write_atomically  # noqa: E402


def outcome_of(folder: Path, pipe: Any, kind: str, arguments: argparse.Namespace) -> Outcome:
    """What came of the runs of a kind: its share of the kills, and all full disks."""
    killed = chaos_of(folder, pipe, kind, steps=6)
    kills = killed.kill(-(-arguments.kills // len(KINDS)), arguments.seed)
    if arguments.no_full_disk:
        return Outcome(kills, [], killed.faults, killed.reference)
    filled = chaos_of(folder, pipe, kind, steps=2)
    return Outcome(kills, filled.fill_disk(), [*killed.faults, *filled.faults], killed.reference)


def main() -> int:
    """Kill, fill, compare, and write what came of it; 1 when anything was not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-full-disk", action="store_true", help="leave the full disks out")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="chaos-") as place:
        folder = Path(place)
        make_inputs(folder)
        pipe = load_base(str(folder / "base"), torch.float32)
        outcomes = [outcome_of(folder, pipe, kind, arguments) for kind in KINDS]
    command = f"python -m benchmarks.chaos --kills {arguments.kills} --seed {arguments.seed}"
    found = summary(outcomes, command)
    write_atomically(arguments.output / "chaos.json", (json.dumps(found, indent=1) + "\n").encode())
    write_atomically(arguments.output / "chaos.md", report(found).encode())
    print(f"{found['kills']} kills, {found['full']} full disks, {len(found['faults'])} faults")
    return min(1, len(found["faults"]))


if __name__ == "__main__":
    sys.exit(main())
