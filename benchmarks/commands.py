"""How long quick commands take beside `import torch`, with which each alternates: `python -m benchmarks.commands`.

Every run is a process of its own with one thread. A command's ratio is the median over the rounds of its time by that
of the `import torch` just before it, so that what else the machine does weighs on both.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import dora_diffusion as dd

ROOT = Path(__file__).parent.parent
ROBOT = ROOT / "examples" / "subject-robot"
TORCH = (sys.executable, "-c", "import torch")
# Command -> the ratio that it is meant to stay under.
TARGETS: Mapping[str, float] = {"doctor": 0.5, "inspect": 1.5, "convert": 1.5, "train --dry-run": 4, "generate": 3}


@dataclass(frozen=True)
class Cost:
    """A process: seconds on the wall, and of the CPU, its own and the system's."""

    wall: float
    cpu: float


def commands(folder: Path) -> dict[str, list[str]]:
    """Name -> arguments, with an adapter of the pocket base in a folder."""
    pipe = dd.load_pipeline("pocket")
    file = dd.save_adapter(dd.inject(pipe.unet, dd.DoRAConfig()).state().under("unet"), folder / "ink.safetensors")
    draw = ["--prompt", "a red apple", "--steps", "4", "--adapter", f"{file}:0.8", "--output", str(folder / "out.png")]
    return {
        "doctor": ["doctor", str(ROBOT / "images")],
        "inspect": ["inspect", str(file)],
        "convert": ["convert", str(file), str(folder / "kohya.safetensors"), "--to", "kohya"],
        "train --dry-run": ["train", str(ROBOT / "subject.yaml"), "--dry-run"],
        "generate": ["generate", *draw],
    }


def cost_of(arguments: Sequence[str]) -> Cost:
    """Run a process to its end.

    Raises:
        RuntimeError: it failed.
    """
    silence = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)]
    started = time.perf_counter()
    process = os.posix_spawn(
        arguments[0], list(arguments), {**os.environ, "OMP_NUM_THREADS": "1"}, file_actions=silence
    )
    _, status, used = os.wait4(process, 0)
    if status:
        raise RuntimeError(f"{' '.join(arguments)} failed; run it by hand to see why")
    return Cost(time.perf_counter() - started, used.ru_utime + used.ru_stime)


def measure(rounds: int) -> dict[str, list[tuple[Cost, Cost]]]:
    """Command -> (`import torch`, command) of every round."""
    costs: dict[str, list[tuple[Cost, Cost]]] = {name: [] for name in TARGETS}
    with tempfile.TemporaryDirectory() as folder:
        run = commands(Path(folder))
        for number in range(rounds):
            for name in TARGETS:
                torch = cost_of(TORCH)
                costs[name].append((torch, cost_of([sys.executable, "-m", "dora_diffusion.cli", *run[name]])))
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return costs


def report(costs: Mapping[str, Sequence[tuple[Cost, Cost]]], rounds: int) -> str:
    """The page."""
    torches = [torch for pairs in costs.values() for torch, _ in pairs]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
    lines = [
        "# Quick commands beside `import torch`",
        "",
        f"`python -m benchmarks.commands --rounds {rounds}`, or `make bench-commands`. {os.cpu_count()} cores,",
        f"one thread each; load average {os.getloadavg()[1]:.1f} at the end; {packages}. Medians of {rounds} rounds;",
        f"`import torch` runs before every command and takes {median(t.wall for t in torches):.2f} s,",
        f"{median(t.cpu for t in torches):.2f} s of the CPU. On a machine that does other",
        "work the ratio of CPU times says more than that of the wall's.",
        "",
        "| command | seconds | CPU, s | seconds by torch's | CPU by torch's | target | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_line(name, pairs) for name, pairs in costs.items()),
    ]
    return "\n".join(lines) + "\n"


def _line(name: str, pairs: Sequence[tuple[Cost, Cost]]) -> str:
    wall = median(command.wall / torch.wall for torch, command in pairs)
    cpu = median(command.cpu / torch.cpu for torch, command in pairs)
    seconds = median(command.wall for _, command in pairs), median(command.cpu for _, command in pairs)
    target = TARGETS[name]
    told = f"{seconds[0]:.2f} | {seconds[1]:.2f} | {wall:.2f} | {cpu:.2f} | {target:g}"
    return f"| {name} | {told} | {'met' if cpu <= target else 'missed'} |"


def main() -> int:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "commands.md")
    arguments = parser.parse_args()
    arguments.output.write_text(report(measure(arguments.rounds), arguments.rounds), encoding="utf-8")
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
