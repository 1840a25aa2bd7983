"""What a run says of itself: before its first step, and in its README.md, a model card."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dora_diffusion.families.distilled import distilled_kind
from dora_diffusion.pipelines.hub import may_be_hub_id
from dora_diffusion.training.base.below import Below
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run.exports import Exported
from dora_diffusion.training.run.metadata import base_name, trigger_words
from dora_diffusion.training.run.standing import Outcome
from dora_diffusion.utils.text import encodable


def base_lines(pipe: Any, config: TrainConfig, below: Sequence[Below], started: str) -> list[str]:
    """What a run says of its base and its start before the first step."""
    kind = None if config.base.adapters else distilled_kind(pipe, config.model)
    warning = [] if kind is None else [f"warning    the base is {kind.name} ({kind.evidence}): {kind.instead}"]
    lines = [*(f"below      {each.line()}" for each in below), *([f"start      {started}"] if started else [])]
    return [*warning, *lines]


_UNKNOWN = Outcome(0, ())


@dataclass(frozen=True)
class Left:
    """What a run has left, for its card and its report.

    Attributes:
        outcome: how it ended.
        words: files of its new words.
        below: adapters that are part of its base.
        exports: what the adapter was written as too.
    """

    outcome: Outcome = _UNKNOWN
    words: Sequence[Path] = ()
    below: Sequence[Below] = ()
    exports: Sequence[Exported] = ()


def run_card(config: TrainConfig, left: Left, pictures: Sequence[str] = ()) -> str:
    """A model card: YAML that hub pages read, and Markdown.

    Args:
        config: of the run.
        left: what it left.
        pictures: one for each preview prompt, relative to the card.
    """
    adapter, prompt = config.adapter, config.data.instance_prompt
    made = f"rank {adapter.rank}, alpha {adapter.alpha:g}, " if _has_adapter(config) else ""
    spelt = ", ".join(map(code, config.words.starts))
    made += f"new words {spelt}, " if spelt else ""
    outcome = left.outcome
    measured = "held-out pictures" if outcome.is_held_out else "pictures that were trained"
    said = f"instance prompt {code(prompt)}" if prompt else "captions beside the images"
    by = "" if config.optim.optimizer == "adamw" else f"optimiser {config.optim.optimizer}, "
    losses = "\n".join(f"| {step} | {loss:.4f} |" for step, loss in outcome.losses)
    return f"""{front_matter(config, pictures)}
# {kind_of(config)} on {code(base_name(config))}

Trained by dora_diffusion: {made}{outcome.steps or config.optim.steps} steps of
batch {config.optim.batch_size} x {config.optim.gradient_accumulation}, {by}learning rate {config.optim.rate:g},
{said}. Everything else stands in `config.yaml`; `report.html` shows the way.
{_on_top_of(config, left.below)}{_to_pure_noise(config)}
{code_block(_command(config, left.words), "bash")}
{_exports(left.exports)}
| step | loss on fixed noise, of {measured} |
| --- | --- |
{losses}
{_end(config, outcome)}"""


def _end(config: TrainConfig, outcome: Outcome) -> str:
    """How it ended, where that is not simply after its last step."""
    lines = []
    if outcome.ended_early:
        patience = config.validation.patience
        lines.append(f"It ended after {outcome.steps} of {config.optim.steps} steps: {patience} measurements in a row")
        lines.append("were no better than the best before.")
    if outcome.best is not None:
        is_final = "and what `adapter.safetensors` is" if config.checkpoint.final == "best" else "kept in `checkpoints`"
        lines.append(f"The best was step {outcome.best.step}, loss {outcome.best.loss:.4f}, {is_final}.")
    return "".join(f"\n{line}" for line in lines) + ("\n" if lines else "")


def _to_pure_noise(config: TrainConfig) -> str:
    """What must be set to draw what was trained."""
    if not config.loss.zero_terminal_snr:
        return ""
    return """
