"""Options of what is trained, and of the models that OneTrainer calls parts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dora_diffusion.training.import_config.records import (
    Answer,
    Row,
    Source,
    copied,
    lost,
    needless,
    to,
    unneeded,
    without,
)
from dora_diffusion.training.import_config.values import flag, model_name, real, text, whole

DENOISERS = ("unet", "transformer", "prior")
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_TEXTS_OF = {
    **dict.fromkeys(("STABLE_DIFFUSION_15", "STABLE_DIFFUSION_20", "STABLE_DIFFUSION_20_BASE"), 1),
    **dict.fromkeys(("STABLE_DIFFUSION_21", "STABLE_DIFFUSION_21_BASE", "PIXART_ALPHA", "PIXART_SIGMA", "SANA"), 1),
    **dict.fromkeys(("QWEN", "Z_IMAGE", "FLUX_2"), 1),
    **dict.fromkeys(("STABLE_DIFFUSION_XL_10_BASE", "FLUX_DEV_1"), 2),
    **dict.fromkeys(("STABLE_DIFFUSION_3", "STABLE_DIFFUSION_35"), 3),
}
"""How many text encoders a model has."""


def has_unet(source: Source) -> bool:
    """Whether the base's denoiser is a UNet."""
    kind = str(source.get("model_type", "STABLE_DIFFUSION_15"))
    return kind.startswith("STABLE_DIFFUSION_") and not kind.startswith("STABLE_DIFFUSION_3")


def _text_encoders(source: Source) -> list[str]:
    count = _TEXTS_OF.get(str(source.get("model_type", "STABLE_DIFFUSION_15")), 1)
    return [name for name in _ENCODERS[:count] if flag(source.get(f"{name}.train", True))]


def _trains_text(value: Any, source: Source) -> Answer:
    """All switches together, at the first of them."""
    trained = _text_encoders(source)
    count = _TEXTS_OF.get(str(source.get("model_type", "STABLE_DIFFUSION_15")), 1)
    if not trained:
        return to("adapter.train_text_encoder", False)
    return to("adapter.train_text_encoder", True if len(trained) == count else trained)


def _text_rate(name: str) -> Any:
    def convert(value: Any, source: Source) -> Answer:
        if name not in _text_encoders(source):
            return needless("it is not trained")
        rates = {one: source.get(f"{one}.learning_rate") for one in _text_encoders(source)}
        said = {one: real(rate) for one, rate in rates.items() if rate is not None}
        return to("optim.text_encoder_learning_rate", said)

    return convert


def _trains_denoiser(name: str) -> Any:
    def convert(value: Any, source: Source) -> Answer:
        if (name == "unet") != has_unet(source):
            return needless("the base has another denoiser")
        return needless("trained, as here") if flag(value) else to("adapter.train_unet", False)

    return convert


def _layers(value: Any, source: Source) -> Answer:
    preset = text(value).lower()
    known = {"attn-mlp": "all-linear", "attn-only": "attention", "blocks": "all-linear", "full": "all"}
    if preset not in known:
        raise ValueError(f"the preset {preset} is not known here; name the layers in adapter.target_modules")
    says = "embeddings of time and text are left alone" if preset == "full" else ""
    return to("adapter.target_modules", known[preset], says)


def _layer_filter(value: Any, source: Source) -> Answer:
    if str(source.get("layer_filter_preset", "full")).lower() != "custom":
        return needless("layer_filter_preset decides")
    if flag(source.get("layer_filter_regex", False)):
        return to("adapter.target_modules", text(value), "a regular expression of the whole path here")
    parts = [part.strip().replace(".", r"\.") for part in text(value).split(",") if part.strip()]
    return to("adapter.target_modules", rf".*(?:{'|'.join(parts)}).*", "as a regular expression of the whole path")


def _peft_type(value: Any, source: Source) -> Answer:
    if text(value).upper() == "LORA":
        return needless("as here")
    return lost("a DoRA or LoRA is trained here, other kinds are only read")


