"""Options of checkpoints, samples, logs and the machine."""

import math
import re
from collections.abc import Callable
from typing import Any

from dora_diffusion.training.import_config.kohya.steps import epoch, ours
from dora_diffusion.training.import_config.records import (
    Answer,
    Row,
    Source,
    copied,
    needless,
    to,
    unneeded,
    without,
)
from dora_diffusion.training.import_config.values import flag, number, preview_of, real, text, tracker, whole


def _every_epochs(key: str) -> Any:
    def convert(value: Any, source: Source) -> Answer:
        return to(key, ours(whole(value) * epoch(source), source)) if number(value) else needless("off there too")

    return convert


def _every_steps(key: str, epochs: str) -> Any:
    def convert(value: Any, source: Source) -> Answer:
        if not number(value) or source.has(epochs):
            return needless("off there too" if not number(value) else f"{epochs} decides")
        return to(key, ours(whole(value), source))

    return convert


def _keep(unit: str) -> Any:
    def convert(value: Any, source: Source) -> Answer:
        every = number(source.get(f"save_every_n_{unit}", 0))
        if not number(value) or not every:
            return needless("off there too")
        return to("checkpoint.keep", max(1, math.ceil(number(value) / every)))

    return convert


def _prompts(value: Any, source: Source) -> Answer:
    path = source.at(text(value))
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError):
        raise ValueError("that file is not on this machine; put its prompts into preview.prompts") from None
    if path.suffix.lower() != ".txt":
        raise ValueError("only .txt files of prompts are read; put its prompts into preview.prompts")
    said = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not said:
        return needless("that file is empty")
    return to("preview.prompts", [_of_line(line) for line in said])


_OF_LINES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "n": ("negative", text),
    "d": ("seed", whole),
    "w": ("width", whole),
    "h": ("height", whole),
    "s": ("steps", whole),
    "l": ("guidance_scale", real),
    "am": ("strength", real),
}


def _of_line(line: str) -> str | dict[str, Any]:
    """`a robot --n blurry --w 768 --h 512 --d 1 --l 4 --s 20` -> our keys."""
    prompt, *options = re.split(r"\s--(?=\w)", f" {line}")
    said: dict[str, Any] = {}
    for option in options:
        name, _, value = option.strip().partition(" ")
        if name.lower() in _OF_LINES:
            key, read_value = _OF_LINES[name.lower()]
            said[key] = read_value(value.strip())
    return preview_of(prompt.strip(), said)


RUN: list[Row] = [
    Row("save_every_n_steps", ("checkpoint.every",), "", _every_steps("checkpoint.every", "save_every_n_epochs"), 100),
    Row(
        "save_every_n_epochs",
        ("checkpoint.every",),
        "in steps, when the pictures are here",
        _every_epochs("checkpoint.every"),
        1,
        beside={"train_data_dir": "img"},
    ),
    Row(
        "save_last_n_steps",
        ("checkpoint.keep",),
        "/ save_every_n_steps",
        _keep("steps"),
        400,
        beside={"save_every_n_steps": 100},
    ),
    Row(
        "save_last_n_epochs",
        ("checkpoint.keep",),
        "/ save_every_n_epochs",
        _keep("epochs"),
        4,
        beside={"save_every_n_epochs": 1, "train_data_dir": "img"},
    ),
    Row("sample_every_n_steps", ("preview.every",), "", _every_steps("preview.every", "sample_every_n_epochs"), 100),
    Row(
        "sample_every_n_epochs",
        ("preview.every",),
        "in steps, when the pictures are here",
        _every_epochs("preview.every"),
        1,
        beside={"train_data_dir": "img"},
    ),
    Row(
        "sample_prompts",
        ("preview.prompts",),
        "a .txt; `--n`, `--d`, `--w`, `--h`, `--s`, `--l` and `--am` of each line too",
        _prompts,
        "prompts.txt",
    ),
    Row(
        "validate_every_n_steps",
        ("validation.every",),
        "",
        lambda value, source: to("validation.every", ours(whole(value), source)),
        50,
    ),
    Row(
        "validate_every_n_epochs",
        ("validation.every",),
        "in steps",
        _every_epochs("validation.every"),
        1,
        beside={"train_data_dir": "img"},
    ),
    copied("max_validation_steps", "validation.pictures", 4, read=whole, says="batches there"),
    *unneeded(
        "drawn by the base's own sampler, before the first step too", "sample_sampler sample_at_first", example="ddim"
    ),
    *unneeded(
        "a checkpoint always holds all that a run goes on from",
        "save_state save_state_on_train_end save_last_n_epochs_state save_last_n_steps_state save_n_epoch_ratio",
    ),
    *unneeded(
        "`dora-diffusion train CONFIG.yaml --resume latest`",
        "resume resume_from_huggingface skip_until_initial_step initial_epoch initial_step",
        example="state",
    ),
    *unneeded(
        "adapters are .safetensors in fp32; `export` and `dora-diffusion convert` write other formats",
        "save_model_as save_precision use_safetensors training_comment save_clip save_t5xxl",
        example="fp16",
    ),
    Row(
        "no_metadata",
        ("metadata",),
        "`minimal`",
        lambda value, source: to("metadata", "minimal") if flag(value) else needless("off there too"),
        True,
    ),
    Row("log_with", ("logging.trackers",), "all: tensorboard and wandb", tracker, "wandb"),
    copied("log_tracker_name", "logging.project", "robots", read=text),
    *unneeded(
        "logs are in the run's folder, and a run is called as that is",
        "logging_dir log_prefix log_tracker_config wandb_run_name log_config",
        example="logs",
    ),
    *unneeded(
        "nothing is sent anywhere",
        (
            "huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_repo_visibility "
            "save_state_to_huggingface async_upload"
        ),
        example="me/x",
    ),
    *unneeded("nothing is sent anywhere", "huggingface_token wandb_api_key", is_secret=True, example="x"),
    *unneeded(
        "the machine's, or found by itself",
        (
            "sdpa xformers mem_eff_attn lowram highvram max_data_loader_n_workers "
            "persistent_data_loader_workers tokenizer_cache_dir disable_mmap_load_safetensors no_half_vae "
            "text_encoder_batch_size "
            "t5xxl_device t5xxl_dtype use_flash_attn use_sage_attn sample_batch_size output_config "
            "config_file num_cpu_threads_per_process"
        ),
        example="x",
    ),
    *unneeded(
        "several processes: `accelerate launch --multi_gpu`, one reduce a step, no wait that times out",
        "ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph",
        example="x",
    ),
    *without(
        "`accelerate launch --use_fsdp --fsdp_version 2` spreads the base over devices", "deepspeed", example=True
    ),
    *unneeded(
        "captions are encoded once and kept when no text encoder is trained",
        "cache_text_encoder_outputs cache_text_encoder_outputs_to_disk",
        example=True,
    ),
    *unneeded(
        "of the GUI",
        (
            "sdxl flux1_checkbox sd3_checkbox model_list train_on_input use_wandb unit "
            "no_token_padding "
            "caption_metadata_filename"
        ),
        example=True,
    ),
    *without("options in it are not read: write them into a TOML", "additional_parameters", example="--x"),
    *without(
        "text encoders are trained to the end",
        "stop_text_encoder_training stop_text_encoder_training_pct",
        example=50,
    ),
]
