"""Options of checkpoints, samples, logs and the machine."""

from collections.abc import Callable, Mapping
from typing import Any

from dora_diffusion.training.import_config.one_trainer.steps import each
from dora_diffusion.training.import_config.records import Answer, Row, Source, copied, needless, to, unneeded, without
from dora_diffusion.training.import_config.values import device, preview_of, real, text, whole

_OWN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "negative_prompt": ("negative", text),
    "seed": ("seed", whole),
    "width": ("width", whole),
    "height": ("height", whole),
    "diffusion_steps": ("steps", whole),
    "cfg_scale": ("guidance_scale", real),
}


def _prompts(value: Any, source: Source) -> Answer:
    said = [sample for sample in value if isinstance(sample.get("prompt"), str) and sample["prompt"].strip()]
    found = [preview_of(sample["prompt"].strip(), _own_settings(sample)) for sample in said]
    return to("preview.prompts", found) if found else needless("none there either")


def _own_settings(sample: Mapping[str, Any]) -> dict[str, Any]:
    is_random = sample.get("random_seed") is True
    names = [name for name in _OWN if sample.get(name) is not None and not (name == "seed" and is_random)]
    return {_OWN[name][0]: _OWN[name][1](sample[name]) for name in names}


REST: list[Row] = [
    Row("samples[].prompt", ("preview.prompts",), "with what each says", _prompts, ["a robot"]),
    *unneeded(
        "in each of `preview.prompts`",
        "samples[].seed samples[].diffusion_steps samples[].cfg_scale samples[].width samples[].height",
        example=20,
    ),
    *unneeded("in each of `preview.prompts`", "samples[].negative_prompt", example="blurry"),
    *unneeded("previews are drawn by the base's own sampler", "samples[].*", example=512),
    Row(
        "sample_after",
        ("preview.every",),
        "in steps; seconds, minutes and hours have no counterpart",
        each("preview.every", "sample_after_unit"),
        100,
        beside={"sample_after_unit": "STEP"},
    ),
    Row(
        "save_every",
        ("checkpoint.every",),
        "likewise",
        each("checkpoint.every", "save_every_unit"),
        100,
        beside={"save_every_unit": "STEP"},
    ),
    Row(
        "backup_after",
        ("checkpoint.every",),
        "likewise",
        each("checkpoint.every", "backup_after_unit"),
        100,
        beside={"backup_after_unit": "STEP"},
    ),
    Row(
        "validate_after",
        ("validation.every",),
        "likewise",
        each("validation.every", "validate_after_unit"),
        100,
        beside={"validate_after_unit": "STEP"},
    ),
    *unneeded(
        "with the number beside it",
        (
            "sample_after_unit save_every_unit backup_after_unit validate_after_unit validation "
            "save_skip_first sample_skip_first rolling_backup backup_before_save"
        ),
        example="STEP",
    ),
    copied("rolling_backup_count", "checkpoint.keep", 3, read=whole),
    copied("embedding_learning_rate", "optim.words_learning_rate", 1e-3, read=real),
    *without("name new words in `words.starts`", "embedding.model_name additional_embeddings", example="x"),
    *unneeded("name new words in `words.starts`", "embedding.* preserve_embedding_norm", example="x"),
    *unneeded("nothing is sent anywhere", "cloud.*", example="x"),
    *unneeded("nothing is sent anywhere", "secrets.*", is_secret=True, example="x"),
    *unneeded("`dora-diffusion train CONFIG.yaml --resume latest`", "continue_last_backup prevent_overwrites"),
    *unneeded(
        "logs are in the run's folder, for TensorBoard",
        (
            "tensorboard tensorboard_expose tensorboard_always_on tensorboard_port samples_to_tensorboard "
            "debug_mode debug_dir"
        ),
        example=6006,
    ),
    copied("train_device", "device", "cuda", read=device),
    *unneeded(
        "the machine's, or found by itself",
        (
            "__version workspace_dir huggingface_cache_dir offline_mode "
            "dataloader_threads temp_device fallback_train_dtype "
            "enable_autocast_cache attention_mechanism async_offloading force_circular_padding "
            "sample_image_format sample_video_format sample_audio_format weight_dtype quantization.*"
        ),
        example="x",
    ),
    *unneeded(
        "several devices: `accelerate launch --multi_gpu --num_processes N`, one reduce a step in fp32",
        (
            "multi_gpu device_indexes gradient_reduce_precision fused_gradient_reduce async_gradient_reduce "
            "async_gradient_reduce_buffer"
        ),
        example="x",
    ),
    *without("no counterpart yet for blocks on the CPU", "layer_offload_fraction", example=0.5),
    *unneeded("with gradient_checkpointing", "enable_async_offloading enable_activation_offloading"),
]
