"""SDXL's UNet and some blocks of FLUX.1 with random weights, made on the device; nothing is read or written."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from benchmarks.full_size.models import config_of, pipeline_of
from benchmarks.full_size.published import PUBLISHED, Published
from dora_diffusion.families import family_of_pipeline
from dora_diffusion.training.config import TrainConfig

Config = Mapping[str, Any]
_FLUX_BLOCKS = {"num_layers": 4, "num_single_layers": 8}
_TINY_VAE = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}
_TINY_UNET = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "attention_head_dim": (2, 4),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
    "sample_size": 8,
}
_TINY_FLUX = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
}


@dataclass(frozen=True)
class Model:
    """What is trained.

    Attributes:
        name: for tables.
        published: the denoiser and its VAE alone; text encoders would stand by unused.
        side: of its pictures in pixels.
    """

    name: str
    published: Published
    side: int


def models(*, is_tiny: bool) -> list[Model]:
    """SDXL's UNet whole, FLUX.1 in 4 double and 8 single blocks; 1024 pixels. Tiny ones tell only that it runs."""
    side = 64 if is_tiny else 1024
    unet, flux = (_TINY_UNET, _TINY_FLUX) if is_tiny else ({}, _FLUX_BLOCKS)
    return [
        Model("SDXL UNet", _changed("SDXL base", unet, is_tiny), side),
        Model("FLUX.1, 4 + 8 blocks", _changed("FLUX.1 dev", flux, is_tiny), side),
    ]


def _changed(name: str, config: Config, is_tiny: bool) -> Published:
    model = next(model for model in PUBLISHED if model.name == name)
    changes: Mapping[str, Config] = {model.denoiser: config, "vae": _TINY_VAE if is_tiny else {}}
    parts = {part: replace(model.parts[part], config={**model.parts[part].config, **changes[part]}) for part in changes}
    return replace(model, parts=parts)


def config_for(model: Model, **optim: Any) -> TrainConfig:
    """A DoRA of rank 16 on attention layers, one picture a step, bf16."""
    return config_of(data={"resolution": model.side}, optim=optim)


def pipeline(model: Model, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Its pipeline with random weights on a device, frozen."""
    pipe = pipeline_of(model.published, dtype)
    torch.manual_seed(0)
    for name in model.published.parts:
        fill(getattr(pipe, name), device)
    is_flow = family_of_pipeline(pipe).denoiser.name == "transformer"
    pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler() if is_flow else DDPMScheduler(clip_sample=False))
    return pipe


def fill(model: nn.Module, device: str) -> nn.Module:
    """Give a model of the meta device numbers: of a size that keeps activations theirs, and gains of 1."""
    model.to_empty(device=device)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dim() > 1:
                nn.init.normal_(tensor, std=tensor[0].numel() ** -0.5)
            else:
                tensor.fill_(1.0 if name.endswith("weight") else 0.0)
    return model


@dataclass(frozen=True)
class Inputs:
    """Of one picture: latents fp32 (1, C, h, w), what stands for its caption, and its frame (1, 6)."""

    latents: Tensor
    conditioning: Mapping[str, Tensor]
    frames: Tensor


def inputs(pipe: Any, model: Model, device: str, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Random ones at the model's size."""
    family = family_of_pipeline(pipe)
    denoiser = getattr(pipe, family.denoiser.name)
    blank = family.blank(denoiser.config)
    with torch.no_grad():
        latents = family.codec.encode(pipe, torch.zeros(1, 3, model.side, model.side, device=device, dtype=dtype))
    conditioning = {
        name: torch.randn(shape.shape, device=device, dtype=dtype)
        if shape.is_floating_point()
        else torch.zeros(shape.shape, device=device, dtype=shape.dtype)
        for name, shape in blank.items()
    }
    side = float(model.side)
    frame = torch.tensor([[side, side, 0.0, 0.0, side, side]], device=device)
    return Inputs(torch.randn_like(latents, dtype=torch.float32), conditioning, frame)
