"""The published models at their real size, as plain configs: what is in the `config.json` of each part.

Sources: [D] the defaults of the class in diffusers 0.42 or transformers 5, which are the published values where it was
written for one model; [S] a conversion script in diffusers' `scripts/`, which writes the config out; [C] the
config.json of the model's own repository, as other public code repeats it. Numbers of parameters are what model cards
and papers say, rounded, in millions; `full_size` puts the counted ones beside.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """A component of a pipeline.

    Attributes:
        library: "diffusers" or "transformers".
        kind: the class.
        config: its configuration; the class's own defaults for the rest.
        millions: published number of parameters; None where none is known.
    """

    library: str
    kind: str
    config: Config
    millions: float | None = None


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        name: as people call it.
        family: the name of the family record that must take it.
        pipeline: class of its diffusers pipeline.
        denoiser: the component that predicts.
        parts: component -> what it is; whatever else the pipeline has is left out.
        side: native side of its pictures in pixels.
    """

    name: str
    family: str
    pipeline: str
    denoiser: str
    parts: Mapping[str, Part]
    side: int = 1024


def _clip(kind: str, hidden: int, layers: int, projection: int, millions: float, *, act: str = "gelu") -> Part:
    """A CLIP text encoder, heads of 64."""
    config = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "projection_dim": projection,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_act": act,
    }
    return Part("transformers", kind, config, millions)


def _t5(kind: str, hidden: int, intermediate: int, vocabulary: int, millions: float | None) -> Part:
    """A gated T5 encoder of 24 layers, heads of 64."""
    config = {
        "d_model": hidden,
        "d_ff": intermediate,
        "d_kv": 64,
        "num_heads": hidden // 64,
        "num_layers": 24,
        "vocab_size": vocabulary,
        "feed_forward_proj": "gated-gelu",
    }
    return Part("transformers", kind, config, millions)


# Text encoders by their repositories, all [C].
# openai/clip-vit-large-patch14:
CLIP_L = _clip("CLIPTextModel", 768, 12, 768, 123, act="quick_gelu")
CLIP_L_PROJECTED = _clip("CLIPTextModelWithProjection", 768, 12, 768, 124, act="quick_gelu")
# laion/CLIP-ViT-H-14 less its last layer, as Stable Diffusion 2 has it:
CLIP_H = _clip("CLIPTextModel", 1024, 23, 512, 340)
# laion/CLIP-ViT-bigG-14:
CLIP_G = _clip("CLIPTextModelWithProjection", 1280, 32, 1280, 695)
# google/t5-v1_1-xxl, google/mt5-xl and EleutherAI/pile-t5-xl:
T5_XXL = _t5("T5EncoderModel", 4096, 10240, 32128, 4760)
MT5_XL = _t5("T5EncoderModel", 2048, 5120, 250112, 1600)
PILE_T5_XL = _t5("UMT5EncoderModel", 2048, 5120, 32128, None)
# hfl/chinese-roberta-wwm-ext-large with Hunyuan-DiT's vocabulary:
BERT = Part(
    "transformers",
    "BertModel",
    {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "vocab_size": 47020,
    },
    350,
)
# google/gemma-2-2b:
GEMMA_2 = Part(
    "transformers",
    "Gemma2Model",
    {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256000,
    },
    2610,
)


def _qwen3(kind: str, hidden: int, intermediate: int, *, tied: bool, millions: float | None) -> Part:
    config = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": tied,
    }
    return Part("transformers", kind, config, millions)


