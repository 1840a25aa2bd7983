"""The text encoders that families share: which of their layers are adapted."""

from dora_diffusion.families.record import Component

_CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_CLIP_LINEAR = (*_CLIP_ATTENTION, "fc1", "fc2")
_T5_ATTENTION = ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o")
_T5_LINEAR = (*_T5_ATTENTION, "DenseReluDense.wi", "DenseReluDense.wi_0", "DenseReluDense.wi_1", "DenseReluDense.wo")


def clip(name: str) -> Component:
    """A CLIP text encoder, with or without projection."""
    return Component(
        name=name,
        model_classes=("CLIPTextModel", "CLIPTextModelWithProjection"),
        presets={"attention": _CLIP_ATTENTION, "all-linear": _CLIP_LINEAR, "all": _CLIP_LINEAR},
        outside=("token_embedding", "position_embedding", "text_projection"),
    )


def t5(name: str) -> Component:
    """A T5 encoder (T5, mT5, UMT5)."""
    return Component(
        name=name,
        model_classes=("T5EncoderModel", "UMT5EncoderModel", "MT5EncoderModel"),
        presets={"attention": _T5_ATTENTION, "all-linear": _T5_LINEAR, "all": _T5_LINEAR},
        outside=("shared", "embed_tokens", "relative_attention_bias"),
    )


def decoder(name: str, model_classes: tuple[str, ...], *, layers: str = "", outside: tuple[str, ...] = ()) -> Component:
    """A language model that is read as a text encoder (Gemma, Qwen, Mistral): attention and gated MLP.

    Args:
        name: the pipeline's attribute.
        model_classes: class names of the model.
        layers: where its layers lie, when the model has a vision tower beside them: `language_model.layers.*.`.
        outside: what is left alone beside the token embedding: the vision tower, the head.
    """
    attention = tuple(f"{layers}self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    linear = (*attention, *(f"{layers}mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")))
    return Component(
        name=name,
        model_classes=model_classes,
        presets={"attention": attention, "all-linear": linear, "all": linear},
        outside=("embed_tokens", *outside),
    )
