"""Options of models, folders, pictures and captions."""

from typing import Any

from dora_diffusion.training.import_config.kohya.steps import halves, network
from dora_diffusion.training.import_config.records import (
    CONCEPT,
    Answer,
    Row,
    Source,
    copied,
    is_off,
    lost,
    needless,
    several,
    to,
    unneeded,
    without,
)
from dora_diffusion.training.import_config.values import crop, flag, model_name, number, one_size, real, text, whole


def batch_size(value: Any, source: Source) -> Answer:
    """A row's conversion of the batch size."""
    batch = whole(value)
    if halves(source)[0]:
        return to("optim.batch_size", batch // 2, "half: class pictures stand beside a batch here, and in it there")
    return to("optim.batch_size", batch)


def _model(value: Any, source: Source) -> Answer:
    name = text(value)
    if network(source) == "flux" and not _is_folder_or_hub_id(name):
        base = "black-forest-labs/FLUX.1-schnell" if "schnell" in name.lower() else "black-forest-labs/FLUX.1-dev"
        says = "that file is the transformer alone; the rest comes from the base"
        return several({"model": base, "base.transformer": name}, says)
    return model_name(value, source)


def _is_folder_or_hub_id(name: str) -> bool:
    return not name.lower().endswith((".safetensors", ".sft", ".gguf", ".ckpt", ".pt"))


def _output_name(value: Any, source: Source) -> Answer:
    return to("output_dir", f"{source.get('output_dir', 'runs')}/{text(value)}", "a folder for each run")


def _output_dir(value: Any, source: Source) -> Answer:
    return needless("with output_name") if source.has("output_name") else to("output_dir", text(value))


def _train_data_dir(value: Any, source: Source) -> Answer:
    return to("data.instance_dir", text(value), "its `10_name` folders are read as there")


def _reg_data_dir(value: Any, source: Source) -> Answer:
    says = "its pictures themselves: make one concept of each of its `1_name` folders"
    return several({f"{CONCEPT}.dir": text(value), f"{CONCEPT}.role": "class"}, says)


def _is_reg(value: Any, source: Source) -> Answer:
    return to(f"{CONCEPT}.role", "class") if flag(value) else needless("learnt, as here")


def _caption_extension(value: Any, source: Source) -> Answer:
    if text(value).lstrip(".").lower() in {"txt", "caption"}:
        return needless(".txt and .caption are both read")
    return lost("captions are read from .txt and .caption; rename them")


def _no_upscale(value: Any, source: Source) -> Answer:
    return to("data.upscale", not flag(value))


def _resolution(value: Any, source: Source) -> Answer:
    sizes = set(map(str, source.values("resolution")))
    return one_size("data.resolution" if len(sizes) == 1 else f"{CONCEPT}.resolution", value)


def _cache(value: Any, source: Source) -> Answer:
    if not flag(value):
        return needless("off there too")
    return to("data.cache_dir", "cache", "a folder beside this file")


def _masks(says: str) -> Any:
    def convert(value: Any, source: Source) -> Answer:
        return needless("off there too") if is_off(value) else to("data.mask_outside", 0.0, says)

    return convert


def _adapter_files(value: Any, source: Source) -> Answer:
    files = value if isinstance(value, list) else [value]
    strengths = source.get("base_weights_multiplier", [])
    strengths = strengths if isinstance(strengths, list) else [strengths]
    pairs = {text(file): 1.0 for file in files}
    pairs |= {text(file): real(strength) for file, strength in zip(files, strengths, strict=False)}
    return to("base.adapters", pairs)


def _dropout(value: Any, source: Source) -> Answer:
    rate = real(value)
    return to(f"{CONCEPT}.caption_dropout", rate) if rate else needless("off there too")


def _validation_split(value: Any, source: Source) -> Answer:
    return to("data.validation_share", real(value)) if number(value) else needless("off there too")


PATHS: list[Row] = [
    Row(
        "pretrained_model_name_or_path",
        ("model",),
        "for FLUX.1 the file is `base.transformer`",
        _model,
        "models/sd.safetensors",
    ),
    copied("vae", "base.vae", "vae.safetensors", read=text),
    copied("ae", "base.vae", "ae.safetensors", read=text, says="FLUX.1, Lumina 2"),
    Row("output_dir", ("output_dir",), "with `output_name` in it, a folder for each run", _output_dir, "out"),
    Row("output_name", ("output_dir",), "", _output_name, "robot"),
    Row("train_data_dir", ("data.instance_dir",), "its `10_name` folders are read as there", _train_data_dir, "img"),
    Row(
        "reg_data_dir",
        (f"{CONCEPT}.dir", f"{CONCEPT}.role"),
        "one concept of role `class` for each of its folders",
        _reg_data_dir,
        "reg",
    ),
    *unneeded("read too, when it is there", "dataset_config", example="data.toml"),
    copied("network_weights", "adapter.start", "old.safetensors", read=text),
    Row(
        "base_weights",
        ("base.adapters",),
        "with `base_weights_multiplier` as strengths",
        _adapter_files,
        ["a.safetensors"],
    ),
    *unneeded("with base_weights", "base_weights_multiplier", example=[0.5]),
    *without("the base's own are taken", "clip_l clip_g t5xxl gemma2", example="clip_l.safetensors"),
]


DATASETS: list[Row] = [
    copied("image_dir", f"{CONCEPT}.dir", "img", read=text, says="each subset is a concept"),
    copied("num_repeats", f"{CONCEPT}.repeats", 3, read=whole),
    copied("class_tokens", f"{CONCEPT}.prompt", "zqx robot", read=text, says="caption of pictures without one"),
    Row("is_reg", (f"{CONCEPT}.role",), "`class`", _is_reg, True),
    Row(
        "resolution",
        ("data.resolution", f"{CONCEPT}.resolution"),
        "one side; `1024,768` is a square of its area",
        _resolution,
        "768,768",
    ),
    Row(
        "batch_size",
        ("optim.batch_size",),
        "half with `is_reg`: class pictures stand beside a batch here",
        batch_size,
        4,
    ),
    copied("enable_bucket", "data.buckets", True, read=flag, unset=False),
    Row("bucket_no_upscale", ("data.upscale",), "the other way round", _no_upscale, True, unset=False),
    *without(
        "buckets are made of the resolution here, in steps of the base's",
        "min_bucket_reso max_bucket_reso bucket_reso_steps",
        off=(256, 1024, 64),
        example=2048,
    ),
    copied("flip_aug", "data.flip", True, read=flag),
    Row("random_crop", ("data.crop",), "`random`", crop, True),
    *without(
        "only mirroring and cropping are done here; change the pictures themselves",
        "color_aug face_crop_aug_range",
        example=True,
    ),
    Row("caption_extension", (), ".txt and .caption are both read; rename others", _caption_extension, ".tags"),
    copied("shuffle_caption", "data.captions.shuffle", True, read=flag),
    copied("keep_tokens", "data.captions.keep_tokens", 1, read=whole),
    copied("caption_separator", "data.captions.separator", ";", read=text),
    Row(
        "caption_dropout_rate", (f"{CONCEPT}.caption_dropout",), "`data.captions.dropout` for one folder", _dropout, 0.1
    ),
    copied("caption_tag_dropout_rate", "data.captions.tag_dropout", 0.1, read=real),
    copied(
        "enable_wildcard",
        "data.captions.wildcards",
        True,
        read=flag,
        says="several lines are several captions here, with or without",
    ),
    *without(
        "set `data.captions.keep_tokens`, a number, and take the mark out of the captions",
        "keep_tokens_separator",
        example="|||",
    ),
    *without("write it into the captions", "caption_prefix caption_suffix secondary_separator", example="photo"),
    *without("set a share with `data.captions.dropout`", "caption_dropout_every_n_epochs"),
    *without("all tags are there from the start", "token_warmup_step token_warmup_min", off=(1,), example=100),
    *without(
        "pictures and captions are read from folders: make a metadata.jsonl of it",
        "metadata_file in_json",
        example="meta.json",
    ),
    Row(
        "conditioning_data_dir",
        ("data.mask_outside",),
        "put masks as `masks/NAME.png` into the folder of pictures",
        _masks("its masks go to masks/NAME.png in the folder of pictures"),
        "masks",
    ),
    Row(
        "masked_loss",
        ("data.mask_outside",),
        "0",
        _masks("masks are masks/NAME.png, NAME_mask.png or the alpha channel"),
        True,
    ),
    Row("alpha_mask", ("data.mask_outside",), "0: the alpha channel is a mask", _masks("by the alpha channel"), True),
    Row(
        "cache_latents",
        (),
        "in memory, always when nothing is random",
        lambda value, source: needless("latents are kept in memory here when they can be"),
        True,
    ),
    Row("cache_latents_to_disk", ("data.cache_dir",), "a folder", _cache, True),
    Row("validation_split", ("data.validation_share",), "", _validation_split, 0.1),
    *unneeded(
        "the machine's, or how it is read",
        (
            "cache_info vae_batch_size skip_cache_check debug_dataset dataset_class custom_attributes "
            "validation_seed resize_interpolation"
        ),
        example="x",
    ),
    *without(
        "strengths of folders are weights of their loss here, `weight` of a concept",
        "network_multiplier",
        off=(1, 1.0),
        example=0.5,
    ),
]
