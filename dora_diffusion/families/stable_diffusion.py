"""Stable Diffusion 1.x, 2.x and XL: UNet2DConditionModel, CLIP text encoders, AutoencoderKL. The pocket base is a 1.x.

1.x and 2.x share their pipeline class; only 2.x projects into attention with linear layers. Whether epsilon or v is
predicted is the scheduler's to say.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dora_diffusion.families.codecs import SCALED
from dora_diffusion.families.record import Component, Family, ToolNames
from dora_diffusion.families.signature import (
    ATTENTION_NAMES,
    EMBEDDER_NAMES,
    FEED_FORWARD_NAMES,
    PartSignature,
    PublishedSize,
    Signature,
)
from dora_diffusion.families.text import clip, clip_g, clip_l, clip_signature

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LINEAR = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")

UNET = Component(
    name="unet",
    model_classes=("UNet2DConditionModel",),
    presets={"attention": ATTENTION, "all-linear": LINEAR, "all": (*LINEAR, *CONVOLUTIONS)},
    outside=(
        *("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2", "time_emb_proj"),
        *("add_embedding.linear_1", "add_embedding.linear_2", "add_embedding.proj"),
        *("add_embedding.pool.q_proj", "add_embedding.pool.k_proj", "add_embedding.pool.v_proj"),
    ),
)


def encode(pipe: Any, captions: list[str]) -> Mapping[str, Tensor]:
    """Captions -> {"encoder_hidden_states": (N, tokens, width)}, as the pipeline itself encodes them."""
    hidden, _ = pipe.encode_prompt(captions, pipe.text_encoder.device, 1, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": hidden}


def predict(
    denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], frames: Tensor
) -> Tensor:
    """The UNet's prediction, epsilon or v as the scheduler says."""
    prediction: Tensor = denoiser(latents, timesteps, conditioning["encoder_hidden_states"]).sample
    return prediction


