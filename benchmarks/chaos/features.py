"""Small runs with every feature on between them, over a base of random weights."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from dora_diffusion.formats import save_adapter
from dora_diffusion.pretrain.scenes import background
from dora_diffusion.training.config import TrainConfig
from tests.pocket_random import random_adapter, random_pocket_pipeline

BACKGROUNDS = ("red", "blue", "meadow", "beach")
SIZES = ((64, 64), (96, 48), (48, 96), (64, 64))
FEATURES = (
    "text encoder trained, dropout, buckets of several shapes, masks, flips, random crops, two views of each picture "
    "cached on disk, captions dropped, shuffled and in part, held-out pictures, gradients accumulated over 2, cosine "
    "rates, previews, validation, a checkpoint every 2 of 6 steps, of which 2 are kept, and the best, two exports"
)


def _generated(_: Path) -> dict[str, Any]:
    return {"prior": {"class_prompts": ["a red cat", "a blue cat"], "class_images": 2}}


def _adapter_off(folder: Path) -> dict[str, Any]:
    """Words beside the adapter that trains, from one that is there and on top of another."""
    return {
        "base": {"adapters": {folder / "below.safetensors": 0.5}},
        "prior": {"mode": "adapter_off", "caption": "class", "class_prompts": ["a red cat", "a blue cat"]},
        "adapter": {"start": folder / "start.safetensors", "dropout": 0.1, "train_text_encoder": True},
        "words": {"starts": {"zqx": "cat"}, "share": 0.5},
        "guard": {"every": 1, "window": 2},
    }


KINDS: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    "class pictures drawn": _generated,
    "the base's own predictions kept, from an adapter, above another, with a new word": _adapter_off,
}
"""What the runs differ in, and the sections of it, given the folder with the inputs."""


def make_inputs(folder: Path) -> None:
    """A base, adapters for it, and captioned pictures."""
    pipe = random_pocket_pipeline()
    pipe.save_pretrained(folder / "base")
    for seed, name in enumerate(("below", "start")):
        save_adapter(random_adapter(pipe, seed), folder / f"{name}.safetensors")
    (folder / "images").mkdir()
    for name, size in zip(BACKGROUNDS, SIZES, strict=True):
        background(name, 96).crop((0, 0, *size)).save(folder / "images" / f"{name}.png")
        mask = Image.new("L", size)
        mask.paste(255, (8, 8, 40, 40))
        mask.save(folder / "images" / f"{name}_mask.png")
        (folder / "images" / f"{name}.txt").write_text(f"a zqx cat, {name}, calm, wide, bright")


def config_of(folder: Path, kind: str, *, steps: int = 6) -> TrainConfig:
    """The run of a kind in `folder / "run"`."""
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
        "adapter": {"rank": 2, "dropout": 0.1, "train_text_encoder": True},
        "optim": {"steps": steps, "batch_size": 2, "gradient_accumulation": 2, "learning_rate": 1e-3},
        "preview": {
            "prompts": ["a zqx cat", {"prompt": "a cat", "size": [96, 64], "strength": 0.5, "seed": 1}],
            "steps": 1,
            "every": 2,
        },
        "validation": {"every": 2, "repeats": 1},
        "checkpoint": {"every": 2, "keep": 2, "keep_best": True},
        "export": ["kohya", "peft"],
        **KINDS[kind](folder),
    }
    return TrainConfig.model_validate(sections)
