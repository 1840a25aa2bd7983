"""FLUX.2 (dev) and FLUX.2 Klein: Flux2Transformer2DModel on latents in 2 x 2 patches, a language model for the text.

dev reads a Mistral 3 and is told its guidance; Klein reads a Qwen 3 and is guided, if it is, by an empty prompt.
Klein's base and its distilled form share config and call; the pipeline alone knows which it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_diffusion.families.codecs import PATCHED
from dora_diffusion.families.flux import native_side, training_guidance
from dora_diffusion.families.packing import flatten, grid_ids, thousandth, unflatten
from dora_diffusion.families.record import Component, Drawing, Family, ToolNames, no_negative_prompt
from dora_diffusion.families.shifts import flux_2_shift
from dora_diffusion.families.signature import (
    ADAPTIVE_NAMES,
    EMBEDDER_NAMES,
    JOINT_PATHS,
    PartSignature,
    PublishedSize,
    Signature,
    transformer_size,
)
from dora_diffusion.families.text import decoder, decoder_signature

# Most blocks are of the single kind, which fuses its attention with its feed-forward into two layers: without these the
# attention of 8 blocks of 56 would be adapted.
ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("attn.to_qkv_mlp_proj", "single_transformer_blocks.*.attn.to_out"),
)
LINEAR = (*ATTENTION, "ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")

TRANSFORMER = Component(
    name="transformer",
    model_classes=("Flux2Transformer2DModel",),
    presets={
        "attention": ATTENTION,
        "all-linear": LINEAR,
        "all": (
            *LINEAR,
            *("double_stream_modulation_img.linear", "double_stream_modulation_txt.linear"),
            *("single_stream_modulation.linear", "norm_out.linear"),
            *("x_embedder", "context_embedder", "proj_out"),
        ),
    },
    outside=(
        *("timestep_embedder.linear_1", "timestep_embedder.linear_2"),
        *("guidance_embedder.linear_1", "guidance_embedder.linear_2"),
    ),
)

MISTRAL = decoder(
    "text_encoder",
    ("Mistral3ForConditionalGeneration",),
    layers="language_model.layers.*.",
    outside=("vision_tower.*", "multi_modal_projector.*", "lm_head"),
)
QWEN = decoder("text_encoder", ("Qwen3ForCausalLM", "Qwen3Model"), outside=("lm_head",))


def encode(pipe: Any, captions: list[str]) -> Mapping[str, Tensor]:
    """Captions -> three layers of the language model side by side, 512 tokens each."""
    hidden, _ = pipe.encode_prompt(captions, device=pipe.text_encoder.device)
    return {"encoder_hidden_states": hidden}


def predict(
    denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], frames: Tensor
) -> Tensor:
    """The flow's velocity of patched latents (N, 4C, h/2, w/2)."""
    height, width = latents.shape[-2:]
    hidden, device = conditioning["encoder_hidden_states"], latents.device
    tokens: Tensor = denoiser(
        flatten(latents),
        encoder_hidden_states=hidden,
        timestep=timesteps / 1000,
        guidance=training_guidance(denoiser, latents),
        txt_ids=F.pad(torch.arange(hidden.shape[1], device=device)[:, None], (3, 0)),
        img_ids=F.pad(grid_ids(height, width, device), (1, 1)),
    ).sample
    return unflatten(tokens, height, width)


def blank(config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """512 tokens as wide as three of the language model's layers."""
    return {"encoder_hidden_states": torch.empty(1, 512, config["joint_attention_dim"], device="meta")}


def arguments(pipe: Any, drawing: Drawing) -> dict[str, Any]:
    """Prompt and guidance; a ValueError for a negative prompt, which the pipelines do not take."""
    no_negative_prompt("FLUX.2", drawing)
    return {"prompt": drawing.prompt, "guidance_scale": drawing.guidance_scale}


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(N, hw/4, 4C) -> (N, 4C, h/2, w/2), for h and w of the VAE's latents."""
    return unflatten(tokens, height // 2, width // 2)


def grid(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the picture's tokens, from the last one's place: (N, tokens, 4), or (tokens, 4)."""
    _, row, column, _ = keywords["img_ids"].reshape(-1, 4)[-1].tolist()
    return int(row) + 1, int(column) + 1


_BLOCK, _SINGLE = "transformer_blocks.#", "single_transformer_blocks.#"
# The eyes of Mistral 3.
_SIGHT = (
    "(model.|)vision_tower.(ln_pre|patch_conv|patch_positional_embedding)",
    "(model.|)vision_tower.transformer.layers.#.attention.(q_proj|k_proj|v_proj|o_proj)",
    "(model.|)vision_tower.transformer.layers.#.feed_forward.(gate_proj|up_proj|down_proj|act_fn)",
    "(model.|)vision_tower.transformer.layers.#.(attention_norm|ffn_norm)",
    "(model.|)multi_modal_projector.(linear_#|act|norm|patch_merger.merging_layer)",
)


def _transformer(embedders: str, *sizes: PublishedSize) -> PartSignature:
    """`embedders`: of time and, in dev, guidance."""
    paths = (
        *JOINT_PATHS,
        f"{_BLOCK}.(ff|ff_context).(linear_in|linear_out|act_fn.gate_fn)",
        f"{_BLOCK}.(norm1|norm2|norm1_context|norm2_context)",
        f"{_SINGLE}.attn.(to_qkv_mlp_proj|to_out|norm_q|norm_k|mlp_act_fn.gate_fn)",
        f"{_SINGLE}.norm",
        "(double_stream_modulation_img|double_stream_modulation_txt|single_stream_modulation).(linear|act_fn)",
        f"time_guidance_embed.{embedders}.{EMBEDDER_NAMES}",
        f"norm_out.{ADAPTIVE_NAMES}",
        "(time_guidance_embed.time_proj|pos_embed|x_embedder|context_embedder|proj_out)",
    )
    return PartSignature(paths, sizes)


def _size(width: int, blocks: int, single: int, text: int) -> PublishedSize:
    stacks = {"transformer_blocks": blocks, "single_transformer_blocks": single}
    return transformer_size(width, stacks, {"x_embedder": 128, "context_embedder": text})


FLUX_2 = Family(
    name="flux2",
    names=ToolNames("flux-2-dev", "flux_2_dev"),
    pipeline_classes=("Flux2Pipeline",),
    denoiser=TRANSFORMER,
    text_encoders=(MISTRAL,),
    encode=encode,
    predict=predict,
    codec=PATCHED,
    blank=blank,
    signature=Signature(
        parts={
            "transformer": _transformer("(timestep_embedder|guidance_embedder)", _size(6144, 8, 48, 15360)),
            "text_encoder": decoder_signature(40, 5120, prefix="model.language_model.", sight=_SIGHT),
        },
        called="flux-?2(-dev|(?!-klein|-dev)(-|$))",
    ),
    arguments=arguments,
    native_side=native_side,
    patch=2,
    unpack=unpack,
    grid=grid,
    scheduler_time=thousandth,
    shift=flux_2_shift,
)

FLUX_2_KLEIN = replace(
    FLUX_2,
    name="flux2-klein",
    names=ToolNames("flux-2-klein"),
    pipeline_classes=("Flux2KleinPipeline", "Flux2KleinInpaintPipeline"),
    text_encoders=(QWEN,),
    signature=Signature(
        parts={
            "transformer": _transformer("timestep_embedder", _size(3072, 5, 20, 7680), _size(4096, 8, 24, 12288)),
            "text_encoder": decoder_signature(36, 2560, 4096, prefix="model."),
        },
        called="flux-?2(-klein|(?!-klein|-dev)(-|$))",
    ),
)
