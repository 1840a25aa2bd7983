"""Tiny Hunyuan-DiT 1.1, which is told where pictures come from, and 1.2, which is not."""

from functools import partial

from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline
from transformers import BertConfig, BertModel, BertTokenizer

from tests.families.pipelines import parts
from tests.families.pipelines.record import Tiny
from tests.families.pipelines.tokenizers import letters, t5_tokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def bert_tokenizer() -> BertTokenizer:
    """One token a character, 77 at most."""
    pieces = (*SPECIAL, *letters(), *(f"##{letter}" for letter in letters()))
    return BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, model_max_length=77)


def bert(tokenizer: BertTokenizer, width: int) -> BertModel:
    return BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def hunyuan_dit(*, told_frames: bool) -> HunyuanDiTPipeline:
    tokenizer = bert_tokenizer()
    return HunyuanDiTPipeline(
        vae=parts.autoencoder(levels=4),  # the pipeline computes positions with a factor of 8, whatever the VAE's is
        text_encoder=bert(tokenizer, 16),
        tokenizer=tokenizer,
        text_encoder_2=parts.t5(24),
        tokenizer_2=t5_tokenizer(),
        transformer=HunyuanDiT2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=16,
            num_layers=4,
            cross_attention_dim=16,
            cross_attention_dim_t5=24,
            pooled_projection_dim=16,
            use_style_cond_and_image_meta_size=told_frames,
        ),
        scheduler=DDPMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.02,
            prediction_type="v_prediction",
            clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


NO_LOADER = "diffusers' Hunyuan-DiT pipeline loads no adapters"
PIPELINES = {
    "hunyuan-dit-1.1": Tiny(
        "hunyuan-dit", partial(hunyuan_dit, told_frames=True), side=64, original=1024, plain_load=NO_LOADER
    ),
    "hunyuan-dit-1.2": Tiny("hunyuan-dit", partial(hunyuan_dit, told_frames=False), side=64, plain_load=NO_LOADER),
}
