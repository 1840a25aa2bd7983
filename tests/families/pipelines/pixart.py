"""Tiny PixArt-alpha (the small model, and the large one that is told sizes) and PixArt-Sigma."""

from functools import partial

from diffusers import (
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from tests.families.pipelines import parts
from tests.families.pipelines.record import Tiny
from tests.families.pipelines.tokenizers import t5_tokenizer


def pixart(
    pipeline: type[PixArtAlphaPipeline | PixArtSigmaPipeline], *, sample_size: int, told_sizes: bool | None = None
) -> PixArtAlphaPipeline | PixArtSigmaPipeline:
    return pipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=parts.t5(24),
        vae=parts.autoencoder(),
        transformer=PixArtTransformer2DModel(
            sample_size=sample_size,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            attention_head_dim=12,
            num_attention_heads=2,
            cross_attention_dim=24,
            caption_channels=24,
            use_additional_conditions=told_sizes,
        ),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    )


NO_LOADER = "diffusers' PixArt pipelines load no adapters"
PIPELINES = {
    "pixart-alpha": Tiny("pixart-alpha", partial(pixart, PixArtAlphaPipeline, sample_size=16), plain_load=NO_LOADER),
    # 128 is what makes the pipeline tell sizes
    "pixart-alpha-1024": Tiny(
        "pixart-alpha", partial(pixart, PixArtAlphaPipeline, sample_size=128), plain_load=NO_LOADER
    ),
    "pixart-sigma": Tiny(
        "pixart-sigma", partial(pixart, PixArtSigmaPipeline, sample_size=128, told_sizes=False), plain_load=NO_LOADER
    ),
}
