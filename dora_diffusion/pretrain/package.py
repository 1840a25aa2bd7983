"""Put the trained parts together as a plain StableDiffusionPipeline and write the folder that ships."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from dora_diffusion.pretrain.checkpoints import load_into
from dora_diffusion.pretrain.denoiser import TextPart, build_scheduler, build_unet


def assemble(unet: UNet2DConditionModel, vae: AutoencoderKL, text: TextPart) -> StableDiffusionPipeline:
    """A pipeline of the trained parts, without safety checker (it draws emoji)."""
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.encoder.eval(),
        tokenizer=text.tokenizer,
        unet=unet.eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load_checkpoint(checkpoint: Path, vae: AutoencoderKL, text: TextPart) -> StableDiffusionPipeline:
    """The pipeline of a denoiser checkpoint's averaged weights."""
    unet = build_unet()
    load_into(dict(unet.named_parameters()), checkpoint / "average.safetensors")
    return assemble(unet, vae, text)


def ship(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Write fp16 safetensors in diffusers' layout into `folder`, replacing the model's files and leaving others."""
    pipe = pipe.to(torch.float16)
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.rmtree(folder / part, ignore_errors=True)
    pipe.save_pretrained(folder, safe_serialization=True)
    pipe.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))  # vocab.json and merges.txt, as CLIP has
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # a path of the machine that trained it
        if "dtype" in config:  # transformers would load the text encoder in fp16 beside diffusers' fp32 UNet
            config["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2) + "\n")


def draw_batch(
    pipe: StableDiffusionPipeline, captions: Sequence[str], seed: int, *, steps: int = 20, guidance_scale: float = 4.0
) -> list[Image.Image]:
    """A picture a caption, drawn together; one seed for the batch."""
    pipe.set_progress_bar_config(disable=True)
    result = pipe(
        list(captions),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(seed),
    )
    images: list[Image.Image] = result.images
    return images
