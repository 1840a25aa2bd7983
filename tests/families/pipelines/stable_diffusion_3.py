"""Tiny Stable Diffusion 3 and 3.5 medium (dual attention, normalised queries), whole and with encoders left out."""

from functools import partial

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from tests.families.pipelines import parts
from tests.families.pipelines.record import Tiny
from tests.families.pipelines.tokenizers import clip_tokenizer, t5_tokenizer


def three(*, without: tuple[str, ...] = (), medium: bool = False) -> StableDiffusion3Pipeline:
    tokenizer = clip_tokenizer()
    encoders = {
        "text_encoder": parts.clip_with_projection(tokenizer, 16),
        "text_encoder_2": parts.clip_with_projection(tokenizer, 24),
        "text_encoder_3": parts.t5(48),
    }
    tokenizers = {"tokenizer": tokenizer, "tokenizer_2": clip_tokenizer(), "tokenizer_3": t5_tokenizer()}
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=16,
            pooled_projection_dim=40,
            pos_embed_max_size=16,
            dual_attention_layers=(0,) if medium else (),
            qk_norm="rms_norm" if medium else None,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.autoencoder(shift=0.2),
        **{name: None if name in without else encoder for name, encoder in encoders.items()},
        **{name: None if name.replace("tokenizer", "text_encoder") in without else t for name, t in tokenizers.items()},
    )


PIPELINES = {
    "sd3": Tiny("sd3", three),
    "sd3.5-medium": Tiny("sd3", partial(three, medium=True)),
    "sd3-without-t5": Tiny("sd3", partial(three, without=("text_encoder_3",))),
    "sd3-without-clip-l": Tiny("sd3", partial(three, without=("text_encoder",))),
    "sd3-without-clip-g": Tiny("sd3", partial(three, without=("text_encoder_2",))),
    "sd3-t5-alone": Tiny("sd3", partial(three, without=("text_encoder", "text_encoder_2"))),
}
