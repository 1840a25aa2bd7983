"""PixArt-alpha and PixArt-Sigma: PixArtTransformer2DModel, T5, AutoencoderKL.

The transformer also predicts a variance, which no scheduler here uses. Alpha's largest model is told sizes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dora_diffusion.families.codecs import SCALED
from dora_diffusion.families.record import Component, Drawing, Family, plain_arguments
from dora_diffusion.families.signature import (
    ATTENTION_NAMES,
    EMBEDDER_NAMES,
    FEED_FORWARD_NAMES,
    PartSignature,
    Signature,
    transformer_size,
)
from dora_diffusion.families.text import t5, t5_signature

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LINEAR = (*ATTENTION, "ff.net.0.proj", "ff.net.2")

TRANSFORMER = Component(
    name="transformer",
    model_classes=("PixArtTransformer2DModel",),
    presets={
        "attention": ATTENTION,
        "all-linear": LINEAR,
        "all": (
            *(*LINEAR, "adaln_single.linear", "proj_out"),
            *("caption_projection.linear_1", "caption_projection.linear_2"),
        ),
    },
    outside=(
        "pos_embed.proj",
        *("timestep_embedder.linear_1", "timestep_embedder.linear_2"),
        *("resolution_embedder.linear_1", "resolution_embedder.linear_2"),
        *("aspect_ratio_embedder.linear_1", "aspect_ratio_embedder.linear_2"),
    ),
)


def encode(pipe: Any, captions: list[str]) -> Mapping[str, Tensor]:
    """Captions -> T5's hidden states (N, 120 or 300, width) and their mask."""
    hidden, mask, *_ = pipe.encode_prompt(captions, False, device=pipe.text_encoder.device)
    return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}


def predict(
    denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], frames: Tensor
) -> Tensor:
    """Epsilon, told the target size when the model was trained to be: the pipeline, too, tells what it draws."""
    hidden = conditioning["encoder_hidden_states"]
    size = frames[:, 4:].to(hidden)
    sizes = (
        {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]} if denoiser.use_additional_conditions else {}
    )
    prediction: Tensor = denoiser(
        latents,
        encoder_hidden_states=hidden,
        encoder_attention_mask=conditioning.get("encoder_attention_mask"),
        timestep=timesteps,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None} | sizes,
    ).sample
    return prediction[:, : latents.shape[1]]


def _blank(config: Mapping[str, Any], tokens: int) -> Mapping[str, Tensor]:
    return {"encoder_hidden_states": torch.empty(1, tokens, config["caption_channels"], device="meta")}


def blank_alpha(config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """120 tokens of T5."""
    return _blank(config, 120)


def blank_sigma(config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """300 tokens of T5."""
    return _blank(config, 300)


def arguments(pipe: Any, drawing: Drawing) -> dict[str, Any]:
    """Drawn at the size that is asked for, and not at the nearest of the pipeline's list and resized."""
    plain = plain_arguments(pipe, drawing)
    return {**plain, "negative_prompt": drawing.negative_prompt, "use_resolution_binning": False}


_BLOCK = "transformer_blocks.#"
_PATHS = (
    f"{_BLOCK}.(attn1|attn2).{ATTENTION_NAMES}",
    f"{_BLOCK}.{FEED_FORWARD_NAMES}",
    f"adaln_single.(linear|silu|emb.time_proj|emb.timestep_embedder.{EMBEDDER_NAMES})",
    f"caption_projection.{EMBEDDER_NAMES}",
    "(pos_embed.proj|proj_out)",
)
_SIZED = (
    f"adaln_single.emb.(resolution_embedder|aspect_ratio_embedder).{EMBEDDER_NAMES}",
    "adaln_single.emb.additional_condition_proj",
)


def _signature(paths: tuple[str, ...], called: str) -> Signature:
    transformer = PartSignature(
        paths, (transformer_size(1152, {"transformer_blocks": 28}, {"caption_projection.linear_1": 4096}),)
    )
    return Signature({"transformer": transformer, "text_encoder": t5_signature(4096)}, called)


PIXART_ALPHA = Family(
    name="pixart-alpha",
    pipeline_classes=("PixArtAlphaPipeline",),
    denoiser=TRANSFORMER,
    text_encoders=(t5("text_encoder"),),
    encode=encode,
    predict=predict,
    codec=SCALED,
    blank=blank_alpha,
    signature=_signature((*_PATHS, *_SIZED), "pixart-alpha"),
    arguments=arguments,
    patch=2,
)

PIXART_SIGMA = Family(
    name="pixart-sigma",
    pipeline_classes=("PixArtSigmaPipeline",),
    denoiser=TRANSFORMER,
    text_encoders=(t5("text_encoder"),),
    encode=encode,
    predict=predict,
    codec=SCALED,
    blank=blank_sigma,
    signature=_signature(_PATHS, "pixart-sigma"),
    arguments=arguments,
    patch=2,
)
