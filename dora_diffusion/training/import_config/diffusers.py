"""diffusers' `train_dreambooth_lora*.py`: a shell script, or any text, with the command and its flags.

Read in huggingface/diffusers: examples/dreambooth/train_dreambooth_lora{,_sdxl,_sd3,_flux,_qwen_image}.py,
examples/advanced_diffusion_training, examples/research_projects/scheduled_huber_loss_training.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dora_diffusion.training.import_config.counts import samples_of_an_epoch, steps_of
from dora_diffusion.training.import_config.optimisers import SET_BY_IT, optimiser, option
from dora_diffusion.training.import_config.records import (
    Answer,
    Entry,
    Row,
    Source,
    Tool,
    copied,
    is_off,
    lost,
    needless,
    several,
    to,
    unneeded,
    without,
)
from dora_diffusion.training.import_config.values import (
    flag,
    loss_kind,
    model_name,
    number,
    of_huber,
    precision,
    real,
    refuse_factor,
    schedule,
    side_of,
    text,
    tracker,
    whole,
)

SCRIPT = "script"
"""What the command's script is called among its flags."""


def read(data: Mapping[str, Any], path: Path) -> Source:
    """Every flag of a command."""
    folder = data.get("instance_data_dir", data.get("dataset_name"))
    entries = tuple(Entry(f"--{key}" if key != SCRIPT else key, key, value) for key, value in data.items())
    return Source(path, entries, tree=folder if isinstance(folder, str) else None)


def _is(source: Source, *names: str) -> bool:
    script = str(source.get(SCRIPT, ""))
    return any(name in script for name in names)


def _accumulation(source: Source) -> int:
    return max(1, whole(source.get("gradient_accumulation_steps", 1)))


def _epoch(source: Source) -> int:
    batch = max(1, whole(source.get("train_batch_size", 4)))
    samples = samples_of_an_epoch(source) * whole(source.get("repeats", 1))
    return steps_of(samples, batch=batch, accumulation=_accumulation(source))


def _epochs(value: Any, source: Source) -> Answer:
    if source.has("max_train_steps"):
        return needless("max_train_steps decides")
    return to("optim.steps", whole(value) * _epoch(source), "epochs x pictures x repeats / batch / accumulation")


def _given(source: Source) -> dict[str, Any]:
    """The arguments of the optimiser, as its class names them."""
    given: dict[str, Any] = {}
    if source.has("adam_beta1") or source.has("adam_beta2"):
        given["betas"] = [source.get("adam_beta1", 0.9), source.get("adam_beta2", 0.999)]
    own = {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True, "beta3": None}
    given |= {key: source.get(f"prodigy_{key}", value) for key, value in own.items()}
    return given | {"eps": source.get("adam_epsilon")}


def _optimiser(value: Any, source: Source) -> Answer:
    is_short = text(value).lower() == "adamw" and flag(source.get("use_8bit_adam", False))
    return optimiser("AdamW8bit" if is_short else value, _given(source), decays=True)


def _short(value: Any, source: Source) -> Answer:
    if not flag(value) or str(source.get("optimizer", "adamw")).lower() != "adamw":
        return needless("off there too")
    return to("optim.optimizer", "adamw8bit")


def _option(key: str) -> Any:
    def convert(value: Any, source: Source) -> Answer:
        if key in {"decouple", "use_bias_correction", "safeguard_warmup", "beta3"} and not source.has("optimizer"):
            return needless("of Prodigy")
        return option(key, source.get("optimizer", "AdamW"), _given(source))

    return convert


def _learning_rate(value: Any, source: Source) -> Answer:
    refuse_factor(source.get("optimizer", ""))
    factor = (
        _accumulation(source) * whole(source.get("train_batch_size", 4)) if flag(source.get("scale_lr", False)) else 1
    )
    return to(
        "optim.learning_rate", real(value) * factor, f"x {factor}: scale_lr, on one device" if factor != 1 else ""
    )


def _text_rate(value: Any, source: Source) -> Answer:
    if not flag(source.get("train_text_encoder", False)):
        return needless("no text encoder is trained")
    if not source.has("text_encoder_lr") and not _is(source, "sdxl", "sd3", "flux"):
        return needless("learning_rate is theirs too")
    return to("optim.text_encoder_learning_rate", real(value))


def _warmup(value: Any, source: Source) -> Answer:
    if source.get("lr_scheduler", "constant") == "constant":
        return needless("not used with constant")
    return to("optim.warmup_steps", whole(value)) if number(value) else needless("none, as here")


