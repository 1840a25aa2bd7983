"""What is trained on: the embedded pocket, and SD1.5's own shapes with random weights; and pictures for it."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import nn

from benchmarks.full_size.published import PUBLISHED
from dora_diffusion.pipelines.loading import load_pipeline

PICTURES = Path(__file__).parents[2] / "examples" / "subject-robot" / "images"
_SMALL: Mapping[str, Mapping[str, Any]] = {
    "unet": {
        "block_out_channels": (32, 64),
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "sample_size": 8,
    },
    "vae": {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1},
    "text_encoder": {"num_hidden_layers": 1},
}
"""What --quick makes smaller."""


@dataclass(frozen=True)
class Base:
    """A base and the side of the pictures that it is trained on, in pixels."""

    name: str
    pipe: Any
    side: int


def pocket() -> Base:
    """The embedded base, 11 million numbers in its UNet; pictures of 128 pixels, its own."""
    return Base("pocket", _frozen(load_pipeline("pocket")), 128)


def sd15(*, is_quick: bool = False) -> Base:
    """SD1.5's UNet, VAE and text encoder at full width with random weights; pictures of 256 pixels.

    Its tokenizer is the pocket's with CLIP's length: which ids are read costs the same.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    parts = next(model.parts for model in PUBLISHED if model.name == "SD 1.5")
    configs = {name: {**part.config, **(_SMALL[name] if is_quick else {})} for name, part in parts.items()}
    tokenizer = copy.deepcopy(load_pipeline("pocket").tokenizer)
    tokenizer.model_max_length = 77
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = StableDiffusionPipeline(
            vae=AutoencoderKL.from_config(configs["vae"]),
            text_encoder=CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel.from_config(configs["unet"]),
            scheduler=DDPMScheduler(**schedule),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return Base("SD1.5's shapes", _frozen(pipe), 64 if is_quick else 256)


def _frozen(pipe: Any) -> Any:
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return pipe


def pictures(folder: Path, side: int, count: int) -> Path:
    """So many pictures of the example's robot in a folder, square and a quarter larger than `side`, as photos are."""
    folder.mkdir(parents=True)
    known = sorted(PICTURES.glob("*.png"))
    for number in range(count):
        with Image.open(known[number % len(known)]) as picture:
            scaled = picture.convert("RGB").resize((side * 5 // 4, side * 5 // 4), Image.Resampling.LANCZOS)
            scaled.save(folder / f"{number:02}.png")
    return folder
