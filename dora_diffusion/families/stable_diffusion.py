"""Stable Diffusion 1.x: UNet2DConditionModel, one CLIP text encoder, AutoencoderKL. The pocket base is one of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dora_diffusion.families.record import Component, Family

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LINEAR = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")

UNET = Component(
    name="unet",
    model_classes=("UNet2DConditionModel",),
    presets={"attention": ATTENTION, "all-linear": LINEAR, "all": (*LINEAR, *CONVOLUTIONS)},
)
CLIP = Component(
    name="text_encoder",
    model_classes=("CLIPTextModel", "CLIPTextModelWithProjection"),
    presets={
        "attention": CLIP_ATTENTION,
        "all-linear": (*CLIP_ATTENTION, "fc1", "fc2"),
        "all": (*CLIP_ATTENTION, "fc1", "fc2"),
    },
)


def encode(pipe: Any, captions: list[str]) -> Mapping[str, Tensor]:
    """Captions -> {"encoder_hidden_states": (N, tokens, width)}, as the pipeline itself encodes them."""
    tokens = pipe.tokenizer(
        captions,
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    hidden = pipe.text_encoder(tokens.to(pipe.text_encoder.device))[0]
    return {"encoder_hidden_states": hidden}


def predict(denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
    """The UNet's prediction, epsilon or v as the scheduler says."""
    prediction: Tensor = denoiser(latents, timesteps, conditioning["encoder_hidden_states"]).sample
    return prediction


@torch.no_grad()
def encode_pictures(pipe: Any, pixels: Tensor) -> Tensor:
    """Pixels (N, 3, H, W) in [-1, 1] -> latents (N, C, H/8, W/8), the posterior's mode times the scaling factor."""
    vae = pipe.vae
    latents: Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    return latents * vae.config.scaling_factor


STABLE_DIFFUSION = Family(
    name="sd1",
    pipeline_classes=(
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
    ),
    denoiser=UNET,
    text_encoders=(CLIP,),
    encode=encode,
    predict=predict,
    encode_pictures=encode_pictures,
)
