"""The pocket base's architecture with random weights: a whole Stable Diffusion pipeline for tests, in seconds."""

import copy
import tempfile
from functools import cache
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.injection import inject
from dora_diffusion.pretrain.autoencoder import build_autoencoder
from dora_diffusion.pretrain.package import assemble
from dora_diffusion.pretrain.text import build_text_encoder
from dora_diffusion.pretrain.tokens import train_tokenizer
from dora_diffusion.pretrain.unet import TextPart, build_unet
from dora_diffusion.state import AdapterState, join

CAPTIONS = ("a noto style cat on a red background", "a small flat style castle in a forest") * 2


def random_pocket_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """A pipeline of one's own whose weights depend on the seed alone; fp32, CPU, eval mode, no progress bar.

    The global random state is left as it was.
    """
    return copy.deepcopy(_built(seed))  # which takes less than half the time of building


@cache
def _built(seed: int) -> StableDiffusionPipeline:
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        tokenizer = train_tokenizer(CAPTIONS, Path(folder))
        text = TextPart(tokenizer, build_text_encoder(tokenizer))
        pipe = assemble(build_unet(), build_autoencoder(), text)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_adapter(pipe: StableDiffusionPipeline, seed: int = 0, *, use_dora: bool = True) -> AdapterState:
    """An adapter of rank 4 for the pipeline's UNet and text encoder, strong enough to change pictures visibly.

    The pipeline is left as it was.
    """
    generator = torch.Generator().manual_seed(seed)
    states = []
    for component in ("unet", "text_encoder"):
        config = DoRAConfig(rank=4, alpha=4, use_dora=use_dora)
        injection = inject(getattr(pipe, component), config, generator=generator)
        with torch.no_grad():
            for name, parameter in injection.named_parameters().items():
                if name.endswith(".up"):
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        states.append(injection.state().under(component))
        injection.eject()
    return join(states, {})
