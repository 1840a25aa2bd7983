"""Tiny Sana and Sana 1.5 (normalised queries)."""

from functools import partial
from inspect import signature

from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

from tests.families.pipelines.gemma import gemma, gemma_tokenizer
from tests.families.pipelines.record import Tiny


def autoencoder() -> AutoencoderDC:
    """Factor 2, one block with attention."""
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        scaling_factor=0.41407,
    )


def instruction() -> str:
    """What the pipeline puts before a prompt."""
    return "\n".join(signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)


def sana(*, normalised: bool = False) -> SanaPipeline:
    tokenizer = gemma_tokenizer(instruction())
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma(tokenizer, 24),
        vae=autoencoder(),
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=24,
            sample_size=16,
            qk_norm="rms_norm_across_heads" if normalised else None,
        ),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


PIPELINES = {"sana": Tiny("sana", sana), "sana-1.5": Tiny("sana", partial(sana, normalised=True))}
