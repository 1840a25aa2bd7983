"""`python -m benchmarks.training [--only beside,validation,peft] [--quick]` -> training.json and training.md."""

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from benchmarks.peers.__main__ import keep_freed_memory, machine
from benchmarks.peers.single_layers import Setting
from benchmarks.training import parts, report
from dora_diffusion.utils.atomic import write_atomically

PARTS = ("beside", "validation", "peft")


def main() -> int:
    """Measure the parts asked for; parts measured before stay in the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="beside diffusers' recipe, validation, peft")
    parser.add_argument("--quick", action="store_true", help="tiny shapes for SD1.5's: does it run, not how fast")
    parser.add_argument("--rounds", type=int, help="of every part; default: as many as tell")
    parser.add_argument("--output", type=Path, help="docs/results; with --quick a new temporary folder")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    if unknown := [part for part in wanted if part not in PARTS]:
        parser.error(f"--only {unknown[0]}: expected some of {','.join(PARTS)}")
    output = arguments.output or Path(tempfile.mkdtemp() if arguments.quick else "docs/results")
    file = output / "training.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if results and results["machine"].get("quick", False) != arguments.quick:
        parser.error(f"{file}: figures of tiny and of full shapes do not mix; name another --output")
    rounds = parts.Rounds() if arguments.rounds is None else parts.Rounds.few(arguments.rounds)
    _on_one_thread()
    for part in wanted:
        print(f"part {part}", flush=True)
        AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
        with tempfile.TemporaryDirectory() as folder:
            results[part] = _measured(part, Path(folder), rounds, is_quick=arguments.quick)
        AcceleratorState._reset_state()
        results["machine"] = _machine(is_quick=arguments.quick)
        write_atomically(file, (json.dumps(results, indent=1) + "\n").encode())
    print(f"wrote {report.write(results, output)}")
    return 0


def _on_one_thread() -> None:
    """Other threads' time would count as well as ours."""
    torch.set_num_threads(1)
    keep_freed_memory()
    logging.disable(logging.WARNING)  # what other libraries say at import


def _measured(part: str, folder: Path, rounds: parts.Rounds, *, is_quick: bool) -> Any:
    if part == "beside":
        return parts.beside_recipe(folder, rounds, is_quick=is_quick)
    if part == "validation":
        return parts.validation_share(folder, rounds)
    return parts.over_peft(rounds, is_quick=is_quick)


def _machine(*, is_quick: bool) -> dict[str, object]:
    facts = machine(Setting("cpu", torch.float32, 0, is_quick))
    return {name: value for name, value in facts.items() if name not in ("rounds", "lycoris-lora")}


if __name__ == "__main__":
    sys.exit(main())
