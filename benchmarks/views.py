"""What buckets save of pictures, and what kept views save of a step.

`python -m benchmarks.views FOLDER ...` trains each folder with buckets and as squares, times steps with fresh and with
kept views in turn, and writes docs/results/views.md. Each folder is taken as it is and once more trimmed to the shapes
of cameras and phones, as photos are before somebody cuts them square; the embedded base is trained on the CPU.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image, ImageOps

from dora_diffusion.training.base.sizes import Sizes, sizes_of
from dora_diffusion.training.base.trainable import TrainablePipeline, load_base, prepare_trainable
from dora_diffusion.training.config import DataConfig, TrainConfig
from dora_diffusion.training.data.batches import BatchSource
from dora_diffusion.training.data.buckets import bucket_of, in_buckets, kept_share
from dora_diffusion.training.data.concepts import checked_examples
from dora_diffusion.training.data.examples import Example
from dora_diffusion.training.run.train import train
from dora_diffusion.training.step.guard import Guard
from dora_diffusion.training.step.objective import Objectives
from dora_diffusion.training.step.optimisers import build_optimizer
from dora_diffusion.training.step.training_step import TrainingStep
from dora_diffusion.utils.atomic import write_atomically

PAGE = Path(__file__).parents[1] / "docs" / "results" / "views.md"
RESOLUTIONS = (512, 768, 1024)
SHAPES = {
    "square": (3000, 3000),
    "4:3, phones": (4032, 3024),
    "3:2, cameras": (6000, 4000),
    "16:9, screens": (1920, 1080),
    "9:20, phones' screens": (1080, 2400),
    "2:1": (4000, 2000),
}
"""What photos and drawings usually are, in pixels."""
TRIMMED = ((4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (1, 1))
"""Shapes that photos are trimmed to, in turn."""
VIEWS: Mapping[str, Mapping[str, object]] = {
    "centre, kept": {"crop": "center"},
    "random, kept (4 variants)": {"crop": "random", "flip": True, "cache_variants": 4},
    "random, fresh each step": {"crop": "random", "flip": True},
}
"""The first is what the others are compared with: nothing is encoded in a step."""


@dataclass(frozen=True)
class Lost:
    """What cropping takes of a folder's pictures, shares 0..1: mean and most, as buckets and as squares."""

    buckets: Sequence[float]
    squares: Sequence[float]
    sizes: int


def trimmed(folder: Path, place: Path) -> Path:
    """A folder in `place` with the photos of another, each trimmed around its middle to one of the shapes in turn."""
    made = place / f"{folder.name}, trimmed"
    made.mkdir()
    photos = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp"}]
    for number, path in enumerate(photos):
        with Image.open(path) as photo:
            size = ImageOps.contain(Image.new("1", TRIMMED[number % len(TRIMMED)]), photo.size).size
            ImageOps.fit(photo.convert("RGB"), size).save(made / f"{path.stem}.png")
    return made


def config_of(folder: Path, run: Path, steps: int, data: Mapping[str, object]) -> TrainConfig:
    """A short run on the embedded base."""
    sections = {
        "model": "pocket",
        "output_dir": run,
        "data": {"instance_dir": folder, "instance_prompt": f"a {folder.name}", **data},
        "optim": {"steps": steps, "learning_rate": 1e-3},
        "validation": {"every": 0},
        "checkpoint": {"every": 0},
    }
    return TrainConfig.model_validate(sections)


def lost(folder: Path, resolution: int) -> Lost:
    """At a resolution of a base of SDXL's kind."""
    sizes = Sizes(native=resolution, multiple=8, family="sdxl")
    data = DataConfig(instance_dir=folder, instance_prompt="a")
    examples = checked_examples(data, seed=0).train
    buckets = in_buckets(examples, data, sizes)
    squares = in_buckets(examples, data.model_copy(update={"buckets": False}), sizes)
    return Lost(_shares(buckets), _shares(squares), len({example.size for example in buckets}))


def _shares(examples: Sequence[Example]) -> list[float]:
    return [1 - float(kept_share(example.original, example.size)) for example in examples]


def step_times(folder: Path, steps: int) -> dict[str, list[float]]:
    """Seconds of each step, the ways of viewing taking turns on one pipeline."""
    times: dict[str, list[float]] = {name: [] for name in VIEWS}
    with tempfile.TemporaryDirectory() as run:
        configs = {name: config_of(folder, Path(run), 2 * steps, data) for name, data in VIEWS.items()}
        first = next(iter(configs.values()))
        trainable = prepare_trainable(load_base("pocket", torch.float32), first)
        takes = {name: _step_of(config, trainable) for name, config in configs.items()}
        for number in range(steps):
            for name, take in takes.items():
                start = time.perf_counter()
                take(number)
                times[name].append(time.perf_counter() - start)
    return times


