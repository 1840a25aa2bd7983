"""Options of checkpoints and samples."""

from collections.abc import Callable, Mapping
from typing import Any

from dora_diffusion.training.import_config.ai_toolkit.data import TRIGGERS
from dora_diffusion.training.import_config.ai_toolkit.steps import every
from dora_diffusion.training.import_config.records import Answer, Row, Source, copied, needless, to, unneeded
from dora_diffusion.training.import_config.values import flag, preview_of, real, text, whole

_OWN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "neg": ("negative", text),
    "seed": ("seed", whole),
    "width": ("width", whole),
    "height": ("height", whole),
    "sample_steps": ("steps", whole),
    "guidance_scale": ("guidance_scale", real),
    "network_multiplier": ("strength", real),
}
# What is said of all samples at once, and of each prompt here.
_SHARED = ("neg", "width", "height", "network_multiplier")


def _prompts(value: Any, source: Source) -> Answer:
    items = value if isinstance(value, list) else [value]
    found = [_prompt(item if isinstance(item, Mapping) else {"prompt": item}, source) for item in items]
    if flag(source.get("train.disable_sampling", False)):
        return needless("disable_sampling")
    prompts = [one for one in found if one]
    return to("preview.prompts", prompts) if prompts else needless("none there either")


def _prompt(item: Mapping[str, Any], source: Source) -> str | dict[str, Any]:
    """An entry of ours; empty for a sample without a prompt."""
    prompt = text(item.get("prompt", ""))
    for mark in TRIGGERS:
        prompt = prompt.replace(mark, str(source.get("trigger_word", "")))
    if not prompt.strip():
        return ""
    shared = {name: source.get(f"sample.{name}", None) for name in _SHARED}
    said = {name: value for name, value in {**shared, **item}.items() if name in _OWN and value is not None}
    return preview_of(" ".join(prompt.split()), {_OWN[name][0]: _OWN[name][1](value) for name, value in said.items()})


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
    Row("sample.samples", ("preview.prompts",), "with what each says", _prompts, [{"prompt": "a robot"}]),
    copied("sample.seed", "preview.seed", 42, read=whole),
    copied("sample.guidance_scale", "preview.guidance_scale", 3.5, read=real),
    copied("sample.sample_steps", "preview.steps", 25, read=whole),
    *unneeded(
        "in each of `preview.prompts`", "sample.width sample.height sample.neg sample.network_multiplier", example=1024
    ),
    *unneeded(
        "previews are drawn by the base's own sampler, each from the seed's own noise",
        (
            "sample.sampler sample.walk_seed sample.sample_start_step "
            "sample.format sample.ext sample.guidance_rescale sample.num_frames "
            "sample.fps sample.refiner_start_at sample.extra_values sample.adapter_conditioning_scale "
            "sample.do_cfg_norm"
        ),
        example=1024,
    ),
]
