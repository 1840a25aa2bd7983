"""Tiny FLUX.2 (dev, told its guidance) and Klein, whose base and distilled form are one without guidance.

Their language models have as many layers as the pipelines ask for by default, and one more.
"""

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3ForCausalLM

from tests.families.pipelines import parts
from tests.families.pipelines.record import Tiny
from tests.families.pipelines.tokenizers import mistral_tokenizer, qwen_tokenizer


def transformer(*, guidance: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * 8,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance,
    )


def autoencoder() -> AutoencoderKLFlux2:
    """Of factor 2, with statistics in its batch norm that change what goes through."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    torch.nn.init.normal_(vae.bn.running_mean, std=0.3)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    return vae


def mistral() -> Mistral3ForConditionalGeneration:
    text = {
        "model_type": "mistral",
        "vocab_size": 300,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 31,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "max_position_embeddings": 1024,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 32,
        "patch_size": 8,
    }
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision, image_token_index=3))


def dev() -> Flux2Pipeline:
    return Flux2Pipeline(
        transformer=transformer(guidance=True),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(),
        text_encoder=mistral(),
        tokenizer=mistral_tokenizer(),
    )


def klein() -> Flux2KleinPipeline:
    return Flux2KleinPipeline(
        transformer=transformer(guidance=False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(),
        text_encoder=Qwen3ForCausalLM(parts.qwen3_config(28, 8)),
        tokenizer=qwen_tokenizer(),
        is_distilled=True,
    )


PIPELINES = {
    "flux2-dev": Tiny("flux2", dev),
    "flux2-klein": Tiny("flux2-klein", klein),
}
