"""Tiny Stable Diffusion 1.x, 2.x (epsilon and v) and XL."""

from functools import partial
from typing import Any

from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

from tests.families.pipelines import parts
from tests.families.pipelines.record import Tiny
from tests.families.pipelines.tokenizers import clip_tokenizer


def scheduler(prediction: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def unet(**changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=changes.pop("down", ("CrossAttnDownBlock2D", "DownBlock2D")),
        up_block_types=changes.pop("up", ("UpBlock2D", "CrossAttnUpBlock2D")),
        **{"cross_attention_dim": 16} | changes,
    )


def one(*, prediction: str = "epsilon", linear: bool = False) -> StableDiffusionPipeline:
    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=parts.autoencoder(),
        text_encoder=parts.clip(tokenizer),
        tokenizer=tokenizer,
        unet=unet(use_linear_projection=linear),
        scheduler=scheduler(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def xl() -> StableDiffusionXLPipeline:
    tokenizer = clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=parts.autoencoder(),
        text_encoder=parts.clip(tokenizer),
        text_encoder_2=parts.clip_with_projection(tokenizer, 24),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            down=("DownBlock2D", "CrossAttnDownBlock2D"),
            up=("CrossAttnUpBlock2D", "UpBlock2D"),
            use_linear_projection=True,
            cross_attention_dim=40,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
        ),
        scheduler=scheduler(),
        add_watermarker=False,
    )


PIPELINES = {
    "sd1": Tiny("sd1", one),
    "sd2": Tiny("sd2", partial(one, linear=True)),
    "sd2-v": Tiny("sd2", partial(one, linear=True, prediction="v_prediction")),
    "sdxl": Tiny("sdxl", xl),
}
