"""Qwen-Image: QwenImageTransformer2DModel, a Qwen 2.5 VL for the text, a film's autoencoder for films of one frame."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dora_diffusion.families.codecs import FRAME
from dora_diffusion.families.packing import pack, thousandth, unpack
from dora_diffusion.families.record import Component, Drawing, Family, ToolNames
from dora_diffusion.families.signature import (
    ADAPTIVE_NAMES,
    EMBEDDER_NAMES,
    JOINT_PATHS,
    PartSignature,
    Signature,
    transformer_size,
)
from dora_diffusion.families.text import decoder, decoder_signature

ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
LINEAR = (*ATTENTION, "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")

TRANSFORMER = Component(
    name="transformer",
    model_classes=("QwenImageTransformer2DModel",),
    presets={
        "attention": ATTENTION,
        "all-linear": LINEAR,
        "all": (*LINEAR, "img_mod.1", "txt_mod.1", "img_in", "txt_in", "norm_out.linear", "proj_out"),
    },
    outside=("timestep_embedder.linear_1", "timestep_embedder.linear_2", "addition_t_embedding"),
)

QWEN = decoder(
    "text_encoder",
    ("Qwen2_5_VLForConditionalGeneration",),
    layers="language_model.layers.*.",
    outside=("visual.*", "lm_head"),
)

PROMPT_TOKENS = 512  # what the pipeline's call allows by default; its encode_prompt alone would allow 1024
NATIVE_SIDE = 1024


def encode(pipe: Any, captions: list[str]) -> Mapping[str, Tensor]:
    """Captions -> the language model's last layer, as long as the longest caption, and a mask of what is caption."""
    hidden, mask = pipe.encode_prompt(captions, device=pipe.text_encoder.device, max_sequence_length=PROMPT_TOKENS)
    if mask is None:  # captions of one length
        mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    return {"encoder_hidden_states": hidden, "encoder_hidden_states_mask": mask}


def predict(
    denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], frames: Tensor
) -> Tensor:
    """The flow's velocity."""
    height, width = latents.shape[-2:]
    tokens: Tensor = denoiser(
        pack(latents),
        encoder_hidden_states=conditioning["encoder_hidden_states"],
        encoder_hidden_states_mask=conditioning.get("encoder_hidden_states_mask"),
        timestep=timesteps / 1000,
        img_shapes=[[(1, height // 2, width // 2)]] * len(latents),
    ).sample
    return unpack(tokens, height, width)


def blank(config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """512 tokens of the language model."""
    return {"encoder_hidden_states": torch.empty(1, PROMPT_TOKENS, config["joint_attention_dim"], device="meta")}


def arguments(pipe: Any, drawing: Drawing) -> dict[str, Any]:
    """Prompts and guidance, which the pipeline gives only to those who name a negative prompt, be it a space."""
    is_guided = drawing.guidance_scale > 1
    return {
        "prompt": drawing.prompt,
        "negative_prompt": (drawing.negative_prompt or " ") if is_guided else None,
        "true_cfg_scale": drawing.guidance_scale,
    }


def native_side(pipe: Any) -> int:
    """1024 pixels: the config knows no size, and this is what the pipeline draws by itself."""
    return NATIVE_SIDE


def grid(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the picture's tokens."""
    _, rows, columns = keywords["img_shapes"][0][0]
    return rows, columns


# The eyes of Qwen 2.5 VL.
_SIGHT = (
    "(model.|)visual.blocks.#.(norm1|norm2|attn.(qkv|proj)|mlp.(gate_proj|up_proj|down_proj|act_fn))",
    "(model.|)visual.(merger.ln_q|merger.mlp.#|patch_embed.proj|rotary_pos_emb)",
)

SIGNATURE = Signature(
    parts={
        "transformer": PartSignature(
            paths=(
                *JOINT_PATHS,
                "transformer_blocks.#.(img|txt)_(mod.#|norm1|norm2|mlp.net.#(.proj|))",
                f"time_text_embed.timestep_embedder.{EMBEDDER_NAMES}",
                f"norm_out.{ADAPTIVE_NAMES}",
                "(time_text_embed.time_proj|pos_embed|img_in|txt_in|txt_norm|proj_out)",
            ),
            sizes=(transformer_size(3072, {"transformer_blocks": 60}, {"img_in": 64, "txt_in": 3584}),),
        ),
        "text_encoder": decoder_signature(28, 3584, prefix="model.language_model.", sight=_SIGHT),
    },
    called="qwen(-?image)?(-|$)",
    is_original=True,
)

QWEN_IMAGE = Family(
    name="qwen-image",
    names=ToolNames("Qwen-Image", "qwen_image"),
    pipeline_classes=("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
    denoiser=TRANSFORMER,
    text_encoders=(QWEN,),
    encode=encode,
    predict=predict,
    codec=FRAME,
    blank=blank,
    signature=SIGNATURE,
    arguments=arguments,
    native_side=native_side,
    patch=2,
    unpack=unpack,
    grid=grid,
    scheduler_time=thousandth,
)