def _alpha(value: Any, source: Source) -> Answer:
    """Without the flag alpha is the rank, but for the scripts that have the flag, where it is 4."""
    if value != "default":
        return to("adapter.alpha", real(value))
    is_newer = _is(source, "flux", "qwen", "sana", "z_image", "ideogram", "krea")
    return to("adapter.alpha", 4.0 if is_newer else real(source.get("rank", 4)))


def _layers(value: Any, source: Source) -> Answer:
    if value == "default":
        named = "all-linear" if _is(source, "flux.py", "flux_advanced", "kontext") else "attention"
        return to(
            "adapter.target_modules",
            named,
            "single blocks' too, which that script leaves alone" if "lin" in named else "",
        )
    return to("adapter.target_modules", [part.strip() for part in text(value).split(",") if part.strip()])


def _text_encoders(value: Any, source: Source) -> Answer:
    if not flag(value):
        return needless("off there too")
    if _is(source, "flux"):
        return to("adapter.train_text_encoder", ["text_encoder"], "CLIP alone, as there")
    return to("adapter.train_text_encoder", ["text_encoder", "text_encoder_2"] if _is(source, "sd3", "sdxl") else True)


def _with_prior(name: str, key: str, read_value: Any) -> Row:
    def convert(value: Any, source: Source) -> Answer:
        if not flag(source.get("with_prior_preservation", False)):
            return needless("with_prior_preservation is off")
        return to(key, read_value(value))

    examples = {"class_data_dir": "class", "class_prompt": "a robot", "num_class_images": 20, "prior_loss_weight": 0.5}
    beside = {"with_prior_preservation": True, "class_prompt": "a photo of a robot"}
    beside.pop(name, None)
    return Row(name, (key,), "with with_prior_preservation", convert, examples[name], beside=beside)


def _classes(value: Any, source: Source) -> Answer:
    return needless("with class_prompt" if flag(value) else "off there too")


def _gamma(value: Any, source: Source) -> Answer:
    return to("optim.min_snr_gamma", None if is_off(value) else real(value))


def _resolution(value: Any, source: Source) -> Answer:
    side = (1024 if _is(source, "sdxl") else 512) if value == "default" else whole(value)
    return to("data.resolution", side_of(side, side))


def _use_buckets(value: Any, source: Source) -> Answer:
    if source.has("aspect_ratio_buckets"):
        return needless("aspect_ratio_buckets decides")
    return to("data.buckets", flag(value))


def _crop(value: Any, source: Source) -> Answer:
    return to("data.crop", "center" if flag(value) else "random")


def _dataset(value: Any, source: Source) -> Answer:
    if source.has_folder(text(value)):
        return to("data.instance_dir", value, "with its metadata.jsonl")
    return lost("a folder with a metadata.jsonl is read, no data set of the hub: download it")


def _weighting(value: Any, source: Source) -> Answer:
    kind = text(value).lower()
    settings: dict[str, Any] = {"loss.timesteps.density": kind if kind in {"logit_normal", "mode"} else "uniform"}
    if kind in {"sigma_sqrt", "cosmap"}:
        settings["flow.weighting"] = kind
    return several(settings)


def _of_weighting(name: str, scheme: str) -> Row:
    def convert(value: Any, source: Source) -> Answer:
        if source.get("weighting_scheme") != scheme:
            return needless("not used with that weighting_scheme")
        return to(ours, real(value))

    ours = f"loss.timesteps.{name.removeprefix('logit_')}"
    return Row(name, (ours,), f"with {scheme}", convert, 0.5, beside={"weighting_scheme": scheme})


def _validation_epochs(value: Any, source: Source) -> Answer:
    return to("preview.every", max(1, math.ceil(whole(value) * _epoch(source))))


def _revision(value: Any, source: Source) -> Answer:
    name = source.get("pretrained_model_name_or_path", "")
    return to("model", f"{name}@{text(value)}")


def _model(value: Any, source: Source) -> Answer:
    return needless("with revision") if source.has("revision") else model_name(value, source)


def _guidance(value: Any, source: Source) -> Answer:
    return (
        needless("1, as here") if real(value) == 1 else lost("bases that were distilled from guidance are told 1 here")
    )


