"""Options of the job, its model and its datasets."""

import re
from typing import Any

from dora_diffusion.training.import_config.records import (
    CONCEPT,
    Answer,
    Row,
    Source,
    copied,
    is_off,
    lost,
    needless,
    to,
    unneeded,
    without,
)
from dora_diffusion.training.import_config.values import (
    crop,
    device,
    flag,
    model_name,
    number,
    real,
    several_sizes,
    text,
    texts,
    whole,
)

TRIGGERS = ("[trigger]", "[name]")


def only(value: Any, source: Source) -> Answer:
    """A row's conversion of what the names of layers must hold."""
    names = [part.strip(".") for part in texts(value)]
    pattern = "|".join(re.escape(name) for name in names)
    return to("adapter.target_modules", rf".*(?:{pattern})(?:\..*)?", "as a regular expression: look at the names")


def _trigger(value: Any, source: Source) -> Answer:
    says = "write {} where captions have [trigger]; it is not put before those that have neither"
    return to("data.trigger", text(value), says)


def _caption(value: Any, source: Source) -> Answer:
    found = text(value)
    for mark in TRIGGERS:
        found = found.replace(mark, "{}")
    return to(f"{CONCEPT}.prompt", found)


def _caption_ext(value: Any, source: Source) -> Answer:
    if text(value).lstrip(".").lower() in {"txt", "caption"}:
        return needless(".txt and .caption are both read")
    return lost("captions are read from .txt and .caption; rename or rewrite them")


def _resolution(value: Any, source: Source) -> Answer:
    sizes = set(map(str, source.values("datasets[].resolution")))
    return several_sizes("data.resolution" if len(sizes) <= 1 else f"{CONCEPT}.resolution", value)


def _cache(value: Any, source: Source) -> Answer:
    return to("data.cache_dir", "cache", "a folder beside this file") if flag(value) else needless("off there too")


def _mask(says: str) -> Any:
    def convert(value: Any, source: Source) -> Answer:
        if is_off(value):
            return needless("off there too")
        return to("data.mask_outside", real(source.get("datasets[].mask_min_value", 0.0)), says)

    return convert


def _is_reg(value: Any, source: Source) -> Answer:
    return to(f"{CONCEPT}.role", "class") if flag(value) else needless("learnt, as here")


def _training_folder(value: Any, source: Source) -> Answer:
    return to("output_dir", f"{text(value)}/{source.get('config.name', source.path.stem)}", "a folder for each run")


def _wandb(value: Any, source: Source) -> Answer:
    return to("logging.trackers", ["tensorboard", "wandb"]) if flag(value) else needless("off there too")


JOB: list[Row] = [
    *unneeded(
        "how it is run there",
        (
            "job config.name type performance_log_every log_dir config.device config.log_dir "
            "config.performance_log_every sqlite_db_path"
        ),
        example="extension",
    ),
    copied("device", "device", "cuda:0", read=device),
    *unneeded("said of the file, not of the run", "meta.* config.meta.*", example="1.0"),
    Row(
        "training_folder",
        ("output_dir",),
        "with `config.name` in it, a folder for each run",
        _training_folder,
        "output",
    ),
    Row("config.training_folder", ("output_dir",), "likewise", _training_folder, "output"),
    Row("trigger_word", ("data.trigger",), "`[trigger]` in captions is `{}` here", _trigger, "zqx"),
    *without("one run at a time: a YAML file of each", "config.process[]", example="..."),
    *without(
        "no counterpart: adapters of attention and words are trained here, not these",
        "adapter.* slider.* embedding.* decorator.* guidance.* first_sample.* do_lorm",
        example="ip",
    ),
    Row("logging.use_wandb", ("logging.trackers",), "beside TensorBoard", _wandb, True),
    copied("logging.project_name", "logging.project", "robots", read=text),
    *unneeded("every step is logged, and a run is called as its folder", "logging.*", example=100),
]


