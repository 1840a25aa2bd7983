"""What a run says of itself: its README.md, and the metadata of its adapter."""

from collections.abc import Sequence
from pathlib import Path

from dora_diffusion._version import __version__
from dora_diffusion.families import Family
from dora_diffusion.training.config import TrainConfig


def run_card(config: TrainConfig, validation: Sequence[tuple[int, float]], words: Sequence[Path] = ()) -> str:
    """A model card in Markdown, from the run's config, its validation losses (step, loss) and its new words' files."""
    adapter = config.adapter
    has_adapter = bool(adapter.train_unet or adapter.train_text_encoder)
    kind = ("DoRA adapter" if adapter.use_dora else "LoRA adapter") if has_adapter else "New words"
    made = f"rank {adapter.rank}, alpha {adapter.alpha:g}, " if has_adapter else ""
    spelt = ", ".join(f"`{word}`" for word in config.words.starts)
    made += f"new words {spelt}, " if spelt else ""
    files = ["--adapter adapter.safetensors:1.0"] if has_adapter else []
    files += [f"--words words/{path.name}" for path in words]
    prompt = config.data.instance_prompt or "(captions beside the images)"
    losses = "\n".join(f"| {step} | {loss:.4f} |" for step, loss in validation)
    example = config.preview.prompts[0] if config.preview.prompts else prompt
    return f"""# {kind} on `{config.model}`

Trained by dora_diffusion: {made}{config.optim.steps} steps of
batch {config.optim.batch_size} x {config.optim.gradient_accumulation}, learning rate {config.optim.learning_rate:g},
instance prompt `{prompt}`. Everything else stands in `config.yaml`; `samples/strip.png` shows the way.

```
dora-diffusion generate --model {config.model} {" ".join(files)} \\
    --prompt "{example}" --output out.png
```

| step | loss on fixed noise |
| --- | --- |
{losses}
"""


def adapter_metadata(config: TrainConfig, family: Family, *, step: int) -> dict[str, str]:
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
    return {f"dora_diffusion.{name}": value for name, value in facts.items()}
