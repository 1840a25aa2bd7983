"""The command line: parse, check, one call. Heavy imports wait until a command runs, so `--help` is quick."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dora_diffusion.adapters import AdapterManager
    from dora_diffusion.generation import AdapterUse

_BASES = "pocket, pocket-dit, a diffusers folder, a .safetensors file or a hub id (default: pocket)"
Handler = Callable[[argparse.Namespace, Sequence[str]], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. A ValueError is one line on stderr and status 2, never a traceback."""
    # transformers says at every start that it does without torchvision; a user has no use for that
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    handler: Handler = parsed.handler
    if rest and handler not in (_train, _evaluate):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return handler(parsed, rest)
    except (ValueError, OSError) as error:
        print(f"dora-diffusion: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dora-diffusion: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dora-diffusion", description="Train, blend and draw with DoRA adapters.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_doctor(commands.add_parser("doctor", help="check an image set before training"))
    _add_train(commands.add_parser("train", help="train an adapter from a YAML config"))
    _add_generate(commands.add_parser("generate", help="draw pictures with adapters"))
    _add_inspect(commands.add_parser("inspect", help="what an adapter file holds"))
    _add_evaluate(commands.add_parser("evaluate", help="score a trained adapter, with pictures"))
    _add_ui(commands.add_parser("ui", help="the app: load, blend, draw"))
    return parser


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.description = "Check an image set. Exit status 1 when something would be lost in training."
    parser.add_argument("dataset", type=Path, help="folder of pictures")
    parser.add_argument("--instance-prompt", help="caption of pictures that have none of their own")
    parser.set_defaults(handler=_doctor)


def _doctor(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from dora_diffusion.training.doctor import examine, format_report

    report = examine(arguments.dataset, instance_prompt=arguments.instance_prompt)
    print(format_report(report))
    return 1 if report.losses else 0


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.usage = "dora-diffusion train CONFIG.yaml [--resume latest] [--dry-run] [--section.key value ...]"
    parser.description = "Train an adapter. Any setting of the file can be overridden: --optim.steps 400"
    parser.add_argument("config", type=Path, help="YAML file; see examples/")
    parser.add_argument("--resume", choices=["latest"], help="go on from the newest valid checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="check data and settings, print the plan, train nothing")
    parser.set_defaults(handler=_train)


def _train(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from dora_diffusion.training.config import TrainConfig

    config = TrainConfig.from_yaml(arguments.config, TrainConfig.parse_overrides(rest))
    if arguments.dry_run:
        from dora_diffusion.training.plan import describe_plan

        print(describe_plan(config))
        return 0
    from dora_diffusion.training.loop import train

    result = train(config, resume=arguments.resume)
    if result.validation:
        (_, before), (_, after) = result.validation[0], result.validation[-1]
        print(f"loss on fixed noise: {before:.4f} before, {after:.4f} after {result.steps} steps")
    for path in (result.adapter, *result.words):
        if path is not None:
            print(f"wrote {path}")
    return 0


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.description = "Draw a picture. Several --adapter options blend: --adapter ink.safetensors:0.8"
    parser.add_argument("--model", default="pocket", help=_BASES)
    parser.add_argument("--model-config", metavar="FOLDER", help="configs for a .safetensors file: a diffusers folder")
    parser.add_argument("--adapter", action="append", default=[], metavar="FILE[:STRENGTH]", help="may be repeated")
    parser.add_argument("--words", action="append", default=[], metavar="FILE", help="a new word; may be repeated")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: cpu)")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--offload", choices=["model", "sequential"], help="keep weights in main memory until needed")
    parser.add_argument("--output", type=Path, default=Path("out.png"), help="a PNG; metadata goes inside")
    parser.set_defaults(handler=_generate)


def split_adapter(text: str) -> tuple[Path, float]:
    """`ink.safetensors:0.8` -> (path, 0.8); without a strength 1. A ValueError names the option."""
    if text.endswith(".safetensors"):
        return Path(text), 1.0
    path, colon, strength = text.rpartition(":")
    try:
        return (Path(path), float(strength)) if colon else (Path(text), 1.0)
    except ValueError:
        raise ValueError(f"--adapter {text}: expected FILE or FILE:STRENGTH, such as ink.safetensors:0.8") from None


def _generate(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    adapters = [split_adapter(text) for text in arguments.adapter]
    if missing := [str(path) for path, _ in adapters if not path.is_file()]:
        raise ValueError(f"--adapter {missing[0]}: no such file")
    if missing := [path for path in arguments.words if not Path(path).is_file()]:
        raise ValueError(f"--words {missing[0]}: no such file")
    if arguments.output.suffix.lower() != ".png":
        raise ValueError(f"--output {arguments.output}: pictures are written as PNG; give a name that ends in .png")
    import torch
    from tqdm import tqdm

    from dora_diffusion.adapters import AdapterManager
    from dora_diffusion.generation import GenerationSettings, StepReport, WordUse, generate, save_picture
    from dora_diffusion.pipelines import load_pipeline
    from dora_diffusion.storage import sha256_of
    from dora_diffusion.tokens import install_words, load_word

    settings = GenerationSettings(
        prompt=arguments.prompt,
        negative_prompt=arguments.negative_prompt,
        seed=arguments.seed,
        steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        width=arguments.width,
        height=arguments.height,
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.dtype]
    pipe = load_pipeline(
        arguments.model,
        dtype=dtype,
        device=arguments.device,
        config=arguments.model_config,
        offload=arguments.offload,
    )
    words = [load_word(path) for path in arguments.words]
    if words:
        install_words(pipe, words)
    spelt = [WordUse(state.word, sha256_of(Path(path))) for state, path in zip(words, arguments.words, strict=True)]
    uses = _blend(AdapterManager(pipe), adapters)
    with tqdm(total=settings.steps, desc="drawing") as bar:

        def advance(report: StepReport) -> None:
            bar.update(report.step - bar.n)

        picture = generate(pipe, settings, on_step=advance)
    path = save_picture(picture, arguments.output, settings, model=arguments.model, adapters=uses, words=spelt)
    print(f"wrote {path}")
    return 0


def _blend(manager: "AdapterManager", adapters: Sequence[tuple[Path, float]]) -> "list[AdapterUse]":
    """Load the adapters under their files' names and set their strengths."""
    from dora_diffusion.generation import AdapterUse

    uses = []
    for index, (path, strength) in enumerate(adapters):
        name = path.stem if path.stem not in manager.names else f"{path.stem}-{index + 1}"
        report = manager.load_adapter(path, name=name)
        uses.append(AdapterUse(name, report.sha256, strength))
        print(
            f"{name}: {report.kind} rank {'/'.join(map(str, report.ranks))}, {report.matched} of {report.total} layers"
        )
    manager.set_adapters({use.name: use.weight for use in uses})
    return uses


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.description = "Format, kind, rank, parts, size and metadata of an adapter file."
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", help="also say how many layers of this base it matches")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(handler=_inspect)


def _inspect(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from dora_diffusion.inspection import describe, inspect_adapter

    facts = inspect_adapter(arguments.file, model=arguments.model)
    print(json.dumps(facts, indent=1) if arguments.json else describe(facts))
    return 0


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Score the adapter that a config trained against its truth pictures; writes a report and a grid."
    )
    parser.add_argument("config", type=Path, help="the YAML it was trained with; needs evaluation.truth_dir")
    parser.set_defaults(handler=_evaluate)


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
    from dora_diffusion.training.dataset import find_examples
    from dora_diffusion.training.images import read_image

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
    )
    print(
        f"likeness to the truth: {scores.before:.2f} before, {scores.after:.2f} after "
        f"(floor {scores.floor:.2f}, ceiling {scores.ceiling:.2f}; {scores.count} pictures each)"
    )
    print(f"wrote {output / 'report.json'} and {output / 'grid.png'}")
    return 0


def _add_ui(parser: argparse.ArgumentParser) -> None:
    parser.description = "Start the app in the browser. Needs the `ui` extra: pip install 'dora-diffusion[ui]'"
    parser.add_argument("--model", default="pocket", help=_BASES)
    parser.add_argument("--adapters", type=Path, default=Path("."), help="folder to pick adapters from")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder for pictures")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    parser.set_defaults(handler=_ui)


def _ui(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    try:
        from ui.app import launch
        from ui.options import UiOptions
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "ui"):
            raise
        raise ValueError("the app needs gradio: pip install 'dora-diffusion[ui]'") from None
    launch(
        UiOptions(
            model=arguments.model,
            adapters=arguments.adapters,
            output=arguments.output,
            host=arguments.host,
            port=arguments.port,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
