"""Parts that several families share, with random weights."""

from diffusers import AutoencoderKL
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen3Config,
    T5Config,
    T5EncoderModel,
)

from tests.families.pipelines.tokenizers import letters


def autoencoder(channels: int = 4, *, shift: float | None = None, levels: int = 2) -> AutoencoderKL:
    """AutoencoderKL of factor 2, so that 32 pixels are 16 latents; 4 levels are a factor of 8."""
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.7,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    )


def _clip_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def clip(tokenizer: CLIPTokenizer, width: int = 16) -> CLIPTextModel:
    """A CLIP text encoder."""
    return CLIPTextModel(_clip_config(tokenizer, width))


def clip_with_projection(tokenizer: CLIPTokenizer, width: int = 16) -> CLIPTextModelWithProjection:
    """A CLIP text encoder with a projection of its own width."""
    return CLIPTextModelWithProjection(_clip_config(tokenizer, width))


def t5(width: int = 16) -> T5EncoderModel:
    """A gated T5 encoder for `t5_tokenizer`."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(letters()) + 3,
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def qwen3_config(layers: int, width: int) -> Qwen3Config:
    """A Qwen 3 for `qwen_tokenizer`."""
    return Qwen3Config(
        vocab_size=300,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=1024,
    )
