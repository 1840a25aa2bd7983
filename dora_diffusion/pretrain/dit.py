"""The pocket DiT: a small Stable Diffusion 3 on the pocket base's latents, trained by flow matching.

Its first text encoder learns to paint captions as the pocket's does (`text`), read where Stable Diffusion 3 reads:
one layer before the last, and in the projected pooled output. The second, a tiny one, learns together with the
transformer. There is no T5: the pipeline then adds 256 zero tokens to the context. They are equal and stay equal
through every block, so training carries one of them and counts it 256 times in the softmax (`CountedZeroTokens`).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from dora_diffusion.pretrain.captions import tokenize
from dora_diffusion.pretrain.text import PATCH_VALUES, PATCHES, painting_loss

WIDTH, WIDTH_2 = 192, 32
DENOISER_WIDTH = 192
ZERO_TOKENS = 256  # StableDiffusion3Pipeline's max_sequence_length, the T5 tokens of a pipeline without T5
SHIFT = 2.0  # of the flow's timesteps towards noise, in training and drawing; 3 suits a megapixel


def build_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModelWithProjection:
    """A CLIP text encoder with its projection, random weights."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_transformer() -> SD3Transformer2DModel:
    """Six joint blocks of width 192 over 8 x 8 patches; random weights."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=DENOISER_WIDTH // 32,
        caption_projection_dim=DENOISER_WIDTH,
        joint_attention_dim=WIDTH + WIDTH_2,
        pooled_projection_dim=WIDTH + WIDTH_2,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow, its timesteps shifted towards noise."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)


class PooledPainter(nn.Module):
    """The first text encoder on its way: paints patches from its last layer but one, a coarse picture when pooled."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text = build_text_encoder(tokenizer, WIDTH, layers=4)
        self.paint = nn.Linear(WIDTH, PATCH_VALUES)
        self.paint_pooled = nn.Linear(WIDTH, PATCH_VALUES)

    def loss(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """Token ids (N, 32), latents (N, 8, 16, 16) -> the paintings' loss, ()."""
        with torch.autocast("cpu", torch.bfloat16):
            out = self.text(tokens, output_hidden_states=True)
            hidden = out.hidden_states[-2]
            painted, coarse = self.paint(hidden[:, -PATCHES:]), self.paint_pooled(out.text_embeds)
        pooled = F.mse_loss(coarse.float(), F.avg_pool2d(latents, 4).flatten(1))
        return painting_loss(painted, hidden, latents) + pooled


class CountedZeroTokens:
    """SD3's joint attention in which the last context token stands for `count` equal ones.

    softmax over n equal keys = softmax over one whose logit has log(n) added, and the n values are one value.
    """

    def __init__(self, count: int) -> None:
        self.bonus = math.log(count)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,  # diffusers asks for processors that could take it
    ) -> tuple[Tensor, Tensor]:
        """Tokens of the picture (N, P, width) and of the context (N, T, width) -> both, attended."""
        picture = (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        context = (
            attn.add_q_proj(encoder_hidden_states),
            attn.add_k_proj(encoder_hidden_states),
            attn.add_v_proj(encoder_hidden_states),
        )
        norms = ((attn.norm_q, attn.norm_k, nn.Identity()), (attn.norm_added_q, attn.norm_added_k, nn.Identity()))
        query, key, value = (
            torch.cat([norm_p(p.unflatten(2, (attn.heads, -1))), norm_c(c.unflatten(2, (attn.heads, -1)))], 1)
            for p, c, norm_p, norm_c in zip(picture, context, *norms, strict=True)
        )
        bias = query.new_zeros(key.shape[1])
        bias[-1] = self.bonus
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=bias.expand(query.shape[1], -1)
        )
        attended = attended.transpose(1, 2).flatten(2)
        pictures, texts = attended.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        return attn.to_out[0](pictures), texts if attn.context_pre_only else attn.to_add_out(texts)


class Learning(nn.Module):
    """What the last stage trains: the transformer and the second text encoder."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.transformer = build_transformer()
        self.text_encoder_2 = build_text_encoder(tokenizer, WIDTH_2, layers=2)


@dataclass(frozen=True)
class DiTText:
    """The painting text encoder, frozen here, and the tokenizer of both encoders."""

    tokenizer: CLIPTokenizer
    encoder: CLIPTextModelWithProjection


def context_of(text: DiTText, second: CLIPTextModelWithProjection, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Captions -> context (N, 33, 224), its last token the zero one, and pooled projections (N, 224)."""
    tokens = tokenize(text.tokenizer, captions)
    with torch.no_grad():
        painted = text.encoder(tokens, output_hidden_states=True)
    worded = second(tokens, output_hidden_states=True)
    context = torch.cat([painted.hidden_states[-2], worded.hidden_states[-2]], -1)
    return F.pad(context, (0, 0, 0, 1)), torch.cat([painted.text_embeds, worded.text_embeds], -1)


def flow_loss(
    text: DiTText, learning: Learning, latents: Tensor, captions: list[str], generator: torch.Generator
) -> Tensor:
    """Mean squared error on the flow's velocity noise - latents, at uniform timesteps shifted towards noise."""
    noise = torch.randn(latents.shape, generator=generator)
    u = torch.rand(len(latents), generator=generator)
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    noisy = torch.lerp(latents, noise, sigma[:, None, None, None])
    with torch.autocast("cpu", torch.bfloat16):
        context, pooled = context_of(text, learning.text_encoder_2, captions)
        predicted = learning.transformer(noisy, context, pooled, 1000 * sigma).sample
    return F.mse_loss(predicted.float(), noise - latents)