# Qwen/Qwen3-4B and Qwen/Qwen3-8B:
QWEN3_4B = _qwen3("Qwen3Model", 2560, 9728, tied=True, millions=4000)
QWEN3_4B_LM = _qwen3("Qwen3ForCausalLM", 2560, 9728, tied=True, millions=4000)
QWEN3_8B_LM = _qwen3("Qwen3ForCausalLM", 4096, 12288, tied=False, millions=8200)
# Qwen/Qwen2.5-VL-7B-Instruct:
QWEN25_VL = Part(
    "transformers",
    "Qwen2_5_VLForConditionalGeneration",
    {
        "text_config": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
    8290,
)
# mistralai/Mistral-Small-3.2-24B-Instruct-2506:
MISTRAL_3 = Part(
    "transformers",
    "Mistral3ForConditionalGeneration",
    {
        "text_config": {
            "model_type": "mistral",
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 131072,
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "head_dim": 64,
            "image_size": 1540,
            "patch_size": 14,
        },
        "spatial_merge_size": 2,
        "tie_word_embeddings": False,
    },
    24000,
)


def _vae(channels: int, scale: float, *, shift: float | None = None, side: int = 1024) -> Part:
    """AutoencoderKL of four levels; Stable Diffusion's own [S], those of 16 channels without the outer convolutions."""
    has_outer = channels == 4
    config = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": channels,
        "scaling_factor": scale,
        "shift_factor": shift,
        "sample_size": side,
        "use_quant_conv": has_outer,
        "use_post_quant_conv": has_outer,
    }
    return Part("diffusers", "AutoencoderKL", config, 84)


VAE_SD = _vae(4, 0.18215, side=512)
VAE_SDXL = _vae(4, 0.13025)
VAE_SD3 = _vae(16, 1.5305, shift=0.0609)
VAE_FLUX = _vae(16, 0.3611, shift=0.1159)
VAE_FLUX2 = Part("diffusers", "AutoencoderKLFlux2", {})  # [D]
VAE_QWEN = Part("diffusers", "AutoencoderKLQwenImage", {}, 127)  # [D]
# [S] convert_dcae_to_diffusers
VAE_SANA = Part(
    "diffusers",
    "AutoencoderDC",
    {
        "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        "scaling_factor": 0.41407,
    },
)


# Stable Diffusion: [S] convert_original_stable_diffusion_to_diffusers, and [D]
_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_UNET_2 = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
_UNET_XL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def _sd(name: str, family: str, unet: Config, millions: float, *, text: Part, side: int) -> Published:
    parts = {"unet": Part("diffusers", "UNet2DConditionModel", unet, millions), "text_encoder": text, "vae": VAE_SD}
    return Published(name, family, "StableDiffusionPipeline", "unet", parts, side)


def _transformer(
    name: str, family: str, pipeline: str, transformer: Part, texts: Sequence[Part], vae: Part
) -> Published:
    """A model whose denoiser is a transformer, with its text encoders in order."""
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    parts = {"transformer": transformer, **dict(zip(names, texts, strict=False)), "vae": vae}
    return Published(name, family, pipeline, "transformer", parts)


def _sd3(name: str, blocks: int, positions: int, millions: float | None, **config: Any) -> Published:
    """[S] convert_sd3_to_diffusers: as many heads of 64 as blocks."""
    transformer = {
        "num_layers": blocks,
        "num_attention_heads": blocks,
        "caption_projection_dim": 64 * blocks,
        "pos_embed_max_size": positions,
        **config,
    }
    part = Part("diffusers", "SD3Transformer2DModel", transformer, millions)
    return _transformer(name, "sd3", "StableDiffusion3Pipeline", part, (CLIP_L_PROJECTED, CLIP_G, T5_XXL), VAE_SD3)


def _flux(name: str, guided: bool) -> Published:
    part = Part("diffusers", "FluxTransformer2DModel", {"guidance_embeds": guided}, 11900)  # [D]
    return _transformer(name, "flux", "FluxPipeline", part, (CLIP_L, T5_XXL), VAE_FLUX)


def _klein(name: str, config: Config, text: Part, millions: float) -> Published:
    """[S] convert_flux2_to_diffusers."""
    part = Part("diffusers", "Flux2Transformer2DModel", {"guidance_embeds": False, **config}, millions)
    return _transformer(name, "flux2-klein", "Flux2KleinPipeline", part, (text,), VAE_FLUX2)


def _pixart(name: str, letter: str, config: Config, vae: Part, millions: float) -> Published:
    """[S] convert_pixart_alpha_to_diffusers, convert_pixart_sigma_to_diffusers."""
    whole = {"caption_channels": 4096, "interpolation_scale": 2, **config}
    part = Part("diffusers", "PixArtTransformer2DModel", whole, millions)
    return _transformer(name, f"pixart-{letter.lower()}", f"PixArt{letter}Pipeline", part, (T5_XXL,), vae)


