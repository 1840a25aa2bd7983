"""`doctor`, `train`, `evaluate`: what needs pictures; `import-config`: what others train with, as ours."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.cli.arguments import add_device, progress
from dora_diffusion.utils.console import typed_text

if TYPE_CHECKING:
    from dora_diffusion.training.config import TrainConfig
    from dora_diffusion.training.data.doctor import DoctorReport


# So few pictures are looked at in a moment.
_MANY = 200


def add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.description = "Check an image set. Exit status 1 when something would be lost in training."
    parser.add_argument("dataset", type=Path, help="folder of pictures, or the YAML file of a run, for all its folders")
    parser.add_argument("--instance-prompt", type=typed_text, help="caption of pictures that have none of their own")
    parser.add_argument("--model", type=typed_text, help="base to train: its buckets, and words that it does not read")
    parser.add_argument("--resolution", type=int, nargs="+", default=[], metavar="N", help="sides to train at")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="write a sheet of what is kept of each picture")
    parser.set_defaults(handler=_doctor)


def _doctor(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from dora_diffusion.training.data.doctor import format_report

    folder: Path = arguments.dataset
    is_config = folder.is_file()
    if arguments.sheet is not None and not (is_config or arguments.model or arguments.resolution):
        raise ValueError(f"--sheet {arguments.sheet}: needs --model or --resolution, or the YAML file of a run")
    report, with_masks = (_of_config if is_config else _of_folder)(arguments)
    print(format_report(report))
    if arguments.sheet is not None:
        from dora_diffusion.training.data.doctor.contact_sheet import write_contact_sheet

        left_out = write_contact_sheet(report, arguments.sheet, with_masks=with_masks)
        print(f"wrote {arguments.sheet}" + (f", {left_out} pictures left out" if left_out else ""))
    return 1 if report.losses else 0


def _of_folder(arguments: argparse.Namespace) -> "tuple[DoctorReport, bool]":
    from dora_diffusion.training.data.doctor import examine

    with _bar_of_many() as advance:
        report = examine(
            arguments.dataset,
            instance_prompt=arguments.instance_prompt,
            model=arguments.model,
            resolutions=arguments.resolution,
            progress=advance,
        )
    return report, False


def _of_config(arguments: argparse.Namespace) -> "tuple[DoctorReport, bool]":
    """A run's folders; what is said beside its YAML stands for what is said in it."""
    from dora_diffusion.training.config import TrainConfig
    from dora_diffusion.training.data.doctor import examine_config

    said = {
        "model": arguments.model,
        "data.instance_prompt": arguments.instance_prompt,
        "data.resolution": str(arguments.resolution) if arguments.resolution else None,
    }
    overrides = {key: value for key, value in said.items() if value is not None}
    config = TrainConfig.from_yaml(arguments.dataset, overrides)
    with _bar_of_many() as advance:
        return examine_config(config, progress=advance), config.data.mask_outside is not None


@contextmanager
def _bar_of_many() -> Iterator[Callable[[int, int], None]]:
    """A bar, where there are so many pictures that it takes a while."""
    with progress("looking", unit="picture") as advance:
        yield lambda done, total: advance(done, total) if total >= _MANY else None


def add_train(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "dora-diffusion train CONFIG.yaml [CONFIG.yaml ...] [--resume latest | --extend STEPS] [--accept-changes] "
        "[--dry-run [--memory GIB]] [--section.key value ...]"
    )
    parser.description = (
        "Train an adapter. Any setting of the file can be overridden: --optim.steps 400. Several files are a queue: "
        "all are checked first, then each is trained in a process of its own, with the same flags. A run that fails "
        "does not keep the others; Ctrl+C saves a checkpoint of the run under way and ends the queue. Exit status 1 "
        "when any failed."
    )
    parser.add_argument("config", type=Path, nargs="+", help="YAML files; see examples/")
    parser.add_argument(
        "--resume",
        choices=["latest"],
        help="go on from the newest valid checkpoint; in a queue, runs without one begin, finished ones are left",
    )
    parser.add_argument(
        "--extend", type=int, metavar="STEPS", help="go on from the newest valid checkpoint to so many steps in all"
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on although settings, pictures, captions or the base have changed; noted in the next checkpoint",
    )
    parser.add_argument("--dry-run", action="store_true", help="check data and settings, print the plan, train nothing")
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help="with --dry-run: find the settings with which it fits a GPU of so much memory, such as 8, 12, 16 or 24",
    )
    parser.add_argument(
        "--end-with-stdin",
        action="store_true",
        help="end as Ctrl+C does, with a checkpoint, when standard input closes; for programs that start a run",
    )
    parser.set_defaults(handler=_train, takes_settings=True)


