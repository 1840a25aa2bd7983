"""Stable Diffusion 3 and 3.5: SD3Transformer2DModel, two CLIP encoders and a T5, any of which may be absent.

What an absent encoder would have said is zeros. The pipeline itself knows that of the T5 alone, so for an absent CLIP
encoder it is given finished embeddings. The pocket DiT is of this family.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_diffusion.families.codecs import SCALED
from dora_diffusion.families.record import Component, Drawing, Family, ToolNames, plain_arguments
from dora_diffusion.families.signature import (
    ADAPTIVE_NAMES,
    EMBEDDER_NAMES,
    FEED_FORWARD_NAMES,
    JOINT_PATHS,
    PartSignature,
    Signature,
    transformer_size,
)
from dora_diffusion.families.text import clip, clip_g, clip_l, t5, t5_signature

ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),  # 3.5 medium's first blocks
)
LINEAR = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")

TRANSFORMER = Component(
    name="transformer",
    model_classes=("SD3Transformer2DModel",),
    presets={
        "attention": ATTENTION,
        "all-linear": LINEAR,
        "all": (*LINEAR, "norm1.linear", "norm1_context.linear", "context_embedder", "norm_out.linear", "proj_out"),
    },
    outside=(
        "pos_embed.proj",
        *("timestep_embedder.linear_1", "timestep_embedder.linear_2"),
        *("text_embedder.linear_1", "text_embedder.linear_2"),
    ),
)

CLIPS = ("text_encoder", "text_encoder_2")


def encode(pipe: Any, captions: list[str]) -> Mapping[str, Tensor]:
    """Captions -> CLIP's tokens above T5's, and the pooled CLIP projections."""
    if all(getattr(pipe, name) is not None for name in CLIPS):
        device = pipe.text_encoder.device
        hidden, _, pooled, _ = pipe.encode_prompt(
            captions, None, None, device=device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}
    return _encode_without_clip(pipe, captions)


def _encode_without_clip(pipe: Any, captions: list[str]) -> Mapping[str, Tensor]:
    """As the pipeline encodes, with zeros for a CLIP encoder that is not there."""
    config = pipe.transformer.config
    encoders = (
        getattr(pipe, name) for name in (*CLIPS, "text_encoder_3")
    )  # the transformer may be elsewhere meanwhile
    device = next(encoder.device for encoder in encoders if encoder is not None)
    words = pipe._get_t5_prompt_embeds(captions, device=device, dtype=pipe.transformer.dtype)
    tokens, pooled = words[:, :0], words.new_zeros(len(captions), config.pooled_projection_dim)
    for name in CLIPS:
        if getattr(pipe, name) is not None:
            hidden, projected = _clip(pipe, name, captions)
            # the absent one's part stands after the first encoder's, or before the second's
            left = 0 if name == CLIPS[0] else config.pooled_projection_dim - projected.shape[1]
            pooled = F.pad(projected, (left, config.pooled_projection_dim - left - projected.shape[1]))
            tokens = F.pad(hidden, (left, config.joint_attention_dim - left - hidden.shape[2]))
    return {"encoder_hidden_states": torch.cat([tokens, words.to(tokens)], 1), "pooled_projections": pooled}


def _clip(pipe: Any, name: str, captions: list[str]) -> tuple[Tensor, Tensor]:
    """A CLIP encoder's last layer but one (N, tokens, width), and its projection (N, width)."""
    encoder, tokenizer = getattr(pipe, name), getattr(pipe, name.replace("text_encoder", "tokenizer"))
    tokens = tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    out = encoder(tokens.to(encoder.device), output_hidden_states=True)
    return out.hidden_states[-2], out.text_embeds


def predict(
    denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], frames: Tensor
) -> Tensor:
    """The flow's velocity."""
    prediction: Tensor = denoiser(
        latents,
        encoder_hidden_states=conditioning["encoder_hidden_states"],
        pooled_projections=conditioning["pooled_projections"],
        timestep=timesteps,
    ).sample
    return prediction


def blank(config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """77 tokens of CLIP and 256 of T5; the pooled projections."""
    return {
        "encoder_hidden_states": torch.empty(1, 77 + 256, config["joint_attention_dim"], device="meta"),
        "pooled_projections": torch.empty(1, config["pooled_projection_dim"], device="meta"),
    }


def arguments(pipe: Any, drawing: Drawing) -> dict[str, Any]:
    """Prompts as text, or, without one of the CLIP encoders, as embeddings."""
    plain = plain_arguments(pipe, drawing)
    if all(getattr(pipe, name) is not None for name in CLIPS):
        return plain
    with torch.no_grad():
        wanted, unwanted = encode(pipe, [drawing.prompt]), encode(pipe, [drawing.negative_prompt])
    return {
        "guidance_scale": plain["guidance_scale"],
        "prompt_embeds": wanted["encoder_hidden_states"],
        "pooled_prompt_embeds": wanted["pooled_projections"],
        "negative_prompt_embeds": unwanted["encoder_hidden_states"],
        "negative_pooled_prompt_embeds": unwanted["pooled_projections"],
    }


_BLOCK = "transformer_blocks.#"
_EMBEDDED = {"context_embedder": 4096, "time_text_embed.text_embedder.linear_1": 2048}

SIGNATURE = Signature(
    parts={
        "transformer": PartSignature(
            paths=(
                *JOINT_PATHS,
                f"{_BLOCK}.{FEED_FORWARD_NAMES}",
                f"{_BLOCK}.(norm1|norm2|norm1_context|norm2_context).{ADAPTIVE_NAMES}",
                f"time_text_embed.(timestep_embedder|guidance_embedder|text_embedder).{EMBEDDER_NAMES}",
                f"norm_out.{ADAPTIVE_NAMES}",
                "(time_text_embed.time_proj|pos_embed.proj|x_embedder|context_embedder|proj_out)",
            ),
            sizes=(
                transformer_size(1536, {"transformer_blocks": 24}, _EMBEDDED),
                transformer_size(2432, {"transformer_blocks": 38}, _EMBEDDED),
                transformer_size(192, {"transformer_blocks": 6}),  # the pocket DiT
            ),
        ),
        "text_encoder": clip_l(is_projected=True),
        "text_encoder_2": clip_g(),
        "text_encoder_3": t5_signature(4096),
    },
    called="(stable-diffusion|sd)-?v?-?3(-?5)?m?(-|$)",
    encoders={"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3", "t5": "text_encoder_3"},
)

STABLE_DIFFUSION_3 = Family(
    name="sd3",
    names=ToolNames("stable-diffusion-3", "sd3"),
    pipeline_classes=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    denoiser=TRANSFORMER,
    text_encoders=(clip("text_encoder"), clip("text_encoder_2"), t5("text_encoder_3")),
    encode=encode,
    predict=predict,
    codec=SCALED,
    blank=blank,
    signature=SIGNATURE,
    arguments=arguments,
    patch=2,
)
