"""Tiny AuraFlow."""

from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import UMT5Config, UMT5EncoderModel

from tests.families.pipelines import parts
from tests.families.pipelines.record import Tiny
from tests.families.pipelines.tokenizers import t5_tokenizer


def umt5(words: int, width: int) -> UMT5EncoderModel:
    """T5 with positions in every layer."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=words,
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def aura_flow() -> AuraFlowPipeline:
    tokenizer = t5_tokenizer()
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=umt5(len(tokenizer), 24),
        vae=parts.autoencoder(),
        transformer=AuraFlowTransformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=16,
            pos_embed_max_size=256,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


PIPELINES = {"auraflow": Tiny("auraflow", aura_flow)}