def _train(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from dora_diffusion.training.config import TrainConfig
    from dora_diffusion.training.run.signals import end_with_stdin

    if arguments.end_with_stdin:
        end_with_stdin()
    _check_memory(arguments)
    paths: list[Path] = arguments.config
    overrides = TrainConfig.parse_overrides(rest)
    configs = {path: TrainConfig.from_yaml(path, overrides) for path in paths}
    if len(configs) < len(paths):
        raise ValueError(f"{next(path for path in paths if paths.count(path) > 1)}: named twice; expected it once")
    if len(configs) > 1:
        return _train_queue(configs, arguments, rest)
    (config,) = configs.values()
    if arguments.dry_run:
        from dora_diffusion.training.run.dry_run import describe_plan

        print(describe_plan(config, memory=arguments.memory))
        return 0
    from dora_diffusion.training.run.train import train

    result = train(config, resume=arguments.resume, extend=arguments.extend, accept_changes=arguments.accept_changes)
    if result.validation:
        (_, before), (_, after) = result.validation[0], result.validation[-1]
        print(f"loss on fixed noise: {before:.4f} before, {after:.4f} after {result.steps} steps")
    if result.best is not None:
        step, loss = result.best
        print(f"best: {loss:.4f} after {step} steps" + (", ended early" if result.ended_early else ""))
    for path in (result.adapter, *result.words):
        if path is not None:
            print(f"{'wrote' if result.is_new else 'holds'} {path}")
    for exported in result.exports:
        print(f"wrote {exported.path}\n      {exported.line}")
    return 0


def _check_memory(arguments: argparse.Namespace) -> None:
    if arguments.memory is not None and not (arguments.dry_run and 1 <= arguments.memory <= 1024):
        raise ValueError(f"--memory: got {arguments.memory:g}, expected 1 to 1024 GiB, beside --dry-run")


def _train_queue(configs: "Mapping[Path, TrainConfig]", arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Everything is checked before the first run begins; 0 when all are done, 1 when not, 130 after a stop."""
    from dora_diffusion.training.run.dry_run import describe_plan
    from dora_diffusion.training.run.queue import check_queue, queue_of, run_queue, summary

    if arguments.accept_changes and arguments.resume is None and arguments.extend is None:
        raise ValueError("--accept-changes: runs that start anew have nothing to compare; expected --resume latest")
    runs = queue_of(
        configs,
        resume=arguments.resume,
        extend=arguments.extend,
        accept_changes=arguments.accept_changes,
        settings=rest,
    )
    check_queue(runs)
    if arguments.dry_run:
        print(
            "\n\n".join(f"queue      {run.file}\n{describe_plan(run.config, memory=arguments.memory)}" for run in runs)
        )
        return 0
    ended = run_queue(runs)
    print(summary(runs, ended))
    words = {end.word for end in ended}
    return 130 if words & {"stopped", "waits"} else 1 if "failed" in words else 0


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Score the adapter that a config trained against its truth pictures; writes a report and a grid."
    )
    parser.add_argument("config", type=Path, help="the YAML it was trained with; needs evaluation.truth_dir")
    add_device(parser)
    parser.set_defaults(handler=_evaluate, takes_settings=True)


def _evaluate(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from dora_diffusion.training.config import TrainConfig

    config = TrainConfig.from_yaml(arguments.config, TrainConfig.parse_overrides(rest))
    truth_dir, adapter = config.evaluation.truth_dir, config.output_dir / "adapter.safetensors"
    words = sorted((config.output_dir / "words").glob("*.safetensors")) if config.words.starts else []
    if truth_dir is None:
        raise ValueError(f"{arguments.config}: evaluation.truth_dir is not set; name a folder of true pictures")
    if not adapter.is_file() and not words:
        raise ValueError(f"{adapter}: no such file; train first: dora-diffusion train {arguments.config}")
    from dora_diffusion.evaluate.adapter import Truth, evaluate_adapter
    from dora_diffusion.training.data.examples import find_examples
    from dora_diffusion.utils.images import read_image

    examples = find_examples(truth_dir, instance_prompt=config.data.instance_prompt)
    truths = [Truth(read_image(example.path), example.caption) for example in examples]
    output = config.output_dir / "evaluation"
    scores = evaluate_adapter(
        adapter if adapter.is_file() else None,
        truths,
        output,
        model=config.model,
        seeds=config.evaluation.seeds,
        words=words,
        device=arguments.device,
    )
    print(
        f"likeness to the truth: {scores.before:.2f} before, {scores.after:.2f} after "
        f"(floor {scores.floor:.2f}, ceiling {scores.ceiling:.2f}; {scores.count} pictures each)"
    )
    print(f"wrote {output / 'report.json'} and {output / 'grid.png'}")
    return 0


def add_import_config(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make our training YAML of another trainer's file: kohya's sd-scripts (training TOML, dataset TOML, GUI JSON), "
        "ai-toolkit, OneTrainer, a command of diffusers' train_dreambooth_lora*.py. A line for each of its keys says "
        "what became of it. docs/moving.md has the options side by side."
    )
    parser.add_argument("source", type=Path, metavar="FILE")
    parser.add_argument(
        "--output", type=Path, metavar="OUT.yaml", help="default: FILE's name with -dora.yaml, beside it"
    )
    parser.set_defaults(handler=_import_config)


def _import_config(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from dora_diffusion.training.import_config import read_config, write_config
    from dora_diffusion.training.import_config.report import report

    source: Path = arguments.source
    output: Path = arguments.output or source.with_name(f"{source.stem}-dora.yaml")
    if output.is_dir():
        raise ValueError(f"--output {output}: a folder; expected the name of a YAML file")
    if arguments.output is None and output.exists():
        raise ValueError(f"{output}: is there already; name another with --output, or the same to write over it")
    if output.exists() and source.exists() and output.samefile(source):
        raise ValueError(f"--output {output}: the file that is read; expected another")
    imported = read_config(source, output=output)
    print(report(imported))
    write_config(imported, output, source=source)
    print(f"wrote {output}; next: dora-diffusion train {output} --dry-run")
    return 0
