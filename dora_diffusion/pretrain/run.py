"""How the pocket bases are made, stage by stage: autoencoder, latents, tokenizer, denoiser, the folder that ships."""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from dora_diffusion.pretrain import dit
from dora_diffusion.pretrain.autoencoder import (
    AutoencoderRecipe,
    build_autoencoder,
    encode_pictures,
    train_autoencoder,
    whiten,
)
from dora_diffusion.pretrain.denoiser import DenoiserRecipe, train_denoiser
from dora_diffusion.pretrain.package import load_checkpoint, load_dit_checkpoint, ship
from dora_diffusion.pretrain.pictures import all_scenes, autoencoder_pictures, scene_pictures
from dora_diffusion.pretrain.scenes import OBJECT_PIXELS, Scene, varied_caption, vocabulary
from dora_diffusion.pretrain.text import Painter, TextRecipe, train_painter
from dora_diffusion.pretrain.tokens import MAX_TOKENS, train_tokenizer
from dora_diffusion.pretrain.unet import TextPart, build_unet, velocity_loss
from dora_diffusion.utils import atomic as storage

AUTOENCODER_PICTURES = 6000


@dataclass(frozen=True)
class PretrainFolder:
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

    @property
    def dit_text(self) -> Path:
        """Checkpoints of the DiT's first text encoder, and the finished one in `final`."""
        return self.folder / "dit_text"

    @property
    def dit(self) -> Path:
        """Checkpoints of the DiT and its second text encoder."""
        return self.folder / "dit"


def pretrain(
    folders: PretrainFolder, autoencoder: AutoencoderRecipe, text: TextRecipe, denoiser: DenoiserRecipe
) -> None:
    """Run every stage that is not done yet. Each is resumable; hours on two cores."""
    scenes = all_scenes()
    if not folders.latents.exists():
        _make_latents(folders, scenes, autoencoder)
    latents = storage.load_tensors(folders.latents)["latents"]
    if not (folders.tokenizer / "merges.txt").exists():
        train_tokenizer(_captions(scenes), folders.tokenizer)
    if not (folders.text / "final").exists():
        torch.manual_seed(text.seed)
        painter = Painter(_tokenizer(folders))
        train_painter(painter, latents, scenes, _tokenizer(folders), text, folders.text)
        _save_whole(painter.text, folders.text / "final")
    torch.manual_seed(denoiser.seed)
    loss = partial(velocity_loss, _text_part(folders))
    train_denoiser(build_unet(), loss, latents, scenes, denoiser, folders.denoiser)


def pretrain_dit(folders: PretrainFolder, base: Path, text: TextRecipe, denoiser: DenoiserRecipe) -> None:
    """Run every stage of the pocket DiT that is not done yet, with the autoencoder and the words of a finished pocket.

    Args:
        workshop: its folder of work.
        base: the pocket's folder, whose `vae` and `tokenizer` are taken as they are.
        text: of the text encoder.
        denoiser: of the transformer.
    """
    scenes, tokenizer = all_scenes(), CLIPTokenizer.from_pretrained(base / "tokenizer")
    if not folders.latents.exists():
        vae = AutoencoderKL.from_pretrained(base / "vae", use_safetensors=True).eval()
        latents = encode_pictures(vae, scene_pictures(scenes, folders.icons))
        storage.save_tensors({"latents": latents.half()}, folders.latents)
    latents = storage.load_tensors(folders.latents)["latents"]
    if not (folders.dit_text / "final").exists():
        torch.manual_seed(text.seed)
        painter = dit.PooledPainter(tokenizer)
        train_painter(painter, latents, scenes, tokenizer, text, folders.dit_text)
        _save_whole(painter.text, folders.dit_text / "final")
    torch.manual_seed(denoiser.seed)
    learning = dit.Learning(tokenizer)
    learning.transformer.set_attn_processor(dit.CountedZeroTokens(dit.ZERO_TOKENS))
    loss = partial(dit.flow_loss, _dit_text(folders, tokenizer))
    train_denoiser(learning, loss, latents, scenes, denoiser, folders.dit)


def _dit_text(folders: PretrainFolder, tokenizer: CLIPTokenizer) -> dit.DiTText:
    encoder = CLIPTextModelWithProjection.from_pretrained(folders.dit_text / "final", use_safetensors=True)
    return dit.DiTText(tokenizer, encoder.eval().requires_grad_(False))


def _save_whole(model: PreTrainedModel | AutoencoderKL, folder: Path) -> None:
    """Save a finished stage under its name only once it is whole, since the name is what later runs look for."""
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def _tokenizer(folders: PretrainFolder) -> CLIPTokenizer:
    return CLIPTokenizer(
        vocab=str(folders.tokenizer / "vocab.json"),
        merges=str(folders.tokenizer / "merges.txt"),
        model_max_length=MAX_TOKENS,
    )


def _text_part(folders: PretrainFolder) -> TextPart:
    encoder = CLIPTextModel.from_pretrained(folders.text / "final", use_safetensors=True).eval().requires_grad_(False)
    return TextPart(_tokenizer(folders), encoder)


def _make_latents(folders: PretrainFolder, scenes: list[Scene], recipe: AutoencoderRecipe) -> None:
    pictures = autoencoder_pictures(folders.icons, AUTOENCODER_PICTURES)
    trained = train_autoencoder(pictures, recipe, folders.folder / "vae")
    vae = build_autoencoder().eval()
    vae.load_state_dict(trained.state_dict())
    latents = whiten(vae, encode_pictures(vae, scene_pictures(scenes, folders.icons)))
    _save_whole(vae, folders.vae)
    storage.save_tensors({"latents": latents.half()}, folders.latents)


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


def trained_pipeline(folders: PretrainFolder) -> StableDiffusionPipeline:
    """A plain StableDiffusionPipeline of the newest checkpoint's averaged weights, fp32."""
    vae = AutoencoderKL.from_pretrained(folders.vae, use_safetensors=True)
    return load_checkpoint(_newest(folders.denoiser), vae, _text_part(folders))


def trained_dit_pipeline(folders: PretrainFolder, base: Path) -> StableDiffusion3Pipeline:
    """A plain StableDiffusion3Pipeline of the newest checkpoint's averaged weights, fp32; `base` as in training."""
    vae = AutoencoderKL.from_pretrained(base / "vae", use_safetensors=True)
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    return load_dit_checkpoint(_newest(folders.dit), vae, _dit_text(folders, tokenizer))


def _newest(folder: Path) -> Path:
    checkpoints = storage.valid_checkpoints(folder)
    if not checkpoints:
        raise ValueError(f"{folder}: no checkpoint there yet; run pretraining first")
    return checkpoints[-1]


def ship_newest(folders: PretrainFolder, folder: Path) -> None:
    """Write the newest checkpoint as the embedded base."""
    with torch.no_grad():
        ship(trained_pipeline(folders), folder)


def ship_newest_dit(folders: PretrainFolder, base: Path, folder: Path) -> None:
    """Write the newest checkpoint as the embedded DiT."""
    with torch.no_grad():
        ship(trained_dit_pipeline(folders, base), folder)
