"""Hunyuan-DiT 1.1 and 1.2: HunyuanDiT2DModel, a bilingual BERT and an mT5, AutoencoderKL.

The transformer also predicts a variance, which no scheduler here uses. 1.1 is told where a picture comes from; 1.2 is
not.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dora_diffusion.families.codecs import SCALED
from dora_diffusion.families.record import Component, Drawing, Family, plain_arguments
from dora_diffusion.families.signature import (
    ADAPTIVE_NAMES,
    ATTENTION_NAMES,
    EMBEDDER_NAMES,
    FEED_FORWARD_NAMES,
    PartSignature,
    PublishedSize,
    Signature,
    transformer_size,
)
from dora_diffusion.families.text import t5, t5_signature

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LINEAR = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "skip_linear")

TRANSFORMER = Component(
    name="transformer",
    model_classes=("HunyuanDiT2DModel",),
    presets={
        "attention": ATTENTION,
        "all-linear": LINEAR,
        "all": (
            *(*LINEAR, "norm1.linear", "norm_out.linear", "proj_out"),
            *("text_embedder.linear_1", "text_embedder.linear_2"),
        ),
    },
    outside=(
        *("pos_embed.proj", "style_embedder"),
        *("timestep_embedder.linear_1", "timestep_embedder.linear_2"),
        *("extra_embedder.linear_1", "extra_embedder.linear_2"),
        # their weights are read without calling them, so an adapter could do nothing
        *("pooler.q_proj", "pooler.k_proj", "pooler.v_proj", "pooler.c_proj"),
    ),
)

_BERT_ATTENTION = ("self.query", "self.key", "self.value", "attention.output.dense")
_BERT_LINEAR = (*_BERT_ATTENTION, "intermediate.dense", "output.dense")

BERT = Component(
    name="text_encoder",
    model_classes=("BertModel",),
    presets={"attention": _BERT_ATTENTION, "all-linear": _BERT_LINEAR, "all": _BERT_LINEAR},
    outside=("word_embeddings", "position_embeddings", "token_type_embeddings", "pooler.dense"),
)

# What the model knows as 1 in its positions: a picture of 512 pixels at the VAE's factor of 8.
_BASE_SIDE = 64


def encode(pipe: Any, captions: list[str]) -> Mapping[str, Tensor]:
    """Captions -> 77 tokens of BERT and 256 of mT5, with a mask of each."""
    named: dict[str, Tensor] = {}
    for index, (encoder, suffix) in enumerate(((pipe.text_encoder, ""), (pipe.text_encoder_2, "_t5"))):
        hidden, _, mask, _ = pipe.encode_prompt(
            captions,
            encoder.device,
            pipe.transformer.dtype,
            do_classifier_free_guidance=False,
            text_encoder_index=index,
        )
        named |= {f"encoder_hidden_states{suffix}": hidden, f"text_embedding_mask{suffix}": mask}
    return named


def predict(
    denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], frames: Tensor
) -> Tensor:
    """Epsilon or v, told each picture's original size, target size and crop, and the one style there is."""
    original, crop, target = frames.split(2, dim=1)
    prediction: Tensor = denoiser(
        latents,
        timesteps.to(latents.dtype),  # the transformer computes its embedding of time in their dtype
        encoder_hidden_states=conditioning["encoder_hidden_states"],
        text_embedding_mask=conditioning["text_embedding_mask"],
        encoder_hidden_states_t5=conditioning["encoder_hidden_states_t5"],
        text_embedding_mask_t5=conditioning["text_embedding_mask_t5"],
        image_meta_size=torch.cat([original, target, crop], 1).to(latents),
        style=torch.zeros(len(latents), dtype=torch.long, device=latents.device),
        image_rotary_emb=_positions(denoiser.config, latents),
    ).sample
    return prediction[:, : latents.shape[1]]


def _positions(config: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (tokens, head width) of the places of a picture's tokens, centred as in training."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    rows, columns = (side // config.patch_size for side in latents.shape[-2:])
    region = get_resize_crop_region_for_grid((rows, columns), _BASE_SIDE // config.patch_size)
    positions: tuple[Tensor, Tensor] = get_2d_rotary_pos_embed(
        config.attention_head_dim, region, (rows, columns), device=latents.device, output_type="pt"
    )
    return positions


def blank(config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """77 tokens of BERT and 256 of mT5."""
    bert, mt5 = config["text_len"], config["text_len_t5"]
    return {
        "encoder_hidden_states": torch.empty(1, bert, config["cross_attention_dim"], device="meta"),
        "text_embedding_mask": torch.empty(1, bert, dtype=torch.long, device="meta"),
        "encoder_hidden_states_t5": torch.empty(1, mt5, config["cross_attention_dim_t5"], device="meta"),
        "text_embedding_mask_t5": torch.empty(1, mt5, dtype=torch.long, device="meta"),
    }


def arguments(pipe: Any, drawing: Drawing) -> dict[str, Any]:
    """Drawn at the size that is asked for, and not at the nearest of the pipeline's list."""
    return {**plain_arguments(pipe, drawing), "use_resolution_binning": False}


_BERT_SIGNATURE = PartSignature(
    paths=(
        "encoder.layer.#.attention.(self.(query|key|value|dropout)|output.(dense|dropout|LayerNorm))",
        "encoder.layer.#.(intermediate.(dense|intermediate_act_fn)|output.(dense|dropout|LayerNorm))",
        "embeddings.(word_embeddings|position_embeddings|token_type_embeddings|LayerNorm|dropout)",
        "pooler.(dense|activation)",
    ),
    sizes=(PublishedSize({"encoder.layer.#": 24}, {"(*.self.(query|key|value)|*.intermediate.dense)": 1024}),),
)

SIGNATURE = Signature(
    parts={
        "transformer": PartSignature(
            paths=(
                f"blocks.#.(attn1|attn2).{ATTENTION_NAMES}",
                f"blocks.#.{FEED_FORWARD_NAMES}",
                f"blocks.#.(norm1|norm2|norm3)(.{ADAPTIVE_NAMES}|)",
                "blocks.#.(skip_linear|skip_norm)",
                f"time_extra_emb.(timestep_embedder|extra_embedder).{EMBEDDER_NAMES}",
                "time_extra_emb.(time_proj|size_proj|style_embedder|pooler.(q_proj|k_proj|v_proj|c_proj))",
                f"text_embedder.{EMBEDDER_NAMES}",
                f"norm_out.{ADAPTIVE_NAMES}",
                "(pos_embed.proj|proj_out)",
            ),
            sizes=(transformer_size(1408, {"blocks": 40}, {"blocks.#.attn2.(to_k|to_v)": 1024}),),
        ),
        "text_encoder": _BERT_SIGNATURE,
        "text_encoder_2": t5_signature(2048),
    },
    called="hunyuan-?dit",
)

HUNYUAN_DIT = Family(
    name="hunyuan-dit",
    pipeline_classes=("HunyuanDiTPipeline",),
    denoiser=TRANSFORMER,
    text_encoders=(BERT, t5("text_encoder_2")),
    encode=encode,
    predict=predict,
    codec=SCALED,
    blank=blank,
    signature=SIGNATURE,
    arguments=arguments,
    patch=2,
)
