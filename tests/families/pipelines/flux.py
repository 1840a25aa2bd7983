"""Tiny FLUX.1 dev (told its guidance) and schnell (not)."""

from functools import partial

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from tests.families.pipelines import parts
from tests.families.pipelines.record import Tiny
from tests.families.pipelines.tokenizers import clip_tokenizer, t5_tokenizer


def flux(*, dev: bool) -> FluxPipeline:
    tokenizer = clip_tokenizer()
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=dev,
            axes_dims_rope=(2, 2, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev),
        vae=parts.autoencoder(shift=0.2),
        text_encoder=parts.clip(tokenizer, 16),
        tokenizer=tokenizer,
        text_encoder_2=parts.t5(24),
        tokenizer_2=t5_tokenizer(),
    )


PIPELINES = {
    "flux-dev": Tiny("flux", partial(flux, dev=True)),
    "flux-schnell": Tiny("flux", partial(flux, dev=False)),
}
