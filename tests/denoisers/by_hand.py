"""Tiny denoisers that diffusers' own tests have no config of."""

import torch
from diffusers import (
    AnimaTextConditioner,
    BriaFibo2Transformer2DModel,
    CosmosTransformer3DModel,
    Flux3Transformer2DModel,
    Kandinsky3UNet,
    Kandinsky5Transformer3DModel,
    PRXTransformer2DModel,
    QwenImage21Transformer2DModel,
    WanAnimate2Transformer3DModel,
)
from diffusers.models.transformers.transformer_rfd4_proteina import RFD4ProteinaTransformer
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

from tests.denoisers.record import TinyDenoiser, normal
from tests.families.pipelines.stable_diffusion import unet


def kandinsky_3() -> Kandinsky3UNet:
    return Kandinsky3UNet(
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(32, 64),
        cross_attention_dim=4,
        encoder_hid_dim=8,
    )


def kandinsky_5() -> Kandinsky5Transformer3DModel:
    return Kandinsky5Transformer3DModel(
        in_text_dim=8,
        in_text_dim2=8,
        time_dim=16,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(2, 2, 4),
    )


def qwen_image_21() -> QwenImage21Transformer2DModel:
    return QwenImage21Transformer2DModel(
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(4, 6, 6),
    )


def fibo_2() -> BriaFibo2Transformer2DModel:
    return BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=16,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        gist_min_text_len=4,
        gist_max_text_len=16,
        axes_dims=(4, 6, 6),
        axes_lens=(64, 32, 32),
    )


def cosmos() -> CosmosTransformer3DModel:
    """Without the padding mask, for which its forward asks torchvision."""
    return CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        concat_padding_mask=False,
    )


def connectors() -> LTX2TextConnectors:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    parts = {f"{part}_connector_{name}": size for part in ("video", "audio") for name, size in sizes.items()}
    return LTX2TextConnectors(caption_channels=16, text_proj_in_factor=2, **parts)


def flux_3() -> Flux3Transformer2DModel:
    return Flux3Transformer2DModel(
        in_channels=8,
        cond_in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )


def anima_conditioner() -> AnimaTextConditioner:
    sizes = {"source_dim": 16, "target_dim": 16, "model_dim": 16, "target_vocab_size": 32, "min_sequence_length": 8}
    return AnimaTextConditioner(**sizes, num_layers=1, num_attention_heads=2, mlp_ratio=2.0)


def prx() -> PRXTransformer2DModel:
    return PRXTransformer2DModel(
        in_channels=4, context_in_dim=16, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[8, 8]
    )


def wan_animate_2() -> WanAnimate2Transformer3DModel:
    return WanAnimate2Transformer3DModel(
        text_len=16,
        in_dim=36,
        dim=64,
        ffn_dim=64,
        freq_dim=16,
        text_dim=32,
        out_dim=16,
        num_heads=4,
        num_layers=2,
        cross_attn_norm=True,
        use_img_emb=True,
    )


def proteina() -> RFD4ProteinaTransformer:
    """Four of its thirty features of molecules."""
    return RFD4ProteinaTransformer(
        nlayers=2,
        token_dim=16,
        nheads=2,
        dim_cond=8,
        pair_repr_dim=8,
        latent_dim=4,
        token_type_emb_dim=4,
        t_emb_dim=8,
        xt_pair_dist_dim=6,
        feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"),
        feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
        feats_pair_repr=("xt_bb_ca_pair_dists",),
        tri_mult_c=8,
        num_sequence_classes=8,
    )


TIME, HALF = torch.tensor([500]), torch.tensor([0.5])
ALL = torch.ones(1, 4, dtype=torch.bool)

