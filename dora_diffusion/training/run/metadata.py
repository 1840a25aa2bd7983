"""What an adapter's file says of itself: what we read, and what other tools do, as far as it is true here.

Sources: Stability-AI/ModelSpec 1.0.1; kohya-ss/sd-scripts `library/sai_model_spec.py` and `train_network.py`, whose
`ss_*` A1111, Forge and hub pages look for. Nothing depends on a clock, nor on where the run's folder lies, so that a
resumed run writes the same bytes: `modelspec.date` and kohya's times are left out.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_diffusion._version import __version__
from dora_diffusion.families import Family, family_of_pipeline
from dora_diffusion.families.distilled import distilled_kind
from dora_diffusion.training.base.below import Below
from dora_diffusion.training.base.sizes import sizes_of
from dora_diffusion.training.config import OptimConfig, TrainConfig
from dora_diffusion.training.data.concepts import Split
from dora_diffusion.training.data.examples import Example
from dora_diffusion.training.step.objective import is_flow
from dora_diffusion.utils.text import encodable

# Of a folder; with captions that are sentences, each of a thousand pictures may have one of its own.
TAGS_AT_MOST = 1000
# `formats.kohya_hashes` takes them of the tensors that are written; a header is as long before as after.
_HASHES = {"modelspec.hash_sha256": "0x" + 64 * "0", "sshs_model_hash": 64 * "0", "sshs_legacy_hash": 8 * "0"}


def base_name(config: TrainConfig) -> str:
    """What a base is called; of a path the name only: a path tells strangers about the user's machine."""
    return Path(config.model).name if Path(config.model).is_absolute() else config.model


def adapter_metadata(config: TrainConfig, family: Family, *, step: int, below: Sequence[Below] = ()) -> dict[str, str]:
    """What a reader of the file should know, as strings."""
    facts = {
        "version": __version__,
        "family": family.name,
        "base_model": base_name(config),
        "norm_grad": config.adapter.norm_grad,
        "magnitude_axis": "out",
        "instance_prompt": config.data.instance_prompt or "",
        "words": " ".join(config.words.starts),
        "steps": str(step),
    }
    if config.adapter.start is not None:
        facts["started_from"] = config.adapter.start.name
    if below:
        laid = [{"name": each.name, "strength": each.strength, "sha256": each.sha256} for each in below]
        facts["trained_on_top_of"] = json.dumps(laid)
    return {f"dora_diffusion.{name}": value for name, value in facts.items()}


def tool_metadata(config: TrainConfig, pipe: Any, examples: Split, *, step: int) -> dict[str, str]:
    """The metadata that other tools read, but the hashes of the tensors to come, which `save_adapter` takes.

    Args:
        config: of the run; with `metadata: minimal` there are none.
        pipe: the base.
        examples: all that is trained.
        step: how many steps are done.
    """
    if config.metadata == "minimal":
        return {}
    found = {**_HASHES, **_model_spec(config, pipe), **_kohya(config, pipe, examples), "ss_steps": step}
    return {key: encodable(str(value)) for key, value in found.items()}


def named_for_tools(metadata: Mapping[str, str], name: str) -> dict[str, str]:
    """The same for a file that bears this name, which A1111 takes for the adapter's."""
    own = {"ss_output_name": encodable(name), "modelspec.title": encodable(name)}
    return {**metadata, **(own if "modelspec.title" in metadata else {})}


def trigger_words(config: TrainConfig) -> tuple[str, ...]:
    """What a prompt calls the learnt by: triggers and new words; without any, the prompt of the pictures."""
    triggers = [config.data.trigger, *(concept.trigger for concept in config.data.concepts)]
    found = [trigger for trigger in triggers if trigger]
    found += [word for word in config.words.starts if not any(word in trigger for trigger in found)]
    prompt = config.data.instance_prompt
    return tuple(dict.fromkeys(found)) or ((prompt,) if prompt else ())


def _predicts_v(pipe: Any) -> bool:
    return not is_flow(pipe.scheduler) and pipe.scheduler.config.get("prediction_type") == "v_prediction"


def _tool_names(config: TrainConfig, pipe: Any) -> tuple[str, str]:
    """ModelSpec's architecture and kohya's version of a base; the latter empty where kohya knows none."""
    family, kind = family_of_pipeline(pipe), distilled_kind(pipe, config.model)
    architecture, version = family.names.of(predicts_v=_predicts_v(pipe))
    own = "" if kind is None else kind.architecture
    return own or architecture or family.name, version


def _side(config: TrainConfig, pipe: Any) -> int:
    return max(sizes_of(pipe).resolutions(config.data))


