"""`python -m benchmarks.fuzz [--count N] [--seed S]`: broken adapter files, read under watch -> docs/results/fuzz.md.

Files that break a promise are kept in the folder of `--keep`, each beside what came of it.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

# Before torch: one thread, so that time of the processor is time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.fuzz.report import report, summary  # noqa: E402
from benchmarks.fuzz.run import mutated_cases, special_cases, warm_up  # noqa: E402
from benchmarks.fuzz.watch import Watch  # noqa: E402
from dora_diffusion.utils.atomic import write_atomically  # noqa: E402


def main() -> int:
    """Make the files, have them read, write what came of it; 1 when any promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="mutated files, beside the special ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--keep", type=Path, help="a folder for files that broke a promise; a new temporary one")
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="fuzz-"))
    folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    warm_up(folder)
    with Watch() as watch:
        cases = list(special_cases(folder, watch))
        watch.renew()
        cases += mutated_cases(folder, watch, arguments.count, arguments.seed)
    command = f"python -m benchmarks.fuzz --count {arguments.count} --seed {arguments.seed}"
    found = summary(cases, command, time.perf_counter() - start)
    write_atomically(arguments.output / "fuzz.json", (json.dumps(found, indent=1) + "\n").encode())
    write_atomically(arguments.output / "fuzz.md", report(found).encode())
    broken = sum(bool(case.faults) for case in cases)
    print(f"{len(cases)} files, {broken} broke a promise" + (f"; they are kept in {folder}" if broken else ""))
    return min(broken, 1)


if __name__ == "__main__":
    sys.exit(main())
