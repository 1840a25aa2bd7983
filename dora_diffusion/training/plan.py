"""`train --dry-run`: what a config would do, without doing it."""

from dora_diffusion.training.config import TrainConfig


def describe_plan(config: TrainConfig) -> str:
    """The plan of a run in a few lines; raises what the run itself would about data, base and targets."""
    import torch

    from dora_diffusion.training.dataset import checked_examples
    from dora_diffusion.training.subject import load_base, prepare_subject, trainable_count

    examples = checked_examples(config).train
    subject = prepare_subject(load_base(config, torch.device("cpu")), config)
    optim = config.optim
    seen = optim.steps * optim.batch_size * optim.gradient_accumulation
    lines = [
        f"base       {config.model} ({subject.family.name})",
        f"images     {len(examples)} in {config.data.instance_dir}, each seen about {seen / len(examples):.0f} times",
        *(f"adapter    {name}: {len(part.matched)} layers" for name, part in subject.injections.items()),
        f"trained    {trainable_count(subject.parameters()):,} numbers",
        f"steps      {optim.steps} of {optim.batch_size} x {optim.gradient_accumulation}, seed {optim.seed}",
        f"prior      {', '.join(config.prior.prompts) or 'none'}",
        f"output     {config.output_dir}",
    ]
    return "\n".join(lines)
