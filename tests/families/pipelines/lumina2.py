"""Tiny Lumina-Image 2.0."""

from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

from tests.families.pipelines import parts
from tests.families.pipelines.gemma import gemma, gemma_tokenizer
from tests.families.pipelines.record import Tiny


def lumina2() -> Lumina2Pipeline:
    tokenizer = gemma_tokenizer("You are an assistant designed to generate superior images <Prompt Start> ")
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(300, 32, 32),
            cap_feat_dim=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=parts.autoencoder(shift=0.2, levels=4),  # the pipeline takes a factor of 8, whatever the VAE's is
        text_encoder=gemma(tokenizer),
        tokenizer=tokenizer,
    )


PIPELINES = {"lumina2": Tiny("lumina2", lumina2, side=64)}
