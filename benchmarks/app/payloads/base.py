"""A random base and two small adapters: what is refused does not depend on weights."""

import tempfile
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from dora_diffusion.formats import save_adapter
from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.injection import inject
from dora_diffusion.pretrain.autoencoder import build_autoencoder
from dora_diffusion.pretrain.package import assemble
from dora_diffusion.pretrain.text import build_text_encoder
from dora_diffusion.pretrain.tokens import train_tokenizer
from dora_diffusion.pretrain.unet import TextPart, build_unet

CAPTIONS = ("a cat on a red background", "a castle in a forest") * 2


def random_base() -> StableDiffusionPipeline:
    """The pocket's architecture with random weights, fp32 on the CPU; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        tokenizer = train_tokenizer(CAPTIONS, Path(folder))
        pipe = assemble(build_unet(), build_autoencoder(), TextPart(tokenizer, build_text_encoder(tokenizer)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def two_adapters(pipe: StableDiffusionPipeline) -> dict[str, bytes]:
    """File name -> content of adapters of rank 4 for its UNet: `ink` is a DoRA, `lego` a LoRA."""
    contents = {}
    for name, use_dora in (("ink.safetensors", True), ("lego.safetensors", False)):
        config = DoRAConfig(rank=4, alpha=4, use_dora=use_dora)
        injection = inject(pipe.unet, config, generator=torch.Generator().manual_seed(0))
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(injection.state().under("unet"), Path(folder) / name)
            contents[name] = (Path(folder) / name).read_bytes()
        injection.eject()
    return contents