DATASETS: list[Row] = [
    copied("datasets[].folder_path", f"{CONCEPT}.dir", "img", read=text),
    copied(
        "datasets[].dataset_path", f"{CONCEPT}.dir", "img", read=text, says="a folder; of a JSON make a metadata.jsonl"
    ),
    Row("datasets[].caption_ext", (), ".txt and .caption are both read; rename others", _caption_ext, "json"),
    Row("datasets[].caption_type", (), "likewise", _caption_ext, "json"),
    Row(
        "datasets[].default_caption",
        (f"{CONCEPT}.prompt",),
        "`[trigger]` becomes `{}`",
        _caption,
        "a photo of [trigger]",
    ),
    copied("datasets[].trigger_word", f"{CONCEPT}.trigger", "zqx", read=text),
    Row(
        "datasets[].caption_dropout_rate",
        (f"{CONCEPT}.caption_dropout",),
        "",
        lambda value, source: (
            to(f"{CONCEPT}.caption_dropout", real(value)) if number(value) else needless("off there too")
        ),
        0.05,
    ),
    copied("datasets[].shuffle_tokens", "data.captions.shuffle", True, read=flag),
    copied("datasets[].keep_tokens", "data.captions.keep_tokens", 1, read=whole),
    copied("datasets[].token_dropout_rate", "data.captions.tag_dropout", 0.1, read=real),
    Row(
        "datasets[].resolution",
        ("data.resolution", f"{CONCEPT}.resolution"),
        "a list, as there; `data.resolution` when all say the same",
        _resolution,
        [512, 768],
        unset=512,
    ),
    copied("datasets[].buckets", "data.buckets", False, read=flag),
    *without("buckets go in steps of the base's", "datasets[].bucket_tolerance", off=(64,), example=32),
    copied("datasets[].num_repeats", f"{CONCEPT}.repeats", 4, read=whole),
    copied("datasets[].loss_multiplier", f"{CONCEPT}.weight", 0.5, read=real),
    Row(
        "datasets[].is_reg",
        (f"{CONCEPT}.role",),
        "`class`; every other step was the class's there, so `optim.steps` is half",
        _is_reg,
        True,
    ),
    *without("set `prior.mode: adapter_off`", "datasets[].prior_reg", example=True),
    copied("datasets[].flip_x", "data.flip", True, read=flag),
    Row("datasets[].random_crop", ("data.crop",), "`random`", crop, True),
    *without(
        "only mirroring left to right and cropping are done here; change the pictures themselves",
        (
            "datasets[].flip_y datasets[].random_scale datasets[].augments datasets[].augmentations "
            "datasets[].shuffle_augmentations datasets[].square_crop"
        ),
        example=True,
    ),
    *without("pictures are made as large as they are trained", "datasets[].scale", off=(1, 1.0), example=0.5),
    Row(
        "datasets[].mask_path",
        ("data.mask_outside",),
        "mask_min_value; put masks as `masks/NAME.png` into the folder of pictures",
        _mask("its masks go to masks/NAME.png in the folder of pictures"),
        "masks",
    ),
    Row(
        "datasets[].alpha_mask",
        ("data.mask_outside",),
        "mask_min_value; the alpha channel is a mask",
        _mask("by the alpha channel"),
        True,
    ),
    *unneeded("with mask_path or alpha_mask", "datasets[].mask_min_value", example=0.1),
    *without("invert the masks themselves", "datasets[].invert_mask", example=True),
    Row("datasets[].cache_latents_to_disk", ("data.cache_dir",), "a folder", _cache, True),
    *unneeded(
        "latents and captions are kept in memory here when they can be",
        (
            "datasets[].cache_latents datasets[].cache_text_embeddings "
            "datasets[].load_image_when_caching_latents datasets[].cache_latents_num_workers "
            "datasets[].cache_clip_vision_to_disk datasets[].cache_tensors_to_disk"
        ),
        example=True,
    ),
    *without(
        "an adapter is trained at its full strength: give the folder a `weight`",
        "datasets[].network_weight",
        off=(1, 1.0),
        example=0.5,
    ),
    *without("one batch size for all: `optim.batch_size`", "datasets[].batch_size", off=(1,), example=2),
    *without(
        "no counterpart: pictures and captions alone are learnt from",
        (
            "datasets[].control_path datasets[].control_path_1 datasets[].control_path_2 "
            "datasets[].control_path_3 datasets[].controls datasets[].inpaint_path "
            "datasets[].unconditional_path datasets[].clip_image_path datasets[].clip_image_from_same_folder "
            "datasets[].control_from_same_folder datasets[].random_triggers datasets[].replacements "
            "datasets[].use_short_captions datasets[].standardize_images datasets[].do_i2v "
            "datasets[].do_audio datasets[].extra_values datasets[].auto_frame_count"
        ),
        example="depth",
    ),
    *without("no counterpart: pictures, not videos", "datasets[].num_frames", off=(1,), example=41),
    *unneeded(
        "of videos and pictures beside them",
        (
            "datasets[].shrink_video_to_frames datasets[].fps datasets[].trim_auto_frame_count_tail "
            "datasets[].control_transparent_color datasets[].full_size_control_images "
            "datasets[].replay_transforms datasets[].random_triggers_max datasets[].guidance_type "
            "datasets[].audio_preserve_pitch datasets[].audio_normalize "
            "datasets[].num_controls_from_same_folder"
        ),
        example=24,
    ),
    *unneeded(
        "the machine's",
        "datasets[].num_workers datasets[].prefetch_factor datasets[].fast_image_size datasets[].type datasets[].debug",
        example=2,
    ),
]


