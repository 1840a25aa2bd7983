"""Training runs on the robot of examples/subject-robot that differ in one thing, compared seed by seed.

*Likeness* is that of `dora-diffusion evaluate`: to true drawings that were not trained on. *Kept* is the likeness of
what an adapter draws of other things to what the base draws of them, from the same noise: of captions of the prior, and
of others.

A run that is there is not trained again, one that was cut short goes on, and figures that are there are read: start a
comparison again after whatever stopped it. All runs of a folder are of one commit, or it refuses to go on.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image
from tqdm import tqdm

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.evaluate.adapter import Truth, evaluate_adapter
from dora_diffusion.evaluate.likeness import likeness
from dora_diffusion.generation.generate import GenerationSettings, generate
from dora_diffusion.pipelines.loading import load_pipeline
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.examples import find_examples
from dora_diffusion.training.run.train import train
from dora_diffusion.utils.atomic import write_atomically
from dora_diffusion.utils.images import read_image

ROOT = Path(__file__).parent.parent
ROBOT = ROOT / "examples" / "subject-robot"
SEEDS = (0, 1, 2)
# What no prior asks with and no picture of the robot shows.
OTHERS = (
    "a noto style pizza on a red background",
    "a twemoji style butterfly in a meadow",
    "a flat style teddy bear in the snow",
    "a noto style castle under a starry sky",
    "a small twemoji style guitar on the beach",
    "a flat style rocket in the desert",
)
FIGURES = {
    "likeness": "likeness to the robot",
    "asked": "kept, captions of the prior",
    "others": "kept, other captions",
}
DRAWN_SEEDS = (11, 12)

Scores = Mapping[str, float]
ConfigOf = Callable[[str, int], TrainConfig]
Found = Mapping[str, Sequence[Scores]]


@dataclass(frozen=True)
class Page:
    """What a page of results says around its figures.

    Attributes:
        name: of its files in the folder of results.
        title: its heading.
        about: lines under it.
        arms: the heading of the first column.
        pairs: which arms are compared; None = each with all before it.
    """

    name: str
    title: str
    about: tuple[str, ...]
    arms: str
    pairs: tuple[tuple[str, str], ...] | None = None


def compare(
    page: Page, arms: Sequence[str], config_of: ConfigOf, *, seeds: Sequence[int], draws: int
) -> Iterator[Found]:
    """Train and measure what is missing; all that there is after each whole seed, so that it can be compared early."""
    found: dict[str, list[Scores]] = {arm: [] for arm in arms}
    for seed in seeds:
        for arm in arms:
            print(f"{page.name}: {arm}, seed {seed}", file=sys.stderr)
            found[arm].append(scores_of(config_of(arm, seed), draws))
        yield found


def write(page: Page, found: Found, output: Path, *, commit: str, command: str, more: Mapping[str, Any]) -> None:
    """The page and its figures, in a folder of results."""
    figures = {"commit": commit, **more, "arms": found}
    write_atomically(output / f"{page.name}.json", (json.dumps(figures, indent=1) + "\n").encode())
    write_atomically(output / f"{page.name}.md", report(page, found, commit, command).encode())
    print(f"wrote {output / page.name}.md")


def trained(config: TrainConfig) -> Path:
    """The adapter of a run, trained, gone on with, or there already."""
    adapter = config.output_dir / "adapter.safetensors"
    if not adapter.exists():
        train(config, resume="latest" if any(config.output_dir.glob("checkpoints/step-*")) else None)
    return adapter


def scores_of(config: TrainConfig, draws: int) -> dict[str, float]:
    """The figures of a trained adapter, kept beside it."""
    path = config.output_dir / "figures.json"
    if not path.exists():
        adapter = trained(config)
        assert config.evaluation.truth_dir is not None
        truths = [
            Truth(read_image(example.path), example.caption)
            for example in find_examples(config.evaluation.truth_dir, instance_prompt=None)
        ]
        likeness_of = evaluate_adapter(adapter, truths, config.output_dir, model=config.model, seeds=draws)
        asked = TrainConfig.from_yaml(ROBOT / "subject.yaml").prior.prompts
        found = {"before": likeness_of.before, "likeness": likeness_of.after, "ceiling": likeness_of.ceiling}
        found |= {"asked": kept(adapter, asked, config.model), "others": kept(adapter, OTHERS, config.model)}
        write_atomically(path, json.dumps(found).encode())
    figures: dict[str, float] = json.loads(path.read_text())
    return figures


def kept(adapter: Path, captions: Sequence[str], model: str) -> float:
    """Mean likeness of what is drawn with an adapter to what the base draws, of the same captions and noise."""
    settings = [GenerationSettings(caption, seed=seed) for caption in captions for seed in DRAWN_SEEDS]
    before, pipe = drawn_by_base(tuple(settings), model), load_pipeline(model)
    manager = AdapterManager(pipe)
    manager.load_adapter(adapter, name="adapter")
    manager.set_adapters({"adapter": 1.0})
    after = [generate(pipe, one) for one in tqdm(settings, desc="adapter")]
    return mean(likeness(b, a, one.prompt) for a, b, one in zip(before, after, settings, strict=True))


@cache
def drawn_by_base(settings: tuple[GenerationSettings, ...], model: str) -> list[Image.Image]:
    """What every adapter is compared with; drawn once."""
    pipe = load_pipeline(model)
    return [generate(pipe, one) for one in tqdm(settings, desc="base")]


def verdict(first: Sequence[float], second: Sequence[float]) -> str:
    """Which of two arms is higher, seed by seed; a tie where the seeds do not agree."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    told = f"{mean(differences):+.3f} ({min(differences):+.3f} to {max(differences):+.3f})"
    if all(difference > 0 for difference in differences):
        return f"higher, {told}"
    return f"lower, {told}" if all(difference < 0 for difference in differences) else f"tie, {told}"


