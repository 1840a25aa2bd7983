"""FLUX.1: FluxTransformer2DModel, a CLIP encoder read for its pooled text, a T5 for its tokens.

dev and schnell differ in their configs alone: dev was distilled from guidance and is told its strength.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_diffusion.families.codecs import SCALED
from dora_diffusion.families.packing import grid_ids, pack, thousandth, unpack
from dora_diffusion.families.record import Component, Drawing, Family, ToolNames, no_negative_prompt
from dora_diffusion.families.signature import (
    ADAPTIVE_NAMES,
    EMBEDDER_NAMES,
    FEED_FORWARD_NAMES,
    JOINT_PATHS,
    PartSignature,
    Signature,
    transformer_size,
)
from dora_diffusion.families.text import clip, clip_l, t5, t5_signature

ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
LINEAR = (
    *ATTENTION,
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("proj_mlp", "single_transformer_blocks.*.proj_out"),
)

TRANSFORMER = Component(
    name="transformer",
    model_classes=("FluxTransformer2DModel",),
    presets={
        "attention": ATTENTION,
        "all-linear": LINEAR,
        "all": (
            *LINEAR,
            *("norm1.linear", "norm1_context.linear", "norm.linear"),
            *("x_embedder", "context_embedder", "norm_out.linear", "proj_out"),
        ),
    },
    outside=(
        *("timestep_embedder.linear_1", "timestep_embedder.linear_2"),
        *("guidance_embedder.linear_1", "guidance_embedder.linear_2"),
        *("text_embedder.linear_1", "text_embedder.linear_2"),
    ),
)

# At 1 a model distilled from guidance says what it would without any, so that an adapter learns the pictures as they
# are; at 3.5 it would learn pictures that become them under guidance. Drawing may use any strength afterwards.
TRAINING_GUIDANCE = 1.0

NATIVE_SIDE = 1024


def training_guidance(denoiser: nn.Module, latents: Tensor) -> Tensor | None:
    """(N,) fp32 for a transformer that is told its guidance, None for one that is not."""
    config: Any = denoiser.config
    if not config.guidance_embeds:
        return None
    return torch.full((len(latents),), TRAINING_GUIDANCE, device=latents.device)


def encode(pipe: Any, captions: list[str]) -> Mapping[str, Tensor]:
    """Captions -> T5's tokens and CLIP's pooled text."""
    hidden, pooled, _ = pipe.encode_prompt(captions, device=pipe.text_encoder.device)
    return {"encoder_hidden_states": hidden, "pooled_projections": pooled}


def predict(
    denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], frames: Tensor
) -> Tensor:
    """The flow's velocity."""
    height, width = latents.shape[-2:]
    hidden, device = conditioning["encoder_hidden_states"], latents.device
    tokens: Tensor = denoiser(
        pack(latents),
        encoder_hidden_states=hidden,
        pooled_projections=conditioning["pooled_projections"],
        timestep=timesteps / 1000,
        guidance=training_guidance(denoiser, latents),
        txt_ids=torch.zeros(hidden.shape[1], 3, dtype=torch.long, device=device),
        img_ids=F.pad(grid_ids(height // 2, width // 2, device), (1, 0)),
    ).sample
    return unpack(tokens, height, width)


def blank(config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """512 tokens of T5 and the pooled text."""
    return {
        "encoder_hidden_states": torch.empty(1, 512, config["joint_attention_dim"], device="meta"),
        "pooled_projections": torch.empty(1, config["pooled_projection_dim"], device="meta"),
    }


def arguments(pipe: Any, drawing: Drawing) -> dict[str, Any]:
    """Prompt and guidance; a ValueError for a negative prompt, which the distilled models do not know."""
    no_negative_prompt("FLUX.1", drawing)
    return {"prompt": drawing.prompt, "guidance_scale": drawing.guidance_scale}


def native_side(pipe: Any) -> int:
    """1024 pixels: FLUX's config knows no size."""
    return NATIVE_SIDE


def grid(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the picture's tokens, from the last one's place; Kontext's references come behind."""
    places = keywords["img_ids"]
    _, row, column = places[places[:, 0] == places[0, 0]][-1].tolist()
    return int(row) + 1, int(column) + 1


_BLOCK, _SINGLE = "transformer_blocks.#", "single_transformer_blocks.#"
_EMBEDDED = {"x_embedder": 64, "context_embedder": 4096, "time_text_embed.text_embedder.linear_1": 768}

SIGNATURE = Signature(
    parts={
        "transformer": PartSignature(
            paths=(
                *JOINT_PATHS,
                f"{_BLOCK}.{FEED_FORWARD_NAMES}",
                f"{_BLOCK}.(norm1|norm2|norm1_context|norm2_context).{ADAPTIVE_NAMES}",
                f"{_SINGLE}.attn.(to_q|to_k|to_v|norm_q|norm_k)",
                f"{_SINGLE}.(proj_mlp|act_mlp|proj_out|norm|norm.{ADAPTIVE_NAMES})",
                f"time_text_embed.(timestep_embedder|guidance_embedder|text_embedder).{EMBEDDER_NAMES}",
                f"norm_out.{ADAPTIVE_NAMES}",
                "(time_text_embed.time_proj|pos_embed|x_embedder|context_embedder|proj_out)",
            ),
            sizes=(transformer_size(3072, {"transformer_blocks": 19, "single_transformer_blocks": 38}, _EMBEDDED),),
        ),
        "text_encoder": clip_l(),
        "text_encoder_2": t5_signature(4096),
    },
    called="flux(-?1)?(?!-2)(-|$)",
    lookalikes="chroma",
    # the T5 is the second encoder; kohya numbers it as the third all the same
    encoders={"clip_l": "text_encoder", "te3": "text_encoder_2", "t5xxl": "text_encoder_2", "t5": "text_encoder_2"},
)

FLUX = Family(
    name="flux",
    names=ToolNames("flux-1-dev", "flux1"),
    pipeline_classes=("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    denoiser=TRANSFORMER,
    text_encoders=(clip("text_encoder"), t5("text_encoder_2")),
    encode=encode,
    predict=predict,
    codec=SCALED,
    blank=blank,
    signature=SIGNATURE,
    arguments=arguments,
    native_side=native_side,
    patch=2,
    unpack=unpack,
    grid=grid,
    scheduler_time=thousandth,
)
