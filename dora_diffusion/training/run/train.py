"""`train`: what a run needs is checked and loaded, then its loop runs."""

from dataclasses import replace

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dora_diffusion.training.base.below import lay_below
from dora_diffusion.training.base.sizes import sizes_of
from dora_diffusion.training.base.trainable import PRECISIONS, load_base, prepare_trainable
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.buckets import in_buckets
from dora_diffusion.training.data.concepts import checked_examples, opened
from dora_diffusion.training.data.examples import check_words
from dora_diffusion.training.run.card import base_lines
from dora_diffusion.training.run.loop import Run, TrainResult
from dora_diffusion.training.step.objective import Objectives
from dora_diffusion.training.step.priors import ensure_class_examples
from dora_diffusion.utils.atomic import recover


def train(config: TrainConfig, *, resume: str | None = None) -> TrainResult:
    """Train an adapter as `config` says and write its run folder.

    Args:
        config: checked settings.
        resume: "latest" goes on from the newest valid checkpoint of the run folder; None starts anew.

    Raises:
        ValueError: data, settings or checkpoint are not usable; one line that says which and how to mend it.
        KeyboardInterrupt: Ctrl+C, SIGTERM or SIGHUP came; after the step that was under way, and a checkpoint of it.

    Examples:
        ```python
        import dora_diffusion as dd

        config = dd.TrainConfig.from_yaml("subject.yaml")
        result = dd.train(config)
        print(f"{result.steps} steps, wrote {result.adapter}")
        ```
    """
    if resume not in (None, "latest"):
        raise ValueError(f"resume={resume!r}: expected 'latest'")
    folder = config.output_dir
    recover(folder / "checkpoints")
    if resume is None and any(folder.glob("checkpoints/step-*")):
        raise ValueError(
            f"{folder}: holds checkpoints of an earlier run; resume it with --resume latest or choose another"
        )
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    accelerator = Accelerator(
        mixed_precision=config.optim.mixed_precision, log_with="tensorboard", project_dir=str(folder / "logs")
    )
    instances, held_out, own_classes = checked_examples(config.data, seed=config.optim.seed)
    check_words(config.words.starts, instances)
    pipe = load_base(config.model, PRECISIONS[config.optim.mixed_precision], accelerator.device, config.base)
    below = lay_below(pipe, config.base.adapters)
    sizes = sizes_of(pipe)
    instances, held_out = (in_buckets(part, config.data, sizes) for part in (instances, held_out))
    objectives = Objectives(pipe, config.optim, config.flow)
    objectives.of(instances[0].size)  # raises for a scheduler that cannot be trained, before anything is drawn
    rank, ranks = accelerator.process_index, accelerator.num_processes
    drawn = ensure_class_examples(pipe, config, process=rank, processes=ranks)
    classes = in_buckets([*own_classes, *opened(drawn)], config.data, sizes)
    goes_on = resume is not None and any(folder.glob("checkpoints/step-*"))
    trainable = replace(prepare_trainable(pipe, config, from_start=not goes_on), below=below)
    if accelerator.is_main_process:
        for line in base_lines(pipe, config, trainable.below, trainable.started):
            print(line)
    try:
        return Run(config, accelerator, trainable, objectives, instances, classes, held_out).go(resume is not None)
    finally:
        trainable.eject()