def _method(value: Any, source: Source) -> Answer:
    kind = text(value).upper()
    if kind == "LORA":
        return needless("an adapter, as here")
    if kind == "EMBEDDING":
        return to("adapter.train_unet", False, "set words.starts: new words alone are learnt")
    return lost("whole models are not trained here: an adapter with this base is")


def _decompose(value: Any, source: Source) -> Answer:
    on = flag(value)
    return to("adapter.use_dora", on, "" if on else "a plain LoRA, as there; true trains magnitudes too")


def _output_axis(value: Any, source: Source) -> Answer:
    if flag(value) or not flag(source.get("lora_decompose", False)):
        return needless("magnitudes per output, as here" if flag(value) else "lora_decompose is off")
    return lost("magnitudes are per output here; files that have them per input are drawn with all the same")


def _destination(value: Any, source: Source) -> Answer:
    return to("output_dir", f"runs/{Path(text(value).replace(chr(92), '/')).stem}", "a folder for each run")


def _dtype(value: Any, source: Source) -> Answer:
    kind = text(value).upper()
    if kind in {"FLOAT_32", "FLOAT_16", "BFLOAT_16", "NONE", "TFLOAT_32"}:
        return needless("train_dtype decides")
    return lost("other ways to quantise here: set base.quantise to nf4, int8 or fp8")


def _checkpointing_of(name: str) -> Any:
    def convert(value: Any, source: Source) -> Answer:
        if (name == "unet") == has_unet(source):
            return to("optim.gradient_checkpointing", flag(value))
        return needless("the base has another denoiser")

    return convert


def parts() -> Iterator[Row]:
    """Rows of the models that OneTrainer calls parts."""
    yield Row(
        "unet.train", ("adapter.train_unet",), "", _trains_denoiser("unet"), False, beside={"text_encoder.train": True}
    )
    yield Row(
        "transformer.train",
        ("adapter.train_unet",),
        "",
        _trains_denoiser("transformer"),
        False,
        beside={"text_encoder.train": True, "model_type": "FLUX_DEV_1"},
    )
    yield from unneeded(
        "no such part in our families",
        "prior.* unconditional_transformer.* effnet_encoder.* decoder.* decoder_text_encoder.* "
        "decoder_vqgan.* text_encoder_4.* text_encoder_4_layer_skip",
        example=True,
    )
    for name in ("unet", "transformer"):
        yield from unneeded("with learning_rate", f"{name}.learning_rate", example=1e-4)
        beside = {"model_type": "STABLE_DIFFUSION_15" if name == "unet" else "FLUX_DEV_1"}
        yield Row(
            f"{name}.gradient_checkpointing",
            ("optim.gradient_checkpointing",),
            "",
            _checkpointing_of(name),
            True,
            beside=beside,
        )
    for name in _ENCODERS:
        if name == "text_encoder":
            ours = ("adapter.train_text_encoder",)
            yield Row(f"{name}.train", ours, "those that are trained, together", _trains_text, True, unset=True)
        else:
            yield from unneeded("with text_encoder.train", f"{name}.train")
        yield Row(
            f"{name}.learning_rate",
            ("optim.text_encoder_learning_rate",),
            "",
            _text_rate(name),
            1e-5,
            beside=_with_encoder(name),
        )
        yield from unneeded("one switch for all here", f"{name}.gradient_checkpointing")
        yield from without(
            "captions of all encoders are dropped together: `data.captions.dropout`",
            f"{name}.dropout_probability",
            example=0.1,
        )
        yield from without(
            "the text encoder's last layers are those that the base's pipeline takes", f"{name}_layer_skip", example=1
        )
        yield from unneeded("the base's pipeline decides", f"{name}_sequence_length", example=512)
    for name in ("unet", "transformer", *_ENCODERS, "vae"):
        yield Row(f"{name}.weight_dtype", (), "other ways to quantise here: `base.quantise`", _dtype, "NFLOAT_4")
        yield from without(
            "no counterpart yet for blocks on the CPU",
            f"{name}.offload_fraction {name}.activation_offloading",
            example=0.5,
        )
        yield from without("trained to the end", f"{name}.stop_training_after", example=10)
        yield from unneeded(
            "with stop_training_after, or of the base",
            (
                f"{name}.stop_training_after_unit {name}.include {name}.attention_mask {name}.guidance_scale "
                f"{name}.train_embedding"
            ),
            example=True,
        )
    yield from unneeded(
        "not trained", "vae.train vae.learning_rate vae.gradient_checkpointing vae.dropout_probability", example=True
    )
    yield from unneeded(
        "an adapter's dropout is dropout_probability",
        "unet.dropout_probability transformer.dropout_probability",
        example=0.1,
    )
    yield copied("vae.model_name", "base.vae", "vae.safetensors", read=text)
    yield copied("unet.model_name", "base.unet", "unet.safetensors", read=text)
    yield copied("transformer.model_name", "base.transformer", "transformer.safetensors", read=text)
    yield from without("the base's own is taken", " ".join(f"{name}.model_name" for name in _ENCODERS), example="t5")


