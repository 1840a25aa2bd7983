"""`python -m benchmarks.app.payloads`: hostile payloads against a served app -> docs/results/payloads.md."""

import argparse
import json
import os
import sys
import time
import warnings
from contextlib import ExitStack, redirect_stderr
from pathlib import Path

# Before torch: one thread, as the other results have it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.app.payloads.base import random_base, two_adapters  # noqa: E402
from benchmarks.app.payloads.browser import seen_by_browser  # noqa: E402
from benchmarks.app.payloads.kinds import DRAWN, health_and_drawing  # noqa: E402
from benchmarks.app.payloads.report import report, summary  # noqa: E402
from benchmarks.app.payloads.run import all_judged  # noqa: E402
from benchmarks.app.payloads.target import target_over  # noqa: E402
from dora_diffusion.utils.atomic import write_atomically  # noqa: E402


def main() -> int:
    """Send them all, write what they came to; 1 when any promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.app.payloads", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="where the app's own tracebacks go")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    pipe = random_base()
    with ExitStack() as stack:
        stack.enter_context(redirect_stderr(stack.enter_context(arguments.log.open("w"))))
        target = stack.enter_context(target_over(pipe, two_adapters(pipe)))
        healths = [health_and_drawing(target)]
        outcomes = list(all_judged(target))
        healths.append(health_and_drawing(target))
        seen = seen_by_browser(target.app.url)
    found = summary(outcomes, healths, seen, (time.perf_counter() - start, time.process_time()))
    write_atomically(arguments.output / "payloads.json", (json.dumps(found, indent=1) + "\n").encode())
    write_atomically(arguments.output / "payloads.md", report(found).encode())
    faults = [] if seen is None else seen.faults()
    faults += [str(health["sound_call"]) for health in healths if health["sound_call"] != DRAWN]
    print(f"{found['payloads']} payloads, {found['broken']} broke a promise", *faults, sep="\n")
    return int(found["broken"] > 0 or bool(faults))


if __name__ == "__main__":
    sys.exit(main())