def _step_of(config: TrainConfig, trainable: TrainablePipeline) -> Callable[[int], float]:
    examples = checked_examples(config.data, seed=0).train
    source = BatchSource(
        trainable, config, instances=in_buckets(examples, config.data, sizes_of(trainable.pipe)), classes=[]
    )
    optimizer = build_optimizer(trainable, config.optim, config.words)
    step = TrainingStep(
        config.optim,
        Accelerator(),
        trainable,
        Objectives(trainable.pipe, config.optim, config.flow).of,
        batches_at=source.batches_at,
        optimizer=optimizer,
        guard=Guard(config.guard, trainable.named_tensors(), optimizer),
    )
    source.prepare(index for number in range(config.optim.steps) for index in step.micro_batches(number))
    return step.take


def trained(folder: Path, steps: int) -> dict[str, tuple[float, float]]:
    """Loss on fixed noise before and after a run with buckets and one with squares."""
    losses = {}
    for name, buckets in (("buckets", True), ("squares", False)):
        with tempfile.TemporaryDirectory() as run:
            result = train(config_of(folder, Path(run), steps, {"buckets": buckets}))
        losses[name] = (result.validation[0][1], result.validation[-1][1])
    return losses


def page(folders: Sequence[Path], steps: int) -> str:
    """The report in Markdown."""
    lines = [
        "# What buckets and kept views save",
        "",
        "`python -m benchmarks.views FOLDER ...` on folders of photos which are not part of this repository; embedded "
        f"base, {os.cpu_count()} CPU cores, torch {torch.__version__.split('+')[0]}. Trimmed: the same photos cut "
        "around their middle to 4:3, 3:4, 3:2, 2:3, 16:9 and 1:1 in turn.",
        "",
        "## How much of a picture is cropped off",
        "",
        "Mean and most of each folder's pictures, at the sizes of a base with sides in multiples of 8.",
        "",
        "| folder | resolution | sizes | buckets | one square |",
        "| --- | --- | --- | --- | --- |",
    ]
    for folder in folders:
        for resolution in RESOLUTIONS:
            found = lost(folder, resolution)
            lines.append(
                f"| {folder.name} | {resolution} | {found.sizes} | {_mean_and_most(found.buckets)} | "
                f"{_mean_and_most(found.squares)} |"
            )
    lines += ["", "## By shape", "", "What is cropped off a picture at 1024 pixels, where it is large enough.", ""]
    lines += ["| shape | bucket | in its bucket | in a square |", "| --- | --- | --- | --- |"]
    for shape, picture in SHAPES.items():
        bucket = bucket_of(picture, resolution=1024, multiple=8)
        cut, square = (100 * (1 - float(kept_share(picture, size))) for size in (bucket, (1024, 1024)))
        lines.append(f"| {shape} | {bucket[0]}x{bucket[1]} | {cut:.1f} % | {square:.1f} % |")
    lines += [
        "",
        f"## Trained for {steps} steps",
        "",
        "Loss on fixed noise, before and after; the two see other crops.",
        "",
    ]
    lines += ["| folder | buckets | one square |", "| --- | --- | --- |"]
    for folder in folders:
        losses = trained(folder, steps)
        lines.append(f"| {folder.name} | " + " | ".join(f"{a:.4f}, {b:.4f}" for a, b in losses.values()) + " |")
    lines += ["", "## Seconds a step", "", f"Median of {steps} steps each, taken in turn; {folders[0].name}.", ""]
    lines += ["| views | seconds | over the first |", "| --- | --- | --- |"]
    times = step_times(folders[0], steps)
    base = statistics.median(next(iter(times.values())))
    for name, taken in times.items():
        median = statistics.median(taken)
        lines.append(f"| {name} | {median:.3f} | {median / base:.2f} |")
    return "\n".join(lines) + "\n"


def _mean_and_most(shares: Sequence[float]) -> str:
    return f"{100 * statistics.mean(shares):.1f} %, {100 * max(shares):.1f} %"


def main() -> int:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of photos")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=PAGE)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folders = [both for folder in arguments.folders for both in (folder, trimmed(folder, Path(place)))]
        write_atomically(arguments.output, page(folders, arguments.steps).encode())
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