def _with_encoder(name: str) -> dict[str, Any]:
    return {f"{name}.train": True, "model_type": "STABLE_DIFFUSION_3"}


RUN: list[Row] = [
    Row(
        "training_method",
        ("adapter.train_unet",),
        "LORA; EMBEDDING learns new words alone: `words.starts`",
        _method,
        "EMBEDDING",
        beside={"text_encoder.train": True},
    ),
    *unneeded("the family is told by the base itself", "model_type", example="FLUX_DEV_1"),
    Row(
        "base_model_name",
        ("model",),
        "a hub id, a folder or a .safetensors file",
        model_name,
        "stabilityai/stable-diffusion-xl-base-1.0",
    ),
    Row("output_model_destination", ("output_dir",), "`runs/` and its name", _destination, "models/robot.safetensors"),
    *unneeded(
        "adapters are .safetensors in fp32; `export` and `dora-diffusion convert` write other formats",
        "output_dtype output_model_format save_filename_prefix include_train_config bundle_additional_embeddings",
        example="KOHYA_LORA",
    ),
    Row("peft_type", (), "LORA; other kinds are only read", _peft_type, "LOHA"),
    copied("lora_model_name", "adapter.start", "old.safetensors", read=text),
    copied("lora_rank", "adapter.rank", 8, read=whole, unset=16),
    copied("lora_alpha", "adapter.alpha", 8.0, read=real, unset=1.0),
    Row("lora_decompose", ("adapter.use_dora",), "", _decompose, True, unset=False),
    Row(
        "lora_decompose_output_axis",
        (),
        "magnitudes are per output here",
        _output_axis,
        False,
        beside={"lora_decompose": True},
    ),
    *unneeded("a row of zeros is safe here without it", "lora_decompose_norm_epsilon"),
    *unneeded("what is trained is fp32", "lora_weight_dtype embedding_weight_dtype", example="FLOAT_32"),
    *unneeded(
        "of kinds that are only read",
        (
            "oft_block_size oft_block_share oft_scaled lokr_dim lokr_decompose_both lokr_decompose_factor "
            "lokr_use_tucker lokr_weight_decompose lokr_dora_on_output lokr_full_matrix lokr_vec_trick"
        ),
        example=16,
    ),
    copied("dropout_probability", "adapter.dropout", 0.1, read=real),
    Row(
        "layer_filter_preset",
        ("adapter.target_modules",),
        "attn-mlp, blocks: `all-linear`; attn-only: `attention`; full: `all`",
        _layers,
        "attn-mlp",
        unset="full",
    ),
    Row(
        "layer_filter",
        ("adapter.target_modules",),
        "a regular expression",
        _layer_filter,
        "attentions",
        beside={"layer_filter_preset": "custom"},
    ),
    *unneeded("with layer_filter", "layer_filter_regex"),
]
