"""`python -m benchmarks.full_size`: the published models at their real size, without weights -> full-size.md."""

import argparse
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks.full_size import report as full_size_report
from benchmarks.full_size.models import describe
from benchmarks.full_size.published import PUBLISHED
from dora_diffusion.utils.atomic import write_atomically


def main() -> int:
    """Describe what is asked for, keep the rest of the results file, and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--only", nargs="*", metavar="NAME", help="models, as published.py names them; default: all")
    parser.add_argument("--cases", nargs="*", metavar="CASE", help="measured peaks, default: all")
    arguments = parser.parse_args()
    path = arguments.output / "full-size.json"
    results = json.loads(path.read_text()) if path.is_file() else {"models": {}, "measured": {}}
    for model in PUBLISHED:
        if arguments.only is None or model.name in arguments.only:
            print(model.name, flush=True)
            results["models"][model.name] = json.loads(json.dumps(describe(model)))
            write_atomically(path, json.dumps(results, indent=1).encode())
    for case in _wanted_cases(arguments.cases):
        print(case, flush=True)
        command = [sys.executable, "-m", "benchmarks.full_size.measured_peaks", case]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results["measured"][case] = json.loads(done.stdout.splitlines()[-1])
        write_atomically(path, json.dumps(results, indent=1).encode())
    results["versions"] = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    order = [model.name for model in PUBLISHED if model.name in results["models"]]
    results["models"] = {name: results["models"][name] for name in order}
    write_atomically(path, json.dumps(results, indent=1).encode())
    print(f"wrote {full_size_report.write(results, arguments.output)}")
    return 0


def _wanted_cases(asked: list[str] | None) -> list[str]:
    from benchmarks.full_size.measured_peaks import CASES

    return list(CASES) if asked is None else asked


if __name__ == "__main__":
    raise SystemExit(main())
