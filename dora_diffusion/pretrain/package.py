"""Put the trained parts together as plain diffusers pipelines and write the folders that ship."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from dora_diffusion.pretrain import dit
from dora_diffusion.pretrain.checkpoints import load_into
from dora_diffusion.pretrain.unet import TextPart, build_scheduler, build_unet
from dora_diffusion.utils.atomic import atomic_path


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


def assemble_dit(learnt: dit.Learning, vae: AutoencoderKL, text: dit.DiTText) -> StableDiffusion3Pipeline:
    """A Stable Diffusion 3 of the trained parts, without T5."""
    vae.register_to_config(shift_factor=0.0)  # this pipeline class asks every autoencoder for one
    return StableDiffusion3Pipeline(
        transformer=learnt.transformer.eval(),
        scheduler=dit.build_scheduler(),
        vae=vae.eval(),
        text_encoder=text.encoder.eval(),
        tokenizer=text.tokenizer,
        text_encoder_2=learnt.text_encoder_2.eval(),
        tokenizer_2=text.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def load_checkpoint(checkpoint: Path, vae: AutoencoderKL, text: TextPart) -> StableDiffusionPipeline:
    """The pipeline of a denoiser checkpoint's averaged weights."""
    unet = build_unet()
    load_into(dict(unet.named_parameters()), checkpoint / "average.safetensors")
    return assemble(unet, vae, text)


def load_dit_checkpoint(checkpoint: Path, vae: AutoencoderKL, text: dit.DiTText) -> StableDiffusion3Pipeline:
    """The pipeline of a DiT checkpoint's averaged weights."""
    learnt = dit.Learning(text.tokenizer)
    load_into(dict(learnt.named_parameters()), checkpoint / "average.safetensors")
    return assemble_dit(learnt, vae, text)


def ship(pipe: Any, folder: Path) -> None:
    """Write fp16 safetensors in diffusers' layout as `folder`, replacing the model's files and keeping others."""
    pipe = pipe.to(torch.float16)
    with atomic_path(folder) as new:
        if folder.is_dir():
            shutil.copytree(folder, new, ignore=lambda where, _: pipe.components if Path(where) == folder else ())
        _save(pipe, new)


def _save(pipe: Any, folder: Path) -> None:
    pipe.save_pretrained(folder, safe_serialization=True)
    for part, component in pipe.components.items():
        if part.startswith("tokenizer") and component is not None:
            component.backend_tokenizer.model.save(str(folder / part))  # vocab.json and merges.txt, as CLIP has
            (folder / part / "tokenizer.json").unlink()  # says the same at four times the size
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # a path of the machine that trained it
        if "dtype" in config:  # transformers would load the text encoder in fp16 beside diffusers' fp32 denoiser
            config["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2) + "\n")


def draw_batch(
    pipe: Any, captions: Sequence[str], seed: int, *, steps: int = 20, guidance_scale: float = 4.0
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
