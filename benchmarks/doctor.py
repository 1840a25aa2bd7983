"""How long the doctor takes for a large set: `python -m benchmarks.doctor`.

The set is made first, of the examples' pictures: each is a part of one of them under patches and grain of its own, a
JPEG of 1024x768 or 768x1024 that compresses as photos do, with a caption. Faults are planted in it, and must be found.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from dora_diffusion.utils.atomic import write_atomically

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "examples").glob("*/images/*.png"))
SIDES = (1024, 768)
TARGET = 120.0
_LONG = "a photo of a robot on a red background " * 12
# One in so many pictures has each of the faults.
_EVERY = 100
_TEXTURES = 32


@cache
def _texture(number: int) -> Image.Image:
    """A part of one of the sources, with grain."""
    rng = np.random.default_rng(number)
    with Image.open(SOURCES[number % len(SOURCES)]) as source:
        left, top, side = *rng.integers(0, source.width // 2, 2), source.width // 2
        part = source.convert("RGB").resize(SIDES, Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    grain = rng.normal(0, 10, (SIDES[1], SIDES[0], 1))
    return Image.fromarray((np.asarray(part) + grain).clip(0, 255).astype(np.uint8))


def _make(place: tuple[Path, int]) -> None:
    """Picture `number` of a folder, and its caption."""
    folder, number = place
    patches = np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    mixed = Image.fromarray(patches).resize(SIDES, Image.Resampling.BILINEAR)
    # With equal shares, two of one texture may rightly be found to be nearly the same.
    picture = Image.blend(_texture(number % _TEXTURES), mixed, 0.8)
    if number % 2:
        picture = picture.transpose(Image.Transpose.ROTATE_90)
    picture.save(folder / f"{number}.jpg", quality=90)
    caption = _LONG if number % _EVERY == 3 else f"a photo of robot number {number}, a drawing with patches"
    (folder / f"{number}.txt").write_text(caption, encoding="utf-8")


def make_set(folder: Path, count: int) -> dict[str, int]:
    """Make the pictures; kind of fault -> how many of it there are."""
    with ProcessPoolExecutor(initializer=os.nice, initargs=(5,)) as pool:  # others come first
        for done, _ in enumerate(pool.map(_make, [(folder, n) for n in range(count)], chunksize=50), start=1):
            if not done % 1000:
                print(f"made {done} of {count}", file=sys.stderr)
    spoilt = range(0, count - 10, _EVERY)
    for number in spoilt:
        damaged, again, anew = (folder / f"{number + add}.jpg" for add in (5, 7, 9))
        damaged.write_bytes(damaged.read_bytes()[:20_000])
        again.write_bytes((folder / f"{number + 6}.jpg").read_bytes())
        with Image.open(folder / f"{number + 8}.jpg") as picture:
            picture.resize((picture.width // 2, picture.height // 2)).save(anew, quality=70)
    return {"corrupt": len(spoilt), "duplicate": 2 * len(spoilt), "cut-caption": len(range(3, count, _EVERY))}


def found_in(report: str) -> dict[str, int]:
    """Kind of fault -> how many the doctor found."""
    line = next((line for line in report.splitlines() if line.startswith("found: ")), "")
    return {kind: int(count) for count, kind in re.findall(r"(\d+) ([a-z-]+)", line)}


def measure(folder: Path, arguments: Sequence[str]) -> tuple[float, float, str]:
    """Seconds on the wall and of the CPU of one command, and what it printed.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "dora_diffusion.cli", "doctor", str(folder), *arguments]
    before, started = os.times(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wall, after = time.perf_counter() - started, os.times()
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, used, done.stdout


def page(
    count: int,
    rows: Mapping[str, tuple[float, float]],
    planted: Mapping[str, int],
    kilobytes: float,
    loads: Sequence[float],
) -> str:
    """What is written down; `loads` are the machine's before and after."""
    faults = ", ".join(f"{number} {kind}" for kind, number in planted.items())
    lines = [
        f"# The doctor on {count:,} pictures",
        "",
        f"`python -m benchmarks.doctor --count {count}`. {os.cpu_count()} cores; load average {loads[0]:.1f} before",
        f"the first command and {loads[1]:.1f} after the last. JPEGs of 1024x768, about {kilobytes:.0f} KB each, with",
        "captions, made of the examples' pictures and read from the system's cache of files; the faults that were",
        f"planted ({faults}) were all found, and no others.",
        "",
        "| command | seconds | CPU, s | a second | target, s | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, (wall, used) in rows.items():
        target = TARGET * count / 10_000
        verdict = "met" if wall <= target else "missed"
        lines.append(f"| {name} | {wall:.1f} | {used:.1f} | {count / wall:.0f} | {target:g} | {verdict} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Make, measure, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "doctor.md")
    arguments = parser.parse_args()
    rows: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planted = make_set(folder, arguments.count)
        kilobytes = sum(path.stat().st_size for path in folder.glob("*.jpg")) / arguments.count / 1000
        before = os.getloadavg()[0]
        for title, more in (
            ("doctor FOLDER", []),
            (
                "doctor FOLDER --model pocket --resolution 512 --sheet",
                ["--model", "pocket", "--resolution", "512", "--sheet", str(folder.parent / f"{folder.name}.png")],
            ),
        ):
            wall, used, report = measure(folder, more)
            rows[title] = wall, used
            expected = {kind: number for kind, number in planted.items() if more or kind != "cut-caption"}
            if found_in(report) != expected:
                raise RuntimeError(f"{title}: found {found_in(report)}, expected {expected}")
            print(f"{title}: {wall:.1f} s, {used:.1f} s of the CPU", file=sys.stderr)
        (folder.parent / f"{folder.name}.png").unlink()
    text = page(arguments.count, rows, planted, kilobytes, (before, os.getloadavg()[0]))
    write_atomically(arguments.output, text.encode())
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
