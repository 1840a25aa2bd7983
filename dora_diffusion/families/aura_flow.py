"""AuraFlow: AuraFlowTransformer2DModel, a UMT5 text encoder (Pile-T5), AutoencoderKL."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dora_diffusion.families.codecs import SCALED
from dora_diffusion.families.record import Component, Family
from dora_diffusion.families.signature import (
    ADAPTIVE_NAMES,
    ATTENTION_NAMES,
    EMBEDDER_NAMES,
    JOINT_NAMES,
    PartSignature,
    Signature,
    transformer_size,
)
from dora_diffusion.families.text import t5, t5_signature

ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),  # the first blocks' text
)
LINEAR = (
    *ATTENTION,
    *("ff.linear_1", "ff.linear_2", "ff.out_projection"),
    *("ff_context.linear_1", "ff_context.linear_2", "ff_context.out_projection"),
)

TRANSFORMER = Component(
    name="transformer",
    model_classes=("AuraFlowTransformer2DModel",),
    presets={
        "attention": ATTENTION,
        "all-linear": LINEAR,
        "all": (*LINEAR, "norm1.linear", "norm1_context.linear", "context_embedder", "norm_out.linear", "proj_out"),
    },
    outside=("pos_embed.proj", "time_step_proj.linear_1", "time_step_proj.linear_2"),
)

TOKENS = 256  # of a caption, as the pipeline pads it


def encode(pipe: Any, captions: list[str]) -> Mapping[str, Tensor]:
    """Captions -> {"encoder_hidden_states": (N, 256, width)}, zeros where a caption has ended; there is no mask."""
    hidden, *_ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, device=pipe.text_encoder.device)
    return {"encoder_hidden_states": hidden}


def predict(
    denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], frames: Tensor
) -> Tensor:
    """The flow's velocity; the transformer counts time from 0 to 1."""
    prediction: Tensor = denoiser(
        latents,
        encoder_hidden_states=conditioning["encoder_hidden_states"],
        timestep=(timesteps / 1000).to(latents.dtype),
    ).sample
    return prediction


def blank(config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """256 tokens of T5."""
    return {"encoder_hidden_states": torch.empty(1, TOKENS, config["joint_attention_dim"], device="meta")}


def native_side(pipe: Any) -> int:
    """1024, or as many pixels as there are learned positions for; the config's `sample_size` says neither."""
    config = pipe.transformer.config
    return min(1024, math.isqrt(config.pos_embed_max_size) * config.patch_size * pipe.vae_scale_factor)


def scheduler_time(timestep: Tensor) -> Tensor:
    """0..1 -> 0..1000."""
    return 1000 * timestep


_DOUBLE, _SINGLE = "joint_transformer_blocks.#", "single_transformer_blocks.#"

SIGNATURE = Signature(
    parts={
        "transformer": PartSignature(
            paths=(
                f"({_DOUBLE}|{_SINGLE}).attn.{ATTENTION_NAMES}",
                f"({_DOUBLE}|{_SINGLE}).attn.{JOINT_NAMES}",
                f"{_DOUBLE}.(ff|ff_context).(linear_#|out_projection)",
                f"{_DOUBLE}.(norm1|norm2|norm1_context|norm2_context).{ADAPTIVE_NAMES}",
                f"{_SINGLE}.ff.(linear_#|out_projection)",
                f"{_SINGLE}.(norm1|norm2).{ADAPTIVE_NAMES}",
                f"time_step_proj.{EMBEDDER_NAMES}",
                f"norm_out.{ADAPTIVE_NAMES}",
                "(pos_embed.proj|time_step_embed|context_embedder|proj_out)",
            ),
            sizes=(
                transformer_size(
                    3072,
                    {"joint_transformer_blocks": 4, "single_transformer_blocks": 32},
                    {"context_embedder": 2048},
                ),
            ),
        ),
        "text_encoder": t5_signature(2048),
    },
    called="aura-?flow",
)

AURA_FLOW = Family(
    name="auraflow",
    pipeline_classes=("AuraFlowPipeline",),
    denoiser=TRANSFORMER,
    text_encoders=(t5("text_encoder"),),
    encode=encode,
    predict=predict,
    codec=SCALED,
    blank=blank,
    signature=SIGNATURE,
    native_side=native_side,
    patch=2,
    scheduler_time=scheduler_time,
)