def _model_spec(config: TrainConfig, pipe: Any) -> dict[str, Any]:
    triggers, side = ", ".join(trigger_words(config)), _side(config, pipe)
    kind = "DoRA" if config.adapter.use_dora else "LoRA"
    found = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{_tool_names(config, pipe)[0]}/lora",  # the only word that readers know for adapters
        "implementation": "https://github.com/huggingface/diffusers",
        "title": " ".join([kind, *([f"of {triggers}"] if triggers else []), f"on {base_name(config)}"]),
        "resolution": f"{side}x{side}",
        "tags": kind.lower(),
    }
    if triggers:
        found["trigger_phrase"] = triggers
    if not is_flow(pipe.scheduler):
        found["prediction_type"] = "v" if _predicts_v(pipe) else "epsilon"
    return {f"modelspec.{name}": value for name, value in found.items()}


def _kohya(config: TrainConfig, pipe: Any, examples: Split) -> dict[str, Any]:
    """Booleans and lists are written as Python prints them, tables as JSON: so do kohya's scripts, and read them."""
    data, version, side = config.data, _tool_names(config, pipe)[1], _side(config, pipe)
    learnt = list(examples.train)
    found: dict[str, Any] = {
        "sd_model_name": base_name(config),
        "v2": version.startswith("sd_v2"),
        "network_module": "dora_diffusion.layers.dora",
        # as a config has them; a writer puts down what the tensors come to
        "network_dim": config.adapter.rank,
        "network_alpha": f"{config.adapter.alpha:g}",
        "network_dropout": config.adapter.dropout,
        "resolution": f"({side}, {side})",
        "num_train_images": sum(example.repeats for example in learnt),
        "num_reg_images": len(examples.classes),
        "num_validation_images": len(examples.validation),
        "dataset_dirs": json.dumps(_folders(learnt), ensure_ascii=False),
        "tag_frequency": json.dumps(tag_frequency(learnt, data.captions.separator), ensure_ascii=False),
        "enable_bucket": data.buckets,
        "bucket_no_upscale": not data.upscale,
        "flip_aug": data.flip,
        "random_crop": data.crop == "random",
        "shuffle_caption": data.captions.shuffle,
        "keep_tokens": data.captions.keep_tokens,
        "caption_dropout_rate": data.captions.dropout or data.caption_dropout,
        "caption_tag_dropout_rate": data.captions.tag_dropout,
        "prior_loss_weight": config.prior.weight,
        **_rates(config),
        **_optim(config.optim),
    }
    if version:
        found["base_model_version"] = version
    if not is_flow(pipe.scheduler):
        found["min_snr_gamma"] = config.optim.min_snr_gamma
    return {f"ss_{name}": value for name, value in found.items()}


def _optim(optim: OptimConfig) -> dict[str, Any]:
    return {
        "max_train_steps": optim.steps,
        "batch_size_per_device": optim.batch_size,
        "gradient_accumulation_steps": optim.gradient_accumulation,
        "gradient_checkpointing": optim.gradient_checkpointing,
        "lr_scheduler": optim.schedule,
        "lr_warmup_steps": optim.warmup_steps,
        "max_grad_norm": optim.max_grad_norm,
        "mixed_precision": optim.mixed_precision,
        "seed": optim.seed,
    }


def _rates(config: TrainConfig) -> dict[str, Any]:
    """The rates of what is trained."""
    optim, own = config.optim, config.optim.text_encoder_learning_rate
    text = json.dumps(own) if isinstance(own, Mapping) else optim.rate if own is None else own
    return {
        "learning_rate": optim.rate,
        **({"unet_lr": optim.rate} if config.adapter.train_unet else {}),
        **({"text_encoder_lr": text} if config.adapter.train_text_encoder else {}),
    }


def _folders(examples: Sequence[Example]) -> dict[str, dict[str, int]]:
    """Name of a folder -> how often an epoch shows its pictures, and how many there are."""
    found: dict[str, dict[str, int]] = {}
    for example in examples:
        entry = found.setdefault(example.path.parent.name, {"n_repeats": example.repeats, "img_count": 0})
        entry["img_count"] += 1
    return found


def tag_frequency(examples: Sequence[Example], separator: str) -> dict[str, dict[str, int]]:
    """Name of a folder -> tag -> how many of its captions hold it; the `TAGS_AT_MOST` most frequent."""
    counts: dict[str, Counter[str]] = {}
    for example in examples:
        counter = counts.setdefault(example.path.parent.name, Counter())
        for caption in example.captions:
            counter.update(tag for tag in (part.strip() for part in caption.split(separator)) if tag)
    return {folder: dict(counter.most_common(TAGS_AT_MOST)) for folder, counter in counts.items()}
