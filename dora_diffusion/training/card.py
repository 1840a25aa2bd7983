"""The README.md of a run folder: what was trained on what, and how to use it."""

from collections.abc import Sequence

from dora_diffusion.training.config import TrainConfig


def run_card(config: TrainConfig, validation: Sequence[tuple[int, float]]) -> str:
    """A model card in Markdown, from the run's config and its validation losses (step, loss)."""
    kind = "DoRA" if config.adapter.use_dora else "LoRA"
    prompt = config.data.instance_prompt or "(captions beside the images)"
    losses = "\n".join(f"| {step} | {loss:.4f} |" for step, loss in validation)
    example = config.preview.prompts[0] if config.preview.prompts else prompt
    return f"""# {kind} adapter on `{config.model}`

Trained by dora_diffusion: rank {config.adapter.rank}, alpha {config.adapter.alpha:g}, {config.optim.steps} steps of
batch {config.optim.batch_size} x {config.optim.gradient_accumulation}, learning rate {config.optim.learning_rate:g},
instance prompt `{prompt}`. Everything else stands in `config.yaml`; `samples/strip.png` shows the way.

```
dora-diffusion generate --model {config.model} --adapter adapter.safetensors:1.0 \\
    --prompt "{example}" --output out.png
```

| step | loss on fixed noise |
| --- | --- |
{losses}
"""