BY_HAND: dict[str, TinyDenoiser] = {
    "UNet2DConditionModel": TinyDenoiser(
        unet,
        lambda: {"sample": normal(1, 4, 16, 16), "timestep": TIME, "encoder_hidden_states": normal(1, 8, 16, seed=1)},
    ),
    "Kandinsky3UNet": TinyDenoiser(
        kandinsky_3,
        lambda: {
            "sample": normal(1, 4, 8, 8),
            "timestep": TIME,
            "encoder_hidden_states": normal(1, 6, 8, seed=1),
            "encoder_attention_mask": torch.ones(1, 6),
        },
    ),
    "Kandinsky5Transformer3DModel": TinyDenoiser(
        kandinsky_5,
        lambda: {
            "hidden_states": normal(1, 1, 8, 8, 4),
            "encoder_hidden_states": normal(1, 6, 8, seed=1),
            "timestep": TIME,
            "pooled_projections": normal(1, 8, seed=2),
            "visual_rope_pos": [torch.arange(1), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(6),
        },
    ),
    "QwenImage21Transformer2DModel": TinyDenoiser(
        qwen_image_21,
        lambda: {
            "hidden_states": normal(1, 16, 8),
            "encoder_hidden_states": normal(1, 6, 16, seed=1),
            "timestep": HALF,
            "img_shapes": [[(1, 4, 4)]],
            "img_mask": torch.arange(10)[None] >= 6,  # a slot for four tokens of the picture, behind the text
        },
    ),
    "BriaFibo2Transformer2DModel": TinyDenoiser(
        fibo_2,
        lambda: {
            "hidden_states": normal(1, 4, 8, 8),
            "timestep": HALF,
            "encoder_hidden_states": normal(1, 2, 8, 16, seed=1),
        },
    ),
    "CosmosTransformer3DModel": TinyDenoiser(
        cosmos,
        lambda: {
            "hidden_states": normal(1, 4, 1, 8, 8),
            "timestep": TIME,
            "encoder_hidden_states": normal(1, 6, 32, seed=1),
        },
    ),
    "LTX2TextConnectors": TinyDenoiser(
        connectors,
        lambda: {
            "text_encoder_hidden_states": normal(1, 8, 16, 2),
            "attention_mask": torch.ones(1, 8, dtype=torch.long),
        },
    ),
    "Flux3Transformer2DModel": TinyDenoiser(
        flux_3,
        lambda: {
            "hidden_states": normal(1, 16, 8),
            "encoder_hidden_states": normal(1, 6, 16, seed=1),
            "timestep": HALF,
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), torch.zeros(1)),
            "txt_ids": torch.cartesian_prod(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.arange(6.0)),
            "image_cond_hidden_states": normal(1, 16, 8, seed=2),
            "image_cond_ids": torch.cartesian_prod(torch.ones(1), torch.arange(4.0), torch.arange(4.0), torch.zeros(1)),
        },
    ),
    "AnimaTextConditioner": TinyDenoiser(
        anima_conditioner,
        lambda: {"source_hidden_states": normal(1, 6, 16), "target_input_ids": torch.arange(5)[None]},
    ),
    "PRXTransformer2DModel": TinyDenoiser(
        prx,
        lambda: {
            "hidden_states": normal(1, 4, 8, 8),
            "encoder_hidden_states": normal(1, 6, 16, seed=1),
            "timestep": HALF,
        },
    ),
    "WanAnimate2Transformer3DModel": TinyDenoiser(
        wan_animate_2,
        lambda: {
            "hidden_states": [normal(16, 2, 4, 4)],
            "timestep": torch.ones(1),
            "encoder_hidden_states": [normal(8, 32, seed=1)],
            "condition_latents": [normal(20, 2, 4, 4, seed=2)],
            "encoder_hidden_states_image": normal(1, 4, 1280, seed=3),
            "kv_cache": WanAnimate2KVCache(2),
            "kv_cache_mode": "extract",
            "seq_len": 8,
            "offset_grid_sizes": torch.tensor([[2, 2, 2]]),
        },
    ),
    "WuerstchenPrior": TinyDenoiser(
        lambda: WuerstchenPrior(c_in=4, c=16, c_cond=8, c_r=8, depth=1, nhead=2),
        lambda: {"x": normal(1, 4, 8, 8), "r": HALF, "c": normal(1, 6, 8, seed=1)},
    ),
    "RFD4ProteinaTransformer": TinyDenoiser(
        proteina,
        lambda: {
            "bb_ca": normal(1, 4, 3),
            "local_latents": normal(1, 4, 4, seed=1),
            "bb_ca_time": HALF,
            "local_latents_time": HALF,
            "padding_mask": ALL,
            "token_type": torch.tensor([[0, 0, 3, 3]]),
            "conditioning": {"is_in_context_conditioning": ~ALL, "supports_local_latent": ALL},
            "recycle_depth": 2,
        },
    ),
}
