"""`train`: what a run needs is checked and loaded, then its loop runs."""

import os
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from dora_diffusion.families import family_of_pipeline
from dora_diffusion.training.base.below import lay_below
from dora_diffusion.training.base.borrowed import borrowed
from dora_diffusion.training.base.devices import accelerate_on, device_for, with_precision
from dora_diffusion.training.base.placement import Placement
from dora_diffusion.training.base.sharded import shard_base
from dora_diffusion.training.base.sizes import Sizes, sizes_of
from dora_diffusion.training.base.trainable import PRECISIONS, load_base, prepare_trainable, quantise_base
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.buckets import in_buckets
from dora_diffusion.training.data.concepts import Split, checked_examples, opened
from dora_diffusion.training.data.examples import check_words
from dora_diffusion.training.processes import processes_of
from dora_diffusion.training.run.callbacks import Callbacks, TrainingCallback
from dora_diffusion.training.run.card import base_lines
from dora_diffusion.training.run.checkpoint import Saved, newest
from dora_diffusion.training.run.exhausted import told_of_memory
from dora_diffusion.training.run.exports import check_exports
from dora_diffusion.training.run.finish import TrainResult, finished_result
from dora_diffusion.training.run.folder import holds_checkpoints, run_lock
from dora_diffusion.training.run.identity import (
    Identity,
    base_identity,
    below_identity,
    examples_identity,
    pictures_identity,
)
from dora_diffusion.training.run.launch import Launched, as_plain_processes, check_launch, check_sharded
from dora_diffusion.training.run.loop import Run
from dora_diffusion.training.run.parts import parts_of
from dora_diffusion.training.run.previews import check_previews
from dora_diffusion.training.run.resumption import Comparison, Place, extended, find_saved
from dora_diffusion.training.run.trackers import check_trackers
from dora_diffusion.training.step.objective import Objectives, with_zero_terminal_snr
from dora_diffusion.training.step.optimisers import check_optimizer
from dora_diffusion.training.step.priors import ensure_class_examples
from dora_diffusion.utils.atomic import recover


@dataclass(frozen=True)
class _Wanted:
    """What is asked for beside the config: to go on, and how."""

    resume: bool
    extend: int | None
    accept_changes: bool

    @property
    def extends(self) -> bool:
        """Whether the run goes on beyond its end."""
        return self.extend is not None


