"""A small run with every feature on, over a base of random weights."""

from pathlib import Path
from typing import Any

from PIL import Image

from dora_diffusion.pretrain.scenes import background
from dora_diffusion.training.config import TrainConfig
from tests.pocket_random import random_pocket_pipeline

BACKGROUNDS = ("red", "blue", "meadow", "beach")
SIZES = ((64, 64), (96, 48), (48, 96), (64, 64))
FEATURES = (
    "text encoder trained, dropout, buckets of several shapes, masks, flips, random crops, two views of each picture "
    "cached on disk, captions dropped, shuffled and in part, class pictures, held-out pictures, gradients accumulated "
    "over 2, cosine rates, previews, validation, a checkpoint every 2 of 6 steps, of which 2 are kept"
)


def make_inputs(folder: Path) -> None:
    """A base and captioned pictures."""
    random_pocket_pipeline().save_pretrained(folder / "base")
    (folder / "images").mkdir()
    for name, size in zip(BACKGROUNDS, SIZES, strict=True):
        background(name, 96).crop((0, 0, *size)).save(folder / "images" / f"{name}.png")
        mask = Image.new("L", size)
        mask.paste(255, (8, 8, 40, 40))
        mask.save(folder / "images" / f"{name}_mask.png")
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
            "mask_outside": 0.1,
            "cache_variants": 2,
            "cache_dir": folder / "cache",
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