It was trained down to pure noise (zero terminal SNR, arXiv 2305.08891). Draw it with v_prediction and a scheduler of
`rescale_betas_zero_snr=True` and `timestep_spacing="trailing"`; in ComfyUI that is `ModelSamplingDiscrete` with zsnr.
Otherwise pictures are neither as dark nor as bright as they could be.
"""


def kind_of(config: TrainConfig) -> str:
    """What was trained, in words."""
    if not _has_adapter(config):
        return "New words"
    return "DoRA adapter" if config.adapter.use_dora else "LoRA adapter"


def _has_adapter(config: TrainConfig) -> bool:
    return bool(config.adapter.train_unet or config.adapter.train_text_encoder)


def _command(config: TrainConfig, words: Sequence[Path]) -> str:
    """How to draw with it, to be pasted into a shell."""
    files = ["--adapter adapter.safetensors:1.0"] if _has_adapter(config) else []
    files += [f"--words words/{shlex.quote(path.name)}" for path in words]
    own = [config.data.instance_prompt, ", ".join(trigger_words(config)), "as the captions have it"]
    example = next(text for text in [*(one.prompt for one in config.preview.prompts), *own] if text)
    model, prompt = shlex.quote(base_name(config)), shlex.quote(one_line(example))
    return f"dora-diffusion generate --model {model} {' '.join(files)} \\\n    --prompt {prompt} --output out.png"


def _exports(exports: Sequence[Exported]) -> str:
    if not exports:
        return ""
    rows = "\n".join(f"- {code(f'{each.path.parent.name}/{each.path.name}')}: {each.line}" for each in exports)
    return f"\nThe same in other formats:\n\n{rows}\n"


def front_matter(config: TrainConfig, pictures: Sequence[str] = ()) -> str:
    """The YAML block that hub pages read; the licence is its author's to name."""
    kind = "dora" if config.adapter.use_dora else "lora"
    tags = ["text-to-image", "diffusers", *(["lora"] if _has_adapter(config) else []), "template:sd-lora"]
    tags += ["dora"] if _has_adapter(config) and kind == "dora" else []
    tags += ["textual_inversion"] if config.words.starts else []
    triggers = trigger_words(config)
    repository = config.model.partition("@")[0]
    found: dict[str, Any] = {
        # a page refuses a name that is no repository's
        **({"base_model": repository, "base_model_relation": "adapter"} if _is_hub_id(config.model) else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": tags,
        **({"instance_prompt": one_line(", ".join(triggers))} if triggers else {}),
    }
    if pictures:
        shown = zip(config.preview.prompts, pictures, strict=True)
        found["widget"] = [{"text": one_line(one.prompt), "output": {"url": url}} for one, url in shown]
    text = yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n# license: name it here, as the hub spells it, such as openrail++ or apache-2.0\n{text}---\n"


def _is_hub_id(model: str) -> bool:
    return may_be_hub_id(model) and not Path(model).exists()


def one_line(text: str) -> str:
    """Text of strangers without breaks of lines."""
    return " ".join(encodable(text).split())


def code(text: str) -> str:
    """Text of strangers as a code span of Markdown, on one line, whatever it holds."""
    line = one_line(text)
    ticks = _fence(line, 1)
    edge = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{edge}{line}{edge}{ticks}"


def code_block(text: str, language: str) -> str:
    """Text of strangers as a block of code, whatever it holds."""
    fence = _fence(text, 3)
    return f"{fence}{language}\n{encodable(text)}\n{fence}"


def _fence(text: str, least: int) -> str:
    """More backticks than the text has in a row."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _on_top_of(config: TrainConfig, below: Sequence[Below]) -> str:
    """What a reader must have below the adapter to draw what was trained."""
    if not below:
        return ""
    rows = "\n".join(f"- {code(each.name)} at {each.strength:g}, SHA-256 `{each.sha256}`" for each in below)
    files = " ".join(f"--adapter {shlex.quote(f'{each.name}:{each.strength:g}')}" for each in below)
    bake = code(f"dora-diffusion bake {shlex.quote(base_name(config))} BASE {files}")
    return f"""
It was trained on top of these, which are part of its base:

{rows}

To draw what was trained, bake them into the base first, and name that as the model:
{bake}. On the base alone the adapter draws what was learnt
with what they change left out, which is what an adapter that undoes a distillation is for.
"""