def train(
    config: TrainConfig,
    *,
    resume: str | None = None,
    extend: int | None = None,
    accept_changes: bool = False,
    pipeline: Any = None,
    callbacks: Sequence[TrainingCallback] = (),
) -> TrainResult:
    """Train an adapter as `config` says and write its run folder.

    Args:
        config: checked settings.
        resume: "latest" goes on from the newest valid checkpoint of the run folder; None starts anew. A run that has
            come to its end is left as it is.
        extend: go on from the newest checkpoint to so many steps in all, `optim.steps` notwithstanding; schedules of
            the learning rate are those of a run of that many steps from there on.
        accept_changes: go on although settings, pictures, captions, masks or the base are not what they were; the
            next checkpoints note what had changed.
        pipeline: a diffusers pipeline to train on, instead of loading `config.model`, which then only names it. The run
            moves it to its device and precision, and leaves it as it was.
        callbacks: what hears of steps, previews, checkpoints and the end.

    Raises:
        ValueError: data, settings, folder or checkpoint are not usable, or another run trains in the folder; one line
            that says which and how to mend it. Or a callback failed, which the line names; a checkpoint is there then.
        KeyboardInterrupt: Ctrl+C, SIGTERM or SIGHUP came; after the step that was under way, and a checkpoint of it.

    Examples:
        ```python
        import dora_diffusion as dd

        config = dd.TrainConfig.from_yaml("subject.yaml")
        result = dd.train(config)
        print(f"{result.steps} steps, wrote {result.adapter}")
        ```
    """
    wanted = _wanted(resume, extend, accept_changes)
    trackers = check_trackers(config.logging)
    shards = check_launch(os.environ)
    device = device_for(config.device)
    config = with_precision(config, device, before=_precision_before(config, wanted))
    with accelerate_on(device), as_plain_processes():
        accelerator = Accelerator(
            mixed_precision=config.optim.mixed_precision,
            cpu=device.type == "cpu",
            log_with=[*trackers] or None,
            project_dir=str(config.output_dir / "logs"),
            # said outright, or an environment variable of accelerate's would divide the gradients once more
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
    shards = shards and accelerator.num_processes > 1
    if shards:
        check_sharded(config, pipeline)
    called = Callbacks(callbacks, are_called=accelerator.is_main_process)
    with run_lock(config.output_dir) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        launched = Launched(accelerator, processes_of(accelerator, in_step=shards))
        with told_of_memory(config):
            return _train(config, launched, wanted, pipeline=pipeline, callbacks=called)


def check_start(
    config: TrainConfig, *, resume: str | None = None, extend: int | None = None, accept_changes: bool = False
) -> None:
    """Raise what `train` would of a run's folder, checkpoint and settings, before anything is loaded."""
    wanted = _wanted(resume, extend, accept_changes)
    device = device_for(config.device)
    saved = _saved(config, wanted)
    config = with_precision(config, device, before=_precision_before(config, wanted))
    if saved is not None:
        config = config if extend is None else extended(config, saved, extend)
        _comparison(saved, config, Place(1, device.type), wanted=wanted)


def _wanted(resume: str | None, extend: int | None, accept_changes: bool) -> _Wanted:
    if resume not in (None, "latest"):
        raise ValueError(f"resume={resume!r}: expected 'latest'")
    wanted = _Wanted(resume is not None or extend is not None, extend, accept_changes)
    if accept_changes and not wanted.resume:
        raise ValueError("--accept-changes: a run that starts anew has nothing to compare; expected --resume latest")
    return wanted


@dataclass(frozen=True)
class _Begun:
    """What is known of a run before its base is at hand.

    Attributes:
        config: of the run, its steps as they are to be.
        saved: what it goes on from.
        comparison: with that.
        split: the pictures.
        identity: of what is known.
    """

    config: TrainConfig
    saved: Saved | None
    comparison: Comparison | None
    split: Split
    identity: Identity


def _train(
    config: TrainConfig, launched: Launched, wanted: _Wanted, *, pipeline: Any, callbacks: Callbacks
) -> TrainResult:
    """The run in its folder, which is this run's alone."""
    accelerator = launched.accelerator
    begun = _begun(config, accelerator, wanted)
    if begun.saved is not None:
        finished = finished_result(begun.config, begun.saved)
        if finished is not None and not (finished.ended_early and wanted.extends):
            accelerator.print(f"{config.output_dir}: {_end_of(finished)} and is left as it is")
            return finished
    dtype = PRECISIONS[config.optim.mixed_precision]
    with ExitStack() as giving_back:
        if pipeline is None:
            pipe = load_base(config.model, dtype, config.base)
        else:
            pipe = giving_back.enter_context(borrowed(pipeline, dtype, accelerator.device, config.base))
        return _train_on(pipe, begun, launched, callbacks, extends=wanted.extends)


def _begun(config: TrainConfig, accelerator: Accelerator, wanted: _Wanted) -> _Begun:
    """Look at folder, settings and pictures."""
    saved = _saved(config, wanted)
    if saved is not None and wanted.extend is not None:
        config = extended(config, saved, wanted.extend)
    place = Place(accelerator.num_processes, accelerator.device.type)
    comparison = None if saved is None else _comparison(saved, config, place, wanted=wanted)
    check_optimizer(config.optim)
    split = checked_examples(config.data, seed=config.optim.seed)
    check_words(config.words.starts, split.train)
    identity = Identity({"pictures": pictures_identity(config, split), "base.adapters": below_identity(config)})
    if comparison is not None:
        comparison.check_parts(identity)
    return _Begun(config, saved, comparison, split, identity)


def _end_of(finished: TrainResult) -> str:
    if finished.ended_early:
        return f"ended early, after {finished.steps} steps (validation.patience; --extend goes on),"
    return f"has done all of its {finished.steps} steps"


def _train_on(pipe: Any, begun: _Begun, launched: Launched, callbacks: Callbacks, *, extends: bool) -> TrainResult:
    """The run on its base."""
    config, split, comparison = begun.config, begun.split, begun.comparison
    accelerator = launched.accelerator
    base = base_identity(pipe)
    below = lay_below(pipe, config.base.adapters)
    quantise_base(pipe, config.base, accelerator.device)
    if launched.processes.in_step:
        accelerator.print(shard_base(pipe, accelerator.device))
    objectives = Objectives(pipe, config.optim, config.flow, config.loss)
    sized = _sized(split, config, sizes_of(pipe))
    objectives.of(sized.train[0].size)  # raises for a scheduler that cannot be trained, before anything is drawn
    check_previews(pipe, config.preview)
    if config.loss.zero_terminal_snr:
        pipe.scheduler = with_zero_terminal_snr(pipe.scheduler)
    spread = [family_of_pipeline(pipe).denoiser.name] if launched.processes.in_step else []
    with Placement(pipe, accelerator.device, fixed=spread).drawing():
        drawn = ensure_class_examples(pipe, config, processes=launched.processes)
    late = {"class pictures": examples_identity(config, [("class", one) for one in drawn]), "base": base}
    identity = Identity({**begun.identity.parts, **late})
    if comparison is not None:
        comparison.check_parts(Identity(late))
        identity = comparison.noted(identity)
        accelerator.print(comparison.message())
    sized = _sized(split._replace(classes=(*split.classes, *opened(drawn))), config, sizes_of(pipe))
    device = accelerator.device
    trainable = replace(prepare_trainable(pipe, config, device=device, from_start=begun.saved is None), below=below)
    for line in base_lines(pipe, config, trainable.below, trainable.started):
        accelerator.print(line)
    try:
        check_exports(config, trainable)
        parts = parts_of(
            config, launched, trainable, objectives, examples=sized, identity=identity, callbacks=callbacks
        )
        return Run(config, accelerator, parts).go(begun.saved, extends=extends)
    finally:
        trainable.eject()


def _saved(config: TrainConfig, wanted: _Wanted) -> Saved | None:
    """What the run goes on from; None for one that starts anew, which must not write over another's checkpoints."""
    folder = config.output_dir
    recover(folder / "checkpoints")
    if wanted.resume:
        return find_saved(config)
    if holds_checkpoints(folder):
        raise ValueError(
            f"{folder}: holds checkpoints of an earlier run; resume it with --resume latest or choose another"
        )
    return None


def _precision_before(config: TrainConfig, wanted: _Wanted) -> str | None:
    """In which precision a run that goes on has been trained."""
    with suppress(ValueError):  # which is raised where the checkpoints are looked at for their own sake
        saved = newest(config.output_dir / "checkpoints") if wanted.resume else None
        return None if saved is None else saved.precision
    return None


def _comparison(saved: Saved, config: TrainConfig, place: Place, *, wanted: _Wanted) -> Comparison:
    """The comparison with what was saved, its settings compared."""
    comparison = Comparison(
        saved,
        config,
        place,
        accept=wanted.accept_changes,
        extends=wanted.extend is not None,
    )
    comparison.check_settings()
    return comparison


def _sized(split: Split, config: TrainConfig, sizes: Sizes) -> Split:
    """The examples with the sizes that they are trained at."""
    train, validation, classes = (in_buckets(list(part), config.data, sizes) for part in split)
    return Split(train, validation, tuple(classes))