ROWS: tuple[Row, ...] = (
    *unneeded("the family is told by the base itself", SCRIPT, example="train_dreambooth_lora.py"),
    Row("pretrained_model_name_or_path", ("model",), "", _model, "stabilityai/stable-diffusion-xl-base-1.0"),
    Row(
        "revision",
        ("model",),
        "`owner/name@revision`",
        _revision,
        "fp16",
        beside={"pretrained_model_name_or_path": "a/b"},
    ),
    *unneeded("the variant that fits the precision is taken", "variant", example="fp16"),
    copied(
        "pretrained_vae_model_name_or_path",
        "base.vae",
        "vae.safetensors",
        read=text,
        says="a file; a hub id is not loaded",
    ),
    copied("instance_data_dir", "data.instance_dir", "img", read=text),
    Row("dataset_name", (), "a folder with a metadata.jsonl is `data.instance_dir`", _dataset, "owner/photos"),
    *unneeded(
        "columns are text, caption or prompt, and file_name",
        "caption_column image_column dataset_config_name cache_dir",
        example="text",
    ),
    copied("instance_prompt", "data.instance_prompt", "a photo of zqx robot", read=text),
    *unneeded("one folder: more of it changes nothing but the length of an epoch", "repeats", example=2),
    Row("resolution", ("data.resolution",), "", _resolution, 768, unset="default"),
    Row("center_crop", ("data.crop",), "without it `random`", _crop, True, unset=False),
    copied("random_flip", "data.flip", True, read=flag),
    *unneeded("Lanczos here", "image_interpolation_mode", example="lanczos"),
    copied("caption_dropout", "data.captions.dropout", 0.1, read=real),
    Row(
        "use_aspect_ratio_buckets",
        ("data.buckets",),
        "without it false: squares",
        _use_buckets,
        True,
        unset=False,
    ),
    Row(
        "aspect_ratio_buckets",
        ("data.buckets",),
        "of the resolution, in steps of the base's",
        lambda value, source: to("data.buckets", True, "of the resolution, in steps of the base's"),
        "1024,1024;768,1360",
    ),
    Row("with_prior_preservation", (), "with class_prompt", _classes, True),
    _with_prior("class_data_dir", "prior.class_dir", text),
    _with_prior("class_prompt", "prior.class_prompt", text),
    _with_prior("num_class_images", "prior.class_images", whole),
    _with_prior("prior_loss_weight", "prior.weight", real),
    copied("rank", "adapter.rank", 16, read=whole, unset=4),
    Row(
        "lora_alpha",
        ("adapter.alpha",),
        "without it the rank, or 4 where the script has the flag",
        _alpha,
        8,
        unset="default",
    ),
    copied("lora_dropout", "adapter.dropout", 0.1, read=real),
    copied("use_dora", "adapter.use_dora", True, read=flag, unset=False),
    Row(
        "lora_layers",
        ("adapter.target_modules",),
        "a list; without it `attention`, FLUX.1: `all-linear`",
        _layers,
        "attn.to_k,attn.to_q",
        unset="default",
    ),
    *without("name the layers in `adapter.target_modules`", "lora_blocks", example="0,1"),
    Row("train_text_encoder", ("adapter.train_text_encoder",), "FLUX.1: `[text_encoder]`", _text_encoders, True),
    Row(
        "text_encoder_lr",
        ("optim.text_encoder_learning_rate",),
        "",
        _text_rate,
        5e-6,
        beside={"train_text_encoder": True},
        unset=5e-6,
    ),
    copied("train_batch_size", "optim.batch_size", 2, read=whole, unset=4),
    copied("gradient_accumulation_steps", "optim.gradient_accumulation", 2, read=whole),
    copied("max_train_steps", "optim.steps", 500, read=whole),
    Row(
        "num_train_epochs",
        ("optim.steps",),
        "epochs x pictures x repeats / batch / accumulation",
        _epochs,
        2,
        beside={"instance_data_dir": "img"},
        unset=1,
    ),
    Row("learning_rate", ("optim.learning_rate",), "", _learning_rate, 1e-4, unset=1e-4),
    *unneeded("with learning_rate", "scale_lr"),
    Row(
        "lr_scheduler",
        ("optim.lr_scheduler",),
        "restarts are left out",
        lambda value, source: schedule(value, 0),
        "cosine",
        unset="constant",
    ),
    Row(
        "lr_warmup_steps",
        ("optim.warmup_steps",),
        "not used with constant",
        _warmup,
        10,
        beside={"lr_scheduler": "cosine"},
        unset=500,
    ),
    *without("cosine falls to 0 once", "lr_num_cycles lr_power", off=("1", "1.0", 1, 1.0), example=3),
    Row("optimizer", SET_BY_IT, "AdamW, prodigy", _optimiser, "prodigy"),
    Row("use_8bit_adam", ("optim.optimizer",), "", _short, True),
    copied(
        "adam_weight_decay",
        "optim.weight_decay",
        1e-4,
        unset=1e-4,
        read=real,
        says="of the low-rank pair; magnitudes never decay",
    ),
    *without("one weight decay for all", "adam_weight_decay_text_encoder", example=1e-3),
    *(
        Row(name, ("optim.optimizer_options",), "", _option(key), example, beside=beside)
        for name, key, example, beside in (
            ("adam_beta1", "betas", 0.95, {}),
            ("adam_beta2", "betas", 0.99, {}),
            ("adam_epsilon", "eps", 1e-6, {}),
            ("prodigy_beta3", "beta3", 0.98, {"optimizer": "prodigy"}),
            ("prodigy_decouple", "decouple", "False", {"optimizer": "prodigy"}),
            ("prodigy_use_bias_correction", "use_bias_correction", "False", {"optimizer": "prodigy"}),
            ("prodigy_safeguard_warmup", "safeguard_warmup", "False", {"optimizer": "prodigy"}),
        )
    ),
    copied("max_grad_norm", "optim.max_grad_norm", 0.5, read=real),
    Row("snr_gamma", ("optim.min_snr_gamma",), "without it null", _gamma, 5.0, unset=0),
    copied("noise_offset", "loss.noise_offset", 0.05, read=real, says="of the advanced scripts"),
    Row("loss_type", ("loss.kind",), "huber is that of the scheduled Huber scripts", loss_kind, "huber"),
    of_huber("huber_c", "loss.huber_c", real, 0.2),
    of_huber("huber_schedule", "loss.huber_schedule", text, "constant"),
    Row("weighting_scheme", ("loss.timesteps.density", "flow.weighting"), "", _weighting, "logit_normal"),
    _of_weighting("logit_mean", "logit_normal"),
    _of_weighting("logit_std", "logit_normal"),
    _of_weighting("mode_scale", "mode"),
    Row("guidance_scale", (), "bases that were distilled from guidance are told 1 here", _guidance, 3.5),
    copied("mixed_precision", "optim.mixed_precision", "bf16", read=precision, unset="no"),
    copied("gradient_checkpointing", "optim.gradient_checkpointing", True, read=flag),
    copied("seed", "optim.seed", 7, read=whole),
    copied("output_dir", "output_dir", "out", read=text),
    copied("checkpointing_steps", "checkpoint.every", 100, read=whole, unset=500),
    copied("checkpoints_total_limit", "checkpoint.keep", 3, read=whole),
    *unneeded("`dora-diffusion train CONFIG.yaml --resume latest`", "resume_from_checkpoint", example="latest"),
    Row(
        "validation_prompt",
        ("preview.prompts",),
        "",
        lambda value, source: to("preview.prompts", [text(value)]),
        "a robot",
    ),
    Row(
        "validation_epochs", ("preview.every",), "in steps", _validation_epochs, 2, beside={"instance_data_dir": "img"}
    ),
    *without("one picture of each prompt", "num_validation_images", off=("1", 1), example=4),
    *unneeded(
        "the last preview is drawn at the end",
        "final_validation_prompt skip_final_inference validation_images",
        example="a robot",
    ),
    *without("no counterpart: EDM's preconditioning", "do_edm_style_training", example=True),
    *unneeded("the base's own scheduler says so", "precondition_outputs class_labels_conditioning", example=1),
    *without(
        "captions end where the base's text encoder ends",
        "max_sequence_length tokenizer_max_length",
        off=("77", "256", "512", 77, 256, 512),
        example=128,
    ),
    *without("set `base.quantise: nf4`", "bnb_quantization_config_path", example="config.json"),
    *unneeded(
        "captions are encoded once and kept, latents too",
        "pre_compute_text_embeddings cache_latents offload text_encoder_use_attention_mask",
        example=True,
    ),
    *unneeded(
        "adapters are .safetensors in fp32; `export` and `dora-diffusion convert` write other formats",
        "upcast_before_saving",
        example=True,
    ),
    Row(
        "output_kohya_format",
        ("export",),
        "`[kohya]`",
        lambda value, source: to("export", ["kohya"]) if flag(value) else needless("off there too"),
        True,
    ),
    Row("report_to", ("logging.trackers",), "all: tensorboard and wandb", tracker, "wandb"),
    *unneeded("nothing is sent anywhere", "push_to_hub hub_model_id", example=True),
    *unneeded("nothing is sent anywhere", "hub_token", example="x", is_secret=True),
    *unneeded(
        "the machine's, or found by itself",
        (
            "allow_tf32 dataloader_num_workers enable_xformers_memory_efficient_attention "
            "enable_npu_flash_attention local_rank prior_generation_precision sample_batch_size "
            "tokenizer_name pretrained_tokenizer_4_name_or_path pretrained_text_encoder_4_name_or_path "
            "logging_dir"
        ),
        example="x",
    ),
)
DIFFUSERS = Tool("diffusers", "a command with train_dreambooth_lora*.py", ROWS, read)
