"""What each way of prior preservation, and masks, do to likeness and drift: `python -m benchmarks.priors`.

The robot of examples/subject-robot is trained on the pocket base once for each arm and seed, and measured as
benchmarks/compared_runs.py says. Masks are what differs from the background that a picture's caption names.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from PIL import ImageChops

from benchmarks.compared_runs import ROBOT, ROOT, SEEDS, Page, commit_of, compare, write
from dora_diffusion.pretrain.scenes import background, background_in
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.examples import find_examples
from dora_diffusion.utils.atomic import atomic_file, write_atomically
from dora_diffusion.utils.images import read_image

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
PAGE = Page("priors", "Ways of prior preservation, and masks", about=(), arms="prior")
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
    command = "python -m benchmarks.priors" + "".join(f" {argument}" for argument in sys.argv[1:])
    runs = compare(
        PAGE,
        arguments.arms,
        lambda arm, seed: config_of(arm, seed, arguments.runs, settings),
        seeds=arguments.seeds,
        draws=arguments.draws,
    )
    for found in runs:
        write(PAGE, found, arguments.output, commit=commit, command=command, more={"seeds": arguments.seeds})
    return 0


if __name__ == "__main__":
    sys.exit(main())
