"""Sana and Sana 1.5: SanaTransformer2DModel, Gemma 2, AutoencoderDC.

Left out: Sana-Sprint, whose denoiser is trained by consistency on a trigonometric path and not by a flow's velocity.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dora_diffusion.families.codecs import COMPRESSED
from dora_diffusion.families.gemma import encode_captions, gemma, gemma_signature
from dora_diffusion.families.record import Component, Drawing, Family, plain_arguments
from dora_diffusion.families.signature import (
    ATTENTION_NAMES,
    EMBEDDER_NAMES,
    PartSignature,
    Signature,
    transformer_size,
)

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LINEAR = (*ATTENTION, "ff.conv_inverted", "ff.conv_point")  # 1 x 1: linear layers in the shape of convolutions

TRANSFORMER = Component(
    name="transformer",
    model_classes=("SanaTransformer2DModel",),
    presets={
        "attention": ATTENTION,
        "all-linear": LINEAR,
        "all": (
            *(*LINEAR, "ff.conv_depth", "time_embed.linear", "proj_out"),
            *("caption_projection.linear_1", "caption_projection.linear_2"),
        ),
    },
    outside=("patch_embed.proj", "timestep_embedder.linear_1", "timestep_embedder.linear_2"),
)


def encode(pipe: Any, captions: list[str]) -> Mapping[str, Tensor]:
    """Captions under the instruction that the pipeline gives when it draws; 300 tokens of each and their mask."""
    instruction = inspect.signature(pipe.__call__).parameters["complex_human_instruction"].default

    def encode_prompt(caption: str, guided: bool) -> Any:
        return pipe.encode_prompt(
            caption, guided, device=pipe.text_encoder.device, complex_human_instruction=instruction
        )

    return encode_captions(captions, encode_prompt)


def predict(
    denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], frames: Tensor
) -> Tensor:
    """The flow's velocity."""
    prediction: Tensor = denoiser(
        latents,
        encoder_hidden_states=conditioning["encoder_hidden_states"],
        encoder_attention_mask=conditioning.get("encoder_attention_mask"),
        timestep=timesteps,
    ).sample
    return prediction


def blank(config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """300 tokens of Gemma."""
    return {"encoder_hidden_states": torch.empty(1, 300, config["caption_channels"], device="meta")}


def arguments(pipe: Any, drawing: Drawing) -> dict[str, Any]:
    """Drawn at the size that is asked for, and not at the nearest of the pipeline's list and resized."""
    plain = plain_arguments(pipe, drawing)
    return {**plain, "negative_prompt": drawing.negative_prompt, "use_resolution_binning": False}


SIGNATURE = Signature(
    parts={
        "transformer": PartSignature(
            paths=(
                f"transformer_blocks.#.(attn1|attn2).{ATTENTION_NAMES}",
                "transformer_blocks.#.ff.(conv_inverted|conv_depth|conv_point|nonlinearity)",
                f"time_embed.(linear|silu|emb.time_proj|emb.timestep_embedder.{EMBEDDER_NAMES})",
                f"time_embed.(time_proj|timestep_embedder.{EMBEDDER_NAMES})",
                f"time_embed.guidance_(condition_proj|embedder.{EMBEDDER_NAMES})",
                f"caption_projection.{EMBEDDER_NAMES}",
                "(patch_embed.proj|caption_norm|norm_out.norm|proj_out)",
            ),
            sizes=(
                transformer_size(1152, {"transformer_blocks": 28}, {"caption_projection.linear_1": 2304}),
                transformer_size(2240, {"transformer_blocks": 60}, {"caption_projection.linear_1": 2304}),
            ),
        ),
        "text_encoder": gemma_signature(),
    },
    called="sana(-|$)",
)

SANA = Family(
    name="sana",
    pipeline_classes=("SanaPipeline",),
    denoiser=TRANSFORMER,
    text_encoders=(gemma("text_encoder"),),
    encode=encode,
    predict=predict,
    codec=COMPRESSED,
    blank=blank,
    signature=SIGNATURE,
    arguments=arguments,
)