def blank(config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """77 tokens as wide as the cross-attention."""
    return {"encoder_hidden_states": torch.empty(1, 77, config["cross_attention_dim"], device="meta")}


def encode_xl(pipe: Any, captions: list[str]) -> Mapping[str, Tensor]:
    """Captions -> both encoders' last but one layers side by side, and the second's pooled projection.

    An empty caption is zeros where the pipeline's own unconditional prediction is asked with zeros.
    """
    hidden, _, pooled, _ = pipe.encode_prompt(
        captions, device=pipe.text_encoder_2.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    if pipe.config.get("force_zeros_for_empty_prompt"):
        empty = torch.tensor([not caption for caption in captions], device=hidden.device)
        hidden, pooled = hidden.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
    return {"encoder_hidden_states": hidden, "text_embeds": pooled}


def predict_xl(
    denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], frames: Tensor
) -> Tensor:
    """As `predict`, told each picture's original size, crop and target size (SDXL's micro-conditioning)."""
    pooled = conditioning["text_embeds"]
    added = {"text_embeds": pooled, "time_ids": frames.to(pooled)}
    prediction: Tensor = denoiser(
        latents, timesteps, conditioning["encoder_hidden_states"], added_cond_kwargs=added
    ).sample
    return prediction


def blank_xl(config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """77 tokens, and a pooled text as wide as the added embedding leaves room for beside six numbers."""
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return {**blank(config), "text_embeds": torch.empty(1, pooled, device="meta")}


def projects_by_convolution(config: Mapping[str, Any]) -> bool:
    """Whether a UNet is a 1.x."""
    return not config["use_linear_projection"]


def projects_by_linear_layers(config: Mapping[str, Any]) -> bool:
    """Whether a UNet is a 2.x."""
    return bool(config["use_linear_projection"])


def _unet_paths(levels: int, depth: str, added: str) -> tuple[str, ...]:
    """`levels`: how many there are; `depth`: numbers of blocks in an attention; `added`: layers of the embedding."""
    numbers = "|".join(map(str, range(levels)))
    level = f"(down_blocks.({numbers})|mid_block|up_blocks.({numbers}))"
    block = f"{level}.attentions.#.transformer_blocks.{depth}"
    return (
        f"{level}.attentions.#.(norm|proj_in|proj_out)",
        f"{block}.(attn1|attn2).{ATTENTION_NAMES}",
        f"{block}.{FEED_FORWARD_NAMES}",
        f"{block}.(norm1|norm2|norm3)",
        f"{level}.resnets.#.(norm1|norm2|conv1|conv2|conv_shortcut|time_emb_proj|dropout|nonlinearity)",
        f"{level}.(downsamplers|upsamplers).#.conv",
        f"time_embedding.({EMBEDDER_NAMES}|cond_proj)",
        f"add_embedding.{added}",
        "(conv_in|conv_out|conv_norm_out|conv_act|time_proj|add_time_proj)",
    )


def _unet_size(widths: tuple[int, ...], context: int, depth: Mapping[str, int], *, layout: str = "") -> PublishedSize:
    """A UNet with `widths` from the finest level on, and attention to texts `context` wide."""
    inputs = {"*.attn2.(to_k|to_v)": context}
    takes = "attentions.*.((attn1|attn2).(to_q|to_k|to_v)|ff.net.0.proj|proj_in)"
    for level, width in enumerate(widths):
        inputs[f"(down_blocks.{level}|up_blocks.{len(widths) - 1 - level}).{takes}"] = width
    inputs[f"mid_block.{takes}"] = widths[-1]
    return PublishedSize(depth, inputs, layout)


_WIDTHS = (320, 640, 1280, 1280)
_DEPTH = {"*.transformer_blocks.#": 1}
_DEPTH_XL = {
    "(down_blocks.1|up_blocks.1).*.transformer_blocks.#": 2,
    "(down_blocks.2|mid_block|up_blocks.0).*.transformer_blocks.#": 10,
}
_PATHS = _unet_paths(4, "0", "(norm1|norm2|proj|pool.(q_proj|k_proj|v_proj))")
_POCKET = _unet_size((64, 128, 192), 256, _DEPTH)  # the embedded base

_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")

STABLE_DIFFUSION_1 = Family(
    name="sd1",
    names=ToolNames("stable-diffusion-v1", "sd_v1", version_v="sd_v1_v"),
    pipeline_classes=_PIPELINES,
    denoiser=UNET,
    text_encoders=(clip("text_encoder"),),
    encode=encode,
    predict=predict,
    codec=SCALED,
    blank=blank,
    signature=Signature(
        parts={
            "unet": PartSignature(_PATHS, (_unet_size(_WIDTHS, 768, _DEPTH, layout="ldm"), _POCKET), convolves=True),
            "text_encoder": clip_l(),
        },
        called="(stable-diffusion|sd)-?v?-?1(-?[45])?(-|$)",
        encoders={"te": "text_encoder", "clip_l": "text_encoder"},
    ),
    embeds={"encoder_hidden_states": "prompt_embeds"},
    is_mine=projects_by_convolution,
)

STABLE_DIFFUSION_2 = replace(
    STABLE_DIFFUSION_1,
    name="sd2",
    names=ToolNames("stable-diffusion-v2-512", "sd_v2", "stable-diffusion-v2-768-v", "sd_v2_v"),
    is_mine=projects_by_linear_layers,
    signature=Signature(
        parts={
            "unet": PartSignature(_PATHS, (_unet_size(_WIDTHS, 1024, _DEPTH, layout="ldm"),), convolves=False),
            "text_encoder": clip_signature(1024, 23),
        },
        called="(stable-diffusion|sd)-?v?-?2(-?[01])?(-|$)",
        encoders={"te": "text_encoder", "clip_h": "text_encoder"},
    ),
)

STABLE_DIFFUSION_XL = Family(
    name="sdxl",
    names=ToolNames("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    pipeline_classes=(
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    ),
    denoiser=UNET,
    text_encoders=(clip("text_encoder"), clip("text_encoder_2")),
    encode=encode_xl,
    predict=predict_xl,
    codec=SCALED,
    blank=blank_xl,
    signature=Signature(
        parts={
            "unet": PartSignature(
                _unet_paths(3, "#", EMBEDDER_NAMES),
                (_unet_size((320, 640, 1280), 2048, _DEPTH_XL, layout="sgm"),),
                convolves=False,
            ),
            "text_encoder": clip_l(),
            "text_encoder_2": clip_g(),
        },
        called="(stable-diffusion|sd)-?xl",
        lookalikes="kolors|.*refiner",
        encoders={"clip_l": "text_encoder", "clip_g": "text_encoder_2"},
    ),
    embeds={"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"},
)
