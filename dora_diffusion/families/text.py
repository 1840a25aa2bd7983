"""The text encoders that families share: which of their layers are adapted, and how they are recognised in files."""

from dora_diffusion.families.record import Component
from dora_diffusion.families.signature import PartSignature, PublishedSize

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


_CLIP_PATHS = (
    "(text_model.|)encoder.layers.#.self_attn.(q_proj|k_proj|v_proj|out_proj)",
    "(text_model.|)encoder.layers.#.(mlp.fc1|mlp.fc2|mlp.activation_fn|layer_norm1|layer_norm2)",
    "(text_model.|)embeddings.(token_embedding|position_embedding)",
    "(text_model.|)final_layer_norm",
    "text_projection",
)
_T5_PATHS = (
    "encoder.block.#.layer.#.(SelfAttention.(q|k|v|o|relative_attention_bias)|layer_norm|dropout)",
    "encoder.block.#.layer.#.DenseReluDense.(wi|wi_#|wo|act|dropout)",
    "(shared|encoder.embed_tokens|encoder.final_layer_norm|encoder.dropout)",
)


def clip_signature(width: int, blocks: int, *, is_projected: bool = False) -> PartSignature:
    """A CLIP text encoder with this many blocks."""
    inputs = {"(*.self_attn.(q_proj|k_proj|v_proj|out_proj)|*.mlp.fc1|text_projection)": width}
    return PartSignature(_CLIP_PATHS, (PublishedSize({"encoder.layers.#": blocks}, inputs),), is_projected=is_projected)


def clip_l(*, is_projected: bool = False) -> PartSignature:
    """OpenAI's CLIP ViT-L."""
    return clip_signature(768, 12, is_projected=is_projected)


def clip_g() -> PartSignature:
    """OpenCLIP's bigG, which is always read with its projection."""
    return clip_signature(1280, 32, is_projected=True)


def t5_signature(width: int) -> PartSignature:
    """A T5 encoder of 24 blocks."""
    inputs = {"(*.SelfAttention.(q|k|v)|*.DenseReluDense.(wi|wi_#))": width}
    return PartSignature(_T5_PATHS, (PublishedSize({"encoder.block.#": 24}, inputs),))


def decoder_paths(prefix: str) -> tuple[str, ...]:
    """A language model's, behind what stands before its layers: `model.`, or nothing."""
    return (
        f"{prefix}layers.#.self_attn.(q_proj|k_proj|v_proj|o_proj|q_norm|k_norm)",
        f"{prefix}layers.#.mlp.(gate_proj|up_proj|down_proj|act_fn)",
        f"{prefix}layers.#.(input_layernorm|post_attention_layernorm)",
        f"{prefix}layers.#.(pre|post)_feedforward_layernorm",
        f"{prefix}(embed_tokens|norm|rotary_emb)",
        "lm_head",
    )


def decoder_signature(blocks: int, *widths: int, prefix: str = "", sight: tuple[str, ...] = ()) -> PartSignature:
    """A language model that is read as a text encoder.

    Args:
        blocks: how many layers it has.
        widths: of its published sizes.
        prefix: what stands before its layers.
        sight: paths of the vision tower beside it.
    """
    layers = f"{prefix}layers.#"
    takes = f"{layers}.(self_attn.(q_proj|k_proj|v_proj)|mlp.(gate_proj|up_proj))"
    sizes = tuple(PublishedSize({layers: blocks}, {takes: width}) for width in widths)
    return PartSignature((*decoder_paths(prefix), *sight), sizes)
