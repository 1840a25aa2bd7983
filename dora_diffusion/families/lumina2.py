"""Lumina-Image 2.0: Lumina2Transformer2DModel, Gemma 2, AutoencoderKL."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dora_diffusion.families.codecs import SCALED
from dora_diffusion.families.gemma import encode_captions, gemma, gemma_signature
from dora_diffusion.families.record import Component, Family, ToolNames
from dora_diffusion.families.signature import (
    ADAPTIVE_NAMES,
    ATTENTION_NAMES,
    EMBEDDER_NAMES,
    PartSignature,
    Signature,
    transformer_size,
)

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LINEAR = (*ATTENTION, "feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")

TRANSFORMER = Component(
    name="transformer",
    model_classes=("Lumina2Transformer2DModel",),
    presets={
        "attention": ATTENTION,
        "all-linear": LINEAR,
        "all": (*LINEAR, "norm1.linear", "caption_embedder.1", "norm_out.linear_1", "norm_out.linear_2"),
    },
    outside=("x_embedder", "timestep_embedder.linear_1", "timestep_embedder.linear_2"),
)


def encode(pipe: Any, captions: list[str]) -> Mapping[str, Tensor]:
    """Captions under the pipeline's system prompt; 256 tokens of each and their mask."""

    def encode_prompt(caption: str, guided: bool) -> Any:
        return pipe.encode_prompt(caption, guided, negative_prompt="", device=pipe.text_encoder.device)

    return encode_captions(captions, encode_prompt)


class WholeMask:
    """A mask that keeps every token, as far as the transformer asks a mask.

    It lays out its sequence by a mask's sums, which on the meta device no tensor has.
    """

    def __init__(self, count: int, tokens: int) -> None:
        """Of `count` captions."""
        self.shape = (count, tokens)

    def sum(self, dim: int) -> Tensor:
        """How many tokens are kept, (count,)."""
        count, tokens = self.shape
        return torch.full((count,), tokens)

    def bool(self) -> "WholeMask":
        """Itself."""
        return self

    def view(self, *shape: int) -> None:
        """What attention takes for "nothing is hidden"."""


def predict(
    denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], frames: Tensor
) -> Tensor:
    """The flow's velocity. The transformer counts time from 0, noise, to 1, and answers clean - noise."""
    hidden, mask = conditioning["encoder_hidden_states"], conditioning.get("encoder_attention_mask")
    prediction: Tensor = denoiser(
        hidden_states=latents,
        timestep=1 - timesteps / 1000,
        encoder_hidden_states=hidden,
        encoder_attention_mask=WholeMask(*hidden.shape[:2]) if mask is None else mask,
    ).sample
    return -prediction


def blank(config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """256 tokens of Gemma."""
    return {"encoder_hidden_states": torch.empty(1, 256, config["cap_feat_dim"], device="meta")}


def scheduler_time(timestep: Tensor) -> Tensor:
    """1..0 -> 0..1000."""
    return 1000 * (1 - timestep)


_BLOCK = "(layers|context_refiner|noise_refiner).#"

SIGNATURE = Signature(
    parts={
        "transformer": PartSignature(
            paths=(
                f"{_BLOCK}.attn.{ATTENTION_NAMES}",
                f"{_BLOCK}.feed_forward.(linear_#|silu)",
                f"{_BLOCK}.(norm1|norm2)(.{ADAPTIVE_NAMES}|)",
                f"{_BLOCK}.(ffn_norm1|ffn_norm2)",
                f"time_caption_embed.(time_proj|caption_embedder.#|timestep_embedder.{EMBEDDER_NAMES})",
                "norm_out.(linear_#|norm|silu)",
                "(x_embedder|rope_embedder)",
            ),
            sizes=(
                transformer_size(
                    2304, {"layers": 26, "context_refiner": 2, "noise_refiner": 2}, {"*.norm1.linear": 1024}
                ),
            ),
        ),
        "text_encoder": gemma_signature(),
    },
    called="lumina(-image)?-?2",
)

LUMINA_2 = Family(
    name="lumina2",
    names=ToolNames("lumina-2", "lumina2"),
    pipeline_classes=("Lumina2Pipeline",),
    denoiser=TRANSFORMER,
    text_encoders=(gemma("text_encoder"),),
    encode=encode,
    predict=predict,
    codec=SCALED,
    blank=blank,
    signature=SIGNATURE,
    patch=2,
    scheduler_time=scheduler_time,
)
