"""What each way of prior preservation, and masks, do to likeness and drift: `python -m benchmarks.priors`.

The robot of examples/subject-robot is trained on the pocket base once for each arm and seed. *Likeness* is that of
`dora-diffusion evaluate`: to true drawings that were not trained on. *Kept* is the likeness of what the adapter draws
of other things to what the base draws of them, from the same noise: of captions of the prior, and of others. Masks are
what differs from the background that a picture's caption names.

A run that is there is not trained again, one that was cut short goes on, and figures that are there are read: start it
again after whatever stopped it. All runs are of one commit, or it refuses to go on.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image, ImageChops
from tqdm import tqdm

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.evaluate.adapter import Truth, evaluate_adapter
from dora_diffusion.evaluate.likeness import likeness
from dora_diffusion.generation.generate import GenerationSettings, generate
from dora_diffusion.pipelines.loading import load_pipeline
from dora_diffusion.pretrain.scenes import background, background_in
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.examples import find_examples
from dora_diffusion.training.run.train import train
from dora_diffusion.utils.atomic import atomic_file, write_atomically
from dora_diffusion.utils.images import read_image

ROOT = Path(__file__).parent.parent
ROBOT = ROOT / "examples" / "subject-robot"
SEEDS = (0, 1, 2)
# Arm -> settings beside those of subject.yaml.
ARMS: Mapping[str, Mapping[str, str]] = {
    "none": {"prior.class_prompts": "[]"},
    "generated": {"prior.mode": "generated"},
    "adapter_off, class": {"prior.mode": "adapter_off", "prior.caption": "class"},
    "adapter_off, blank": {"prior.mode": "adapter_off", "prior.caption": "blank"},
    "adapter_off, instance": {"prior.mode": "adapter_off", "prior.caption": "instance"},
    "none, masked": {"prior.class_prompts": "[]", "data.mask_outside": "0"},
    "none, masked to 0.1": {"prior.class_prompts": "[]", "data.mask_outside": "0.1"},
}
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
# Greys by which a picture and its background may differ where nothing is drawn.
_SAME = 4


def config_of(arm: str, seed: int, folder: Path, settings: Mapping[str, str]) -> TrainConfig:
    """The run of an arm and a seed, in a folder of its own."""
    name = arm.replace(", ", "-").replace("_", "-")
    own = {"output_dir": str(folder / f"{name}-{seed}"), "optim.seed": str(seed), "preview.prompts": "[]"}
    if "data.mask_outside" in ARMS[arm]:
        own["data.instance_dir"] = str(masked(ROBOT / "images", folder / "masked"))
    return TrainConfig.from_yaml(ROBOT / "subject.yaml", {**settings, **ARMS[arm], **own})


def masked(pictures: Path, folder: Path) -> Path:
    """A copy of a folder of drawings with masks of what is drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    for example in find_examples(pictures, instance_prompt=None):
        picture, place = read_image(example.path), background_in(example.caption)
        assert place is not None
        apart = ImageChops.difference(picture, background(place, picture.width)).convert("L")
        for name, made in ((f"{example.path.stem}_mask.png", apart.point(_is_drawn)), (example.path.name, picture)):
            with atomic_file(folder / name) as file:
                made.save(file, format="PNG")
        write_atomically(folder / f"{example.path.stem}.txt", example.caption.encode())
    return folder


def _is_drawn(difference: int) -> int:
    return 255 if difference > _SAME else 0


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


def report(found: Mapping[str, Sequence[Mapping[str, float]]], commit: str, command: str) -> str:
    """The page."""
    count = len(next(iter(found.values())))
    first = next(iter(found.values()))[0]
    lines = [
        "# Ways of prior preservation, and masks",
        "",
        f"`{command}`, commit `{commit}`.",
        f"The pocket base learns the robot of `examples/subject-robot`, {count} seeds an arm. Of likeness the base",
        f"alone reaches {first['before']:.3f}, the true drawings through the autoencoder {first['ceiling']:.3f}.",
        "Kept is the likeness of other things to how the base draws them from the same noise; 1 is unchanged.",
        "Mean over the seeds, and the lowest and highest.",
        "",
        "| prior | " + " | ".join(FIGURES.values()) + " |",
        "| --- " * (1 + len(FIGURES)) + "|",
        *(f"| {arm} | " + " | ".join(_cell(runs, figure) for figure in FIGURES) + " |" for arm, runs in found.items()),
        "",
        "Seed by seed; where the seeds do not agree on the sign it is a tie, whatever the mean says.",
        "",
        "| | " + " | ".join(FIGURES.values()) + " |",
        "| --- " * (1 + len(FIGURES)) + "|",
        *_comparisons(found),
    ]
    return "\n".join(lines) + "\n"


def _cell(runs: Sequence[Mapping[str, float]], figure: str) -> str:
    values = [run[figure] for run in runs]
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _comparisons(found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    rows = []
    arms = list(found)
    for index, arm in enumerate(arms):
        for other in arms[:index]:
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


def main() -> int:
    """Train, measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "priors", help="where the runs lie, and go on")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--draws", type=int, default=4, help="pictures of each true caption")
    arguments, rest = parser.parse_known_args()
    settings = TrainConfig.parse_overrides(rest)
    commit = commit_of(arguments.runs)
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arguments.arms}
    for seed in arguments.seeds:  # whole seeds first: what is there when it is stopped can be compared
        for arm in arguments.arms:
            print(f"{arm}, seed {seed}", file=sys.stderr)
            found[arm].append(scores_of(config_of(arm, seed, arguments.runs, settings), arguments.draws))
        command = "python -m benchmarks.priors" + "".join(f" {argument}" for argument in sys.argv[1:])
        figures: dict[str, Any] = {"commit": commit, "seeds": arguments.seeds[: len(found[arm])], "arms": found}
        write_atomically(arguments.output / "priors.json", (json.dumps(figures, indent=1) + "\n").encode())
        write_atomically(arguments.output / "priors.md", report(found, commit, command).encode())
    print(f"wrote {arguments.output / 'priors.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
