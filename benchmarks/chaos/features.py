"""A small run with every feature on, over a base of random weights."""

from pathlib import Path
from typing import Any

from dora_diffusion.pretrain.scenes import background
from dora_diffusion.training.config import TrainConfig
from tests.pocket_random import random_pocket_pipeline

BACKGROUNDS = ("red", "blue", "meadow", "beach")
FEATURES = (
    "text encoder trained, dropout, flips, random crops, captions dropped, shuffled and in part, class pictures, "
    "held-out pictures, gradients accumulated over 2, cosine rates, previews, validation, a checkpoint every 2 of 6 "
    "steps, of which 2 are kept"
)


def make_inputs(folder: Path) -> None:
    """A base and captioned pictures."""
    random_pocket_pipeline().save_pretrained(folder / "base")
    (folder / "images").mkdir()
    for name in BACKGROUNDS:
        background(name, 64).save(folder / "images" / f"{name}.png")
        (folder / "images" / f"{name}.txt").write_text(f"a zqx cat, {name}, calm, wide, bright")


def config_of(folder: Path, *, steps: int = 6) -> TrainConfig:
    """The run in `folder / "run"`."""
    sections: dict[str, Any] = {
        "model": str(folder / "base"),
        "output_dir": folder / "run",
        "data": {
            "instance_dir": folder / "images",
            "resolution": 32,
            "flip": True,
            "crop": "random",
            "captions": {"shuffle": True, "keep_tokens": 1, "tag_dropout": 0.2, "dropout": 0.2},
            "validation_share": 0.25,
        },
        "prior": {"class_prompts": ["a red cat", "a blue cat"], "class_images": 2},
        "adapter": {"rank": 2, "dropout": 0.1, "train_text_encoder": True},
        "optim": {"steps": steps, "batch_size": 2, "gradient_accumulation": 2, "learning_rate": 1e-3},
        "preview": {"prompts": ["a zqx cat"], "steps": 1, "every": 2},
        "validation": {"every": 2, "repeats": 1},
        "checkpoint": {"every": 2, "keep": 2},
    }
    return TrainConfig.model_validate(sections)
