"""Options of checkpoints and samples."""

from collections.abc import Mapping
from typing import Any

from dora_diffusion.training.import_config.ai_toolkit.data import TRIGGERS
from dora_diffusion.training.import_config.ai_toolkit.steps import every
from dora_diffusion.training.import_config.records import Answer, Row, Source, copied, needless, to, unneeded, without
from dora_diffusion.training.import_config.values import flag, real, text, whole


def _prompts(value: Any, source: Source) -> Answer:
    items = value if isinstance(value, list) else [value]
    found = [item.get("prompt", "") if isinstance(item, Mapping) else item for item in items]
    trigger = str(source.get("trigger_word", ""))
    for mark in TRIGGERS:
        found = [text(prompt).replace(mark, trigger) for prompt in found]
    found = [" ".join(prompt.split()) for prompt in found if prompt.strip()]
    if flag(source.get("train.disable_sampling", False)):
        return needless("disable_sampling")
    says = (
        "their prompts; seeds, sizes and the like of each are not taken"
        if any(isinstance(item, Mapping) for item in items)
        else ""
    )
    return to("preview.prompts", found, says) if found else needless("none there either")


SAVE: list[Row] = [
    Row("save.save_every", ("checkpoint.every",), "", every("checkpoint.every"), 250),
    copied("save.max_step_saves_to_keep", "checkpoint.keep", 4, read=whole),
    *unneeded(
        "adapters are .safetensors in fp32; `export` and `dora-diffusion convert` write other formats",
        "save.dtype save.save_format",
        example="float16",
    ),
    *unneeded("nothing is sent anywhere", "save.push_to_hub save.hf_repo_id save.hf_private", example=True),
    Row("sample.sample_every", ("preview.every",), "", every("preview.every"), 250),
    Row("sample.prompts", ("preview.prompts",), "`[trigger]` is put in", _prompts, ["a robot"]),
    Row("sample.samples", ("preview.prompts",), "their prompts", _prompts, [{"prompt": "a robot"}]),
    copied("sample.seed", "preview.seed", 42, read=whole),
    copied("sample.guidance_scale", "preview.guidance_scale", 3.5, read=real),
    copied("sample.sample_steps", "preview.steps", 25, read=whole),
    *unneeded(
        "previews are as large as the base draws, each from the seed's own noise",
        (
            "sample.sampler sample.width sample.height sample.walk_seed sample.sample_start_step "
            "sample.format sample.ext sample.network_multiplier sample.guidance_rescale sample.num_frames "
            "sample.fps sample.refiner_start_at sample.extra_values sample.adapter_conditioning_scale "
            "sample.do_cfg_norm"
        ),
        example=1024,
    ),
    *without("previews have no negative prompt", "sample.neg", example="blurry"),
]
