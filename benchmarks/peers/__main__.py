"""`python -m benchmarks.peers [--only a,b,c,d] [--quick]`: measure, keep in bench.json, write report and plots."""

import argparse
import ctypes
import json
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # its profiler, which counts memory, is talkative

import torch  # noqa: E402

from benchmarks.peers import models, operations, report, single_layers  # noqa: E402
from benchmarks.peers.single_layers import Setting  # noqa: E402

PARTS: dict[str, Callable[[Setting], object]] = {
    "a": single_layers.measure,
    "n": single_layers.measure_norm,
    "b": models.measure,
    "c": operations.measure,
    "d": single_layers.measure_growth,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> int:
    """Measure the parts asked for; parts measured before stay in the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--only", default="a,n,b,c,d", help="a layers, n norm, b models, c operations, d growth")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run, not how fast")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--output", type=Path, help="docs/results; with --quick a new temporary folder")
    arguments = parser.parse_args()
    output = arguments.output or Path(tempfile.mkdtemp() if arguments.quick else "docs/results")
    keep_freed_memory()
    logging.disable(logging.WARNING)  # what other libraries say at import
    wanted = arguments.only.split(",")
    if unknown := [part for part in wanted if part not in PARTS]:
        parser.error(f"--only {unknown[0]}: expected some of {','.join(PARTS)}")
    setting = Setting(arguments.device, DTYPES[arguments.dtype], arguments.rounds, arguments.quick)
    file = output / "bench.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    if results and results["machine"].get("quick", False) != arguments.quick:
        parser.error(f"{file}: figures of tiny and of full shapes do not mix; name another --output")
    for part in wanted:
        print(f"part {part}", flush=True)
        results[part] = PARTS[part](setting)
        results["machine"] = machine(setting)
        output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {report.write(results, output)}")
    return 0


def keep_freed_memory() -> None:
    """Let glibc's allocator keep what is freed.

    By default it gives large blocks back to the system, and whether an activation costs page faults then depends on
    what else happens to be allocated: the same forward was seen to take from 2.4 to 5 s.
    """
    if sys.platform == "linux":
        trim_threshold, mmap_max = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)


def machine(setting: Setting) -> dict[str, object]:
    """What the figures were measured on."""
    from importlib.metadata import version

    names = ("torch", "diffusers", "peft", "lycoris-lora")
    return {
        "processor": _processor() if setting.device == "cpu" else torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "rounds": setting.rounds,
        "quick": setting.is_quick,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    sys.exit(main())
