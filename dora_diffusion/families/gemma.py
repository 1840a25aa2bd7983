"""Gemma 2 as a text encoder, as Sana and Lumina 2 ask it: an instruction stands before every caption."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dora_diffusion.families.record import Component
from dora_diffusion.families.signature import PartSignature
from dora_diffusion.families.text import decoder, decoder_signature

# (caption, with guidance) -> hidden states and mask of the caption, and with guidance those of what guides away
EncodePrompt = Callable[[str, bool], tuple[Tensor, Tensor, Tensor | None, Tensor | None]]


def gemma(name: str) -> Component:
    """A Gemma 2."""
    return decoder(name, ("Gemma2Model",))


def gemma_signature() -> PartSignature:
    """Gemma 2 2B."""
    return decoder_signature(26, 2304)


def encode_captions(captions: list[str], encode_prompt: EncodePrompt) -> Mapping[str, Tensor]:
    """Captions -> {"encoder_hidden_states": (N, tokens, width), "encoder_attention_mask": (N, tokens)}.

    An empty caption is encoded as the pipeline encodes an empty negative prompt, without the instruction: captions that
    are dropped in training train what guidance guides away from.
    """
    answers = [encode_prompt(caption, not caption) for caption in captions]
    pairs = [answer[:2] if caption else answer[2:] for caption, answer in zip(captions, answers, strict=True)]
    hidden, masks = (torch.cat(part) for part in zip(*pairs, strict=True))
    return {"encoder_hidden_states": hidden, "encoder_attention_mask": masks}
