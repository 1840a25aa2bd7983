"""How the pocket base is made, stage by stage: autoencoder, latents, tokenizer, denoiser, the folder that ships."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from dora_diffusion import storage
from dora_diffusion.pretrain.autoencoder import (
    AutoencoderRecipe,
    build_autoencoder,
    encode_pictures,
    train_autoencoder,
    whiten,
)
from dora_diffusion.pretrain.denoiser import DenoiserRecipe, TextPart, train_denoiser
from dora_diffusion.pretrain.package import load_checkpoint, ship
from dora_diffusion.pretrain.pictures import all_scenes, autoencoder_pictures, scene_pictures
from dora_diffusion.pretrain.scenes import OBJECT_PIXELS, Scene, varied_caption, vocabulary
from dora_diffusion.pretrain.text import TextRecipe, train_text_encoder
from dora_diffusion.pretrain.tokens import MAX_TOKENS, train_tokenizer

AUTOENCODER_PICTURES = 6000


@dataclass(frozen=True)
class Workshop:
    """The folder in which pretraining works; every stage finds there what earlier ones left, and goes on."""

    folder: Path

    @property
    def icons(self) -> Path:
        """Icon sets and their renders."""
        return self.folder / "icons"

    @property
    def latents(self) -> Path:
        """The scenes' latents, fp16."""
        return self.folder / "latents.safetensors"

    @property
    def vae(self) -> Path:
        """The finished autoencoder, whitened."""
        return self.folder / "vae_final"

    @property
    def tokenizer(self) -> Path:
        """vocab.json and merges.txt."""
        return self.folder / "tokenizer"

    @property
    def text(self) -> Path:
        """Checkpoints of the text encoder, and the finished one in `final`."""
        return self.folder / "text"

    @property
    def denoiser(self) -> Path:
        """Checkpoints of the UNet."""
        return self.folder / "unet"


def pretrain(workshop: Workshop, autoencoder: AutoencoderRecipe, text: TextRecipe, denoiser: DenoiserRecipe) -> None:
    """Run every stage that is not done yet. Each is resumable; hours on two cores."""
    scenes = all_scenes()
    if not workshop.latents.exists():
        _make_latents(workshop, scenes, autoencoder)
    latents = storage.load_tensors(workshop.latents)["latents"]
    if not (workshop.tokenizer / "merges.txt").exists():
        train_tokenizer(_captions(scenes), workshop.tokenizer)
    if not (workshop.text / "final").exists():
        encoder = train_text_encoder(latents, scenes, _tokenizer(workshop), text, workshop.text)
        _save_whole(encoder, workshop.text / "final")
    train_denoiser(latents, scenes, _text_part(workshop), denoiser, workshop.denoiser)


def _save_whole(model: AutoencoderKL | CLIPTextModel, folder: Path) -> None:
    """Save a finished stage under its name only once it is whole, since the name is what later runs look for."""
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def _tokenizer(workshop: Workshop) -> CLIPTokenizer:
    return CLIPTokenizer(
        vocab=str(workshop.tokenizer / "vocab.json"),
        merges=str(workshop.tokenizer / "merges.txt"),
        model_max_length=MAX_TOKENS,
    )


def _text_part(workshop: Workshop) -> TextPart:
    encoder = CLIPTextModel.from_pretrained(workshop.text / "final").eval().requires_grad_(False)
    return TextPart(_tokenizer(workshop), encoder)


def _make_latents(workshop: Workshop, scenes: list[Scene], recipe: AutoencoderRecipe) -> None:
    pictures = autoencoder_pictures(workshop.icons, AUTOENCODER_PICTURES)
    trained = train_autoencoder(pictures, recipe, workshop.folder / "vae")
    vae = build_autoencoder().eval()
    vae.load_state_dict(trained.state_dict())
    latents = whiten(vae, encode_pictures(vae, scene_pictures(scenes, workshop.icons)))
    _save_whole(vae, workshop.vae)
    storage.save_tensors({"latents": latents.half()}, workshop.latents)


def _captions(scenes: list[Scene]) -> list[str]:
    """What the tokenizer learns from: the scenes' captions, with and without style."""
    rng, words = Random(0), vocabulary()
    styleless = [
        Scene(name, None, background, size)
        for name in words.objects
        for background in words.backgrounds
        for size in OBJECT_PIXELS
    ]
    return [varied_caption(scene, rng) for scene in [*scenes, *styleless]]


def trained_pipeline(workshop: Workshop) -> StableDiffusionPipeline:
    """A plain StableDiffusionPipeline of the newest checkpoint's averaged weights, fp32."""
    checkpoints = storage.valid_checkpoints(workshop.denoiser)
    if not checkpoints:
        raise ValueError(f"{workshop.denoiser}: no checkpoint there yet; run pretraining first")
    return load_checkpoint(checkpoints[-1], AutoencoderKL.from_pretrained(workshop.vae), _text_part(workshop))


def ship_newest(workshop: Workshop, folder: Path) -> None:
    """Write the newest checkpoint as the embedded base."""
    with torch.no_grad():
        ship(trained_pipeline(workshop), folder)