MODEL: list[Row] = [
    Row(
        "model.name_or_path",
        ("model",),
        "a hub id, a folder or a .safetensors file",
        model_name,
        "black-forest-labs/FLUX.1-dev",
    ),
    copied("model.vae_path", "base.vae", "vae.safetensors", read=text),
    copied("model.unet_path", "base.unet", "unet.safetensors", read=text),
    Row(
        "model.assistant_lora_path",
        ("base.adapters",),
        "strength 1",
        lambda value, source: to(
            "base.adapters", {text(value): 1.0}, "a file or folder of adapters; a hub id is not loaded"
        ),
        "assistant.safetensors",
    ),
    Row(
        "model.lora_path",
        ("base.adapters",),
        "strength 1",
        lambda value, source: to("base.adapters", {text(value): 1.0}),
        "below.safetensors",
    ),
    *unneeded(
        "the family is told by the base itself",
        (
            "model.arch model.is_flux model.is_xl model.is_v2 model.is_v3 model.is_v_pred model.is_pixart "
            "model.is_pixart_sigma model.is_auraflow model.is_lumina2 model.is_ssd model.is_vega model.dtype "
            "model.vae_dtype model.te_dtype model.experimental_xl"
        ),
        example=True,
    ),
    *without(
        "other ways to quantise here: set `base.quantise` to nf4, int8 or fp8",
        "model.quantize model.quantize_te",
        example=True,
    ),
    *unneeded(
        "with quantize",
        (
            "model.qtype model.qtype_te model.quantize_kwargs model.quantize_kwargs.* "
            "model.accuracy_recovery_adapter model.text_encoder_bits"
        ),
        example="qfloat8",
    ),
    *without(
        "no counterpart yet for blocks on the CPU: `optim.gradient_checkpointing`, a smaller rank",
        "model.low_vram model.layer_offloading model.auto_memory model.split_model_over_gpus",
        example=True,
    ),
    *unneeded(
        "with layer_offloading",
        (
            "model.layer_offloading_transformer_percent model.layer_offloading_text_encoder_percent "
            "model.split_model_other_module_param_count_scale"
        ),
        example=0.5,
    ),
    *without("no counterpart yet", "model.compile model.block_compile", example=True),
    *unneeded(
        "with compile",
        "model.compile_mode model.compile_fullgraph model.compile_dynamic model.cache_size_limit",
        example="default",
    ),
    *without(
        "the base's own are taken: make a folder of the base with them",
        (
            "model.te_name_or_path model.extras_name_or_path model.model_paths.* model.model_kwargs.* "
            "model.refiner_name_or_path model.inference_lora_path model.unconditional_lora_path"
        ),
        example="x/y",
    ),
    *unneeded(
        "every text encoder that the base has",
        (
            "model.use_text_encoder_1 model.use_text_encoder_2 model.vae_device model.te_device "
            "model.use_flux_cfg model.attn_masking model.in_context model.latent_space_version "
            "model.refiner_start_at model.unet_sample_size"
        ),
        example=True,
    ),
]