def report(page: Page, found: Found, commit: str, command: str) -> str:
    """The page."""
    count, first = len(next(iter(found.values()))), next(iter(found.values()))[0]
    lines = [
        f"# {page.title}",
        "",
        f"`{command}`, commit `{commit}`.",
        *page.about,
        f"The pocket base learns the robot of `examples/subject-robot`, {count} seeds an arm. Of likeness the base",
        f"alone reaches {first['before']:.3f}, the true drawings through the autoencoder {first['ceiling']:.3f}.",
        "Kept is the likeness of other things to how the base draws them from the same noise; 1 is unchanged.",
        "Mean over the seeds, and the lowest and highest.",
        "",
        f"| {page.arms} | " + " | ".join(FIGURES.values()) + " |",
        "| --- " * (1 + len(FIGURES)) + "|",
        *(f"| {arm} | " + " | ".join(_cell(runs, figure) for figure in FIGURES) + " |" for arm, runs in found.items()),
        "",
        "Seed by seed; where the seeds do not agree on the sign it is a tie, whatever the mean says.",
        "",
        "| | " + " | ".join(FIGURES.values()) + " |",
        "| --- " * (1 + len(FIGURES)) + "|",
        *_comparisons(found, page.pairs or _all_pairs(list(found))),
    ]
    return "\n".join(lines) + "\n"


def _cell(runs: Sequence[Scores], figure: str) -> str:
    values = [run[figure] for run in runs]
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _all_pairs(arms: Sequence[str]) -> list[tuple[str, str]]:
    return [(arm, other) for index, arm in enumerate(arms) for other in arms[:index]]


def _comparisons(found: Found, pairs: Sequence[tuple[str, str]]) -> list[str]:
    rows = []
    for arm, other in pairs:
        told = [verdict([run[name] for run in found[arm]], [run[name] for run in found[other]]) for name in FIGURES]
        rows.append(f"| {arm} against {other} | " + " | ".join(told) + " |")
    return rows


def commit_of(folder: Path) -> str:
    """The commit that all runs of a folder are of.

    Raises:
        SystemExit: the code has been changed since, or is not committed.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    if git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs"):  # the page itself is written there
        raise SystemExit("there are changes that are not committed; commit them, so that the figures have a commit")
    now, path = git("rev-parse", "--short=12", "HEAD"), folder / "commit"
    begun = path.read_text() if path.exists() else now
    if begun != now:
        raise SystemExit(f"{folder}: its runs are of commit {begun}, this is {now}; check that out or use other --runs")
    write_atomically(path, now.encode())
    return now