def _hunyuan(name: str, has_style: bool) -> Published:
    """[C] Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers; "DiT-g/2" of the paper."""
    config = {
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 128,
        "hidden_size": 1408,
        "num_layers": 40,
        "mlp_ratio": 4.3637,
        "use_style_cond_and_image_meta_size": has_style,
    }
    part = Part("diffusers", "HunyuanDiT2DModel", config, 1500)
    return _transformer(name, "hunyuan-dit", "HunyuanDiTPipeline", part, (BERT, MT5_XL), VAE_SDXL)


def _sana(name: str, config: Config, millions: float) -> Published:
    """[S] convert_sana_to_diffusers."""
    part = Part("diffusers", "SanaTransformer2DModel", {"sample_size": 32, **config}, millions)
    return _transformer(name, "sana", "SanaPipeline", part, (GEMMA_2,), VAE_SANA)


_DUAL = {"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}
_KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
_KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}
_SANA_600M = {
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "num_layers": 28,
}
_FLUX_2 = Part("diffusers", "Flux2Transformer2DModel", {}, 32000)  # [D] [S] convert_flux2_to_diffusers
_AURA = Part("diffusers", "AuraFlowTransformer2DModel", {"pos_embed_max_size": 9216}, 6800)  # [D] [S] and [C], v0.3
_LUMINA = Part("diffusers", "Lumina2Transformer2DModel", {"cap_feat_dim": 2304}, 2600)  # [D]; as wide as Gemma
_Z_IMAGE = Part("diffusers", "ZImageTransformer2DModel", {}, 6000)  # [D]
_QWEN = Part("diffusers", "QwenImageTransformer2DModel", {}, 20000)  # [D]

PUBLISHED: tuple[Published, ...] = (
    _sd("SD 1.5", "sd1", _UNET, 860, text=CLIP_L, side=512),
    _sd("SD 2.1", "sd2", _UNET_2, 866, text=CLIP_H, side=768),
    Published(
        "SDXL base",
        "sdxl",
        "StableDiffusionXLPipeline",
        "unet",
        {
            "unet": Part("diffusers", "UNet2DConditionModel", _UNET_XL, 2567),
            "text_encoder": CLIP_L,
            "text_encoder_2": CLIP_G,
            "vae": VAE_SDXL,
        },
    ),
    _sd3("SD 3 medium", 24, 192, 2000),
    _sd3("SD 3.5 medium", 24, 384, None, **_DUAL),  # 2.5 B with a table of positions that is no parameter here
    _sd3("SD 3.5 large", 38, 192, 8100, qk_norm="rms_norm"),
    _flux("FLUX.1 dev", True),
    _flux("FLUX.1 schnell", False),
    _transformer("FLUX.2 dev", "flux2", "Flux2Pipeline", _FLUX_2, (MISTRAL_3,), VAE_FLUX2),
    _klein("FLUX.2 Klein 4B", _KLEIN_4B, QWEN3_4B_LM, 4000),
    _klein("FLUX.2 Klein 9B", _KLEIN_9B, QWEN3_8B_LM, 9000),
    _pixart("PixArt-alpha 1024", "Alpha", {"use_additional_conditions": True}, VAE_SD, 610),
    _pixart("PixArt-Sigma 1024", "Sigma", {"use_additional_conditions": False}, VAE_SDXL, 610),
    _hunyuan("Hunyuan-DiT 1.1", True),
    _hunyuan("Hunyuan-DiT 1.2", False),
    _sana("Sana 0.6B", _SANA_600M, 590),
    _sana("Sana 1.6B", {}, 1600),
    _transformer("AuraFlow 0.3", "auraflow", "AuraFlowPipeline", _AURA, (PILE_T5_XL,), VAE_SDXL),
    _transformer("Lumina-Image 2.0", "lumina2", "Lumina2Pipeline", _LUMINA, (GEMMA_2,), VAE_FLUX),
    _transformer("Z-Image", "z-image", "ZImagePipeline", _Z_IMAGE, (QWEN3_4B,), VAE_FLUX),
    _transformer("Qwen-Image", "qwen-image", "QwenImagePipeline", _QWEN, (QWEN25_VL,), VAE_QWEN),
)
