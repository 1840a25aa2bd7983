"""What a run says of itself: its README.md, and the metadata of its adapter."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dora_diffusion._version import __version__
from dora_diffusion.families import Family
from dora_diffusion.families.distilled import distilled_kind
from dora_diffusion.training.base.below import Below
from dora_diffusion.training.config import TrainConfig


def base_lines(pipe: Any, config: TrainConfig, below: Sequence[Below], started: str) -> list[str]:
    """What a run says of its base and its start before the first step."""
    kind = None if config.base.adapters else distilled_kind(pipe, config.model)
    warning = [] if kind is None else [f"warning    the base is {kind.name} ({kind.evidence}): {kind.instead}"]
    lines = [*(f"below      {each.line()}" for each in below), *([f"start      {started}"] if started else [])]
    return [*warning, *lines]


def run_card(
    config: TrainConfig,
    validation: Sequence[tuple[int, float]],
    words: Sequence[Path] = (),
    below: Sequence[Below] = (),
) -> str:
    """A model card in Markdown.

    Args:
        config: of the run.
        validation: (step, loss) pairs.
        words: files of its new words.
        below: adapters that are part of its base.
    """
    adapter = config.adapter
    has_adapter = bool(adapter.train_unet or adapter.train_text_encoder)
    kind = ("DoRA adapter" if adapter.use_dora else "LoRA adapter") if has_adapter else "New words"
    made = f"rank {adapter.rank}, alpha {adapter.alpha:g}, " if has_adapter else ""
    spelt = ", ".join(f"`{word}`" for word in config.words.starts)
    made += f"new words {spelt}, " if spelt else ""
    files = ["--adapter adapter.safetensors:1.0"] if has_adapter else []
    files += [f"--words words/{path.name}" for path in words]
    prompt = config.data.instance_prompt or "(captions beside the images)"
    by = "" if config.optim.optimizer == "adamw" else f"optimiser {config.optim.optimizer}, "
    losses = "\n".join(f"| {step} | {loss:.4f} |" for step, loss in validation)
    example = config.preview.prompts[0] if config.preview.prompts else prompt
    return f"""# {kind} on `{config.model}`

Trained by dora_diffusion: {made}{config.optim.steps} steps of
batch {config.optim.batch_size} x {config.optim.gradient_accumulation}, {by}learning rate {config.optim.rate:g},
instance prompt `{prompt}`. Everything else stands in `config.yaml`; `samples/strip.png` shows the way.
{_on_top_of(config, below)}
```
dora-diffusion generate --model {config.model} {" ".join(files)} \\
    --prompt "{example}" --output out.png
```

| step | loss on fixed noise |
| --- | --- |
{losses}
"""


def _on_top_of(config: TrainConfig, below: Sequence[Below]) -> str:
    """What a reader must have below the adapter to draw what was trained."""
    if not below:
        return ""
    rows = "\n".join(f"- `{each.name}` at {each.strength:g}, SHA-256 `{each.sha256}`" for each in below)
    files = " ".join(f"--adapter {each.name}:{each.strength:g}" for each in below)
    return f"""
It was trained on top of these, which are part of its base:

{rows}

To draw what was trained, bake them into the base first, and name that as the model:
`dora-diffusion bake {config.model} BASE {files}`. On the base alone the adapter draws what was learnt
with what they change left out, which is what an adapter that undoes a distillation is for.
"""


def adapter_metadata(config: TrainConfig, family: Family, *, step: int, below: Sequence[Below] = ()) -> dict[str, str]:
    """What a reader of the file should know, as strings."""
    facts = {
        "version": __version__,
        "family": family.name,
        # the name only: a path tells strangers about the user's machine
        "base_model": Path(config.model).name if Path(config.model).is_absolute() else config.model,
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
