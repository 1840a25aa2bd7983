"""`generate` and `ui`: what draws."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.cli.arguments import BASES, MODES, add_device, add_mix, split_adapter, with_parts
from dora_diffusion.utils.console import typed_text

if TYPE_CHECKING:
    from dora_diffusion.adapters.manager import AdapterManager
    from dora_diffusion.cli.drawing_plan import AdapterPlan, DrawingPlan
    from dora_diffusion.functional.strengths import Weight
    from dora_diffusion.generation.generate import GenerationSettings
    from dora_diffusion.generation.png_metadata import AdapterUse, WordUse


def add_generate(parser: argparse.ArgumentParser) -> None:
    parser.description = "Draw pictures. Several --adapter options blend: --adapter ink.safetensors:0.8"
    parser.add_argument("--model", help=BASES)
    parser.add_argument("--model-config", metavar="FOLDER", help="configs for a .safetensors file: a diffusers folder")
    _add_files(parser)
    add_mix(parser)
    parser.add_argument("--blend", choices=MODES, help="how adapters mix (default: additive)")
    parser.add_argument(
        "--schedule",
        action="append",
        default=[],
        metavar="NAME=CURVE",
        help="a strength over the run: points such as ink=0:0,.3:1, or constant, fade in, fade out, early, late",
    )
    parser.add_argument(
        "--mask-for", action="append", default=[], metavar="NAME=FILE", help="an adapter draws where this is white"
    )
    parser.add_argument("--words", action="append", default=[], metavar="FILE", help="a new word; may be repeated")
    _add_settings(parser)
    _add_canvas(parser)
    parser.add_argument(
        "--recipe", type=Path, metavar="PICTURE", help="draw what a PNG says of itself; other options go before it"
    )
    add_device(parser, default=None)
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="of the weights (default: fp32)")
    parser.add_argument("--offload", choices=["model", "sequential"], help="keep weights in main memory until needed")
    parser.add_argument(
        "--output", type=Path, default=Path("out.png"), help="a PNG; metadata goes inside; several are numbered"
    )
    parser.set_defaults(handler=_generate)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """What is drawn; None is what a recipe tells, else what the help says."""
    parser.add_argument("--prompt", type=typed_text)
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a prompt a line, with settings at its end: --w 768 --h 512 --s 30 --l 7.5 --d 42 --n negative prompt",
    )
    parser.add_argument("--negative-prompt", type=typed_text)
    parser.add_argument("--seed", type=int, help="of the first picture (default: 0)")
    parser.add_argument("--count", type=int, default=1, help="pictures of each prompt, with seeds one after another")
    parser.add_argument("--steps", type=int, help="(default: 20)")
    parser.add_argument("--guidance-scale", type=float, help="(default: 4)")
    parser.add_argument("--sampler", metavar="NAME", help="euler, dpm++ 2m karras ... (default: the model's own)")
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)


def _add_canvas(parser: argparse.ArgumentParser) -> None:
    """The picture to start from."""
    parser.add_argument("--image", type=Path, metavar="FILE", help="a picture to redraw")
    parser.add_argument("--mask", type=Path, metavar="FILE", help="redraw it where this is white only")
    about = "how much of it is drawn anew, above 0 and up to 1 (default: 0.75)"
    parser.add_argument("--denoise", type=float, metavar="STRENGTH", help=about)


def _add_files(parser: argparse.ArgumentParser) -> None:
    """Components of the base in files of their own."""
    for part in ("transformer", "unet", "vae"):
        about = f"the base's {part} from a .safetensors or .gguf file"
        parser.add_argument(f"--{part}", type=Path, metavar="FILE", help=about)


def _generate(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    _check_places(arguments)
    from dora_diffusion.adapters.manager import AdapterManager
    from dora_diffusion.cli.drawing_plan import plan_of
    from dora_diffusion.generation.generate import generate
    from dora_diffusion.generation.png_metadata import save_picture
    from dora_diffusion.pipelines.loading import load_pipeline
    from dora_diffusion.utils.hardware import DTYPES

    plan = plan_of(arguments)
    paths = _outputs(arguments.output, len(plan.lines))
    _check_outputs(paths, (arguments.recipe, plan.origin.canvas_file, plan.origin.canvas_mask_file))
    print(f"base: {plan.base.source} on {plan.base.device}, {plan.base.dtype}")
    pipe = load_pipeline(
        plan.base.source,
        dtype=DTYPES[plan.base.dtype],
        device=plan.base.device,
        config=plan.base.config,
        offload=arguments.offload,
        transformer=plan.base.files.get("transformer"),
        unet=plan.base.files.get("unet"),
        vae=plan.base.files.get("vae"),
    )
    _check_lines(pipe, plan)
    words = _install(pipe, plan)
    uses = _mix(AdapterManager(pipe), pipe, plan, arguments.part)
    for number, (line, path) in enumerate(zip(plan.lines, paths, strict=True), start=1):
        label = "drawing" if len(paths) == 1 else f"drawing {number}/{len(paths)}"
        with _steps(line.settings, label) as advance:
            picture = generate(pipe, line.settings, canvas=plan.canvas, on_step=advance)
        save_picture(picture, path, line.settings, model=plan.model, adapters=uses, words=words, origin=plan.origin)
        print(f"wrote {path}", flush=True)
    return 0


def _check_places(arguments: argparse.Namespace) -> None:
    """What can be refused before seconds of imports."""
    if arguments.prompt is None and arguments.prompts is None and arguments.recipe is None:
        raise ValueError("nothing to draw: give --prompt TEXT, --prompts FILE or --recipe PICTURE.png")
    if arguments.prompt is not None and arguments.prompts is not None:
        raise ValueError("--prompt and --prompts: give one of the two")
    adapters = [split_adapter(text)[0] for text in arguments.adapter]
    single = {"--image": arguments.image, "--mask": arguments.mask, "--prompts": arguments.prompts}
    named = [("--adapter", path) for path in adapters] + [("--words", Path(path)) for path in arguments.words]
    for flag, path in (*named, *single.items()):
        if path is not None and not path.exists():
            raise ValueError(f"{flag} {path}: no such file")
    if arguments.output.suffix.lower() != ".png":
        raise ValueError(f"--output {arguments.output}: pictures are written as PNG; give a name that ends in .png")


def _check_lines(pipe: Any, plan: "DrawingPlan") -> None:
    """Nothing is drawn before the base has been asked whether it can draw every line."""
    from dora_diffusion.generation.generate import check_drawable

    for line in plan.lines:
        try:
            check_drawable(pipe, line.settings, has_canvas=plan.canvas is not None)
        except ValueError as error:
            raise ValueError(f"{line.place}: {error}" if line.place else str(error)) from None


def _outputs(path: Path, count: int) -> list[Path]:
    """`out.png`, or `out-1.png`, `out-2.png` ... with as many digits as the last one has."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number:0{len(str(count))}}{path.suffix}") for number in range(1, count + 1)]


def _check_outputs(paths: Sequence[Path], inputs: Sequence[Path | str | None]) -> None:
    """A ValueError when a picture would be written over one that it is drawn from."""
    sources = {Path(path).resolve() for path in inputs if path is not None}
    taken = next((path for path in paths if path.resolve() in sources), None)
    if taken is not None:
        raise ValueError(f"--output {taken}: would replace a picture that is drawn from; name another")


@contextmanager
def _steps(settings: "GenerationSettings", label: str) -> Iterator[Callable[[Any], None]]:
    """A bar that follows a drawing's reports."""
    from tqdm import tqdm

    with tqdm(total=settings.steps, desc=label) as bar:

        def advance(report: Any) -> None:
            bar.total = report.total
            bar.update(report.step - bar.n)

        yield advance


def _install(pipe: Any, plan: "DrawingPlan") -> "list[WordUse]":
    """Put new words into the pipeline."""
    from dora_diffusion.generation.png_metadata import WordUse
    from dora_diffusion.generation.recipes import check_same
    from dora_diffusion.pipelines.textual_inversion import install_words, load_word

    states = [load_word(word.path) for word in plan.words]
    for word, state in zip(plan.words, states, strict=True):
        check_same(word.path, word.sha256, state.sha256, flag="--words")
    if states:
        install_words(pipe, states)
    return [
        WordUse(state.word, state.sha256 or "", str(word.path)) for word, state in zip(plan.words, states, strict=True)
    ]


def _mix(manager: "AdapterManager", pipe: Any, plan: "DrawingPlan", parts: Sequence[str]) -> "list[AdapterUse]":
    """Load the adapters under their names and set strengths, curves and masks."""
    from dora_diffusion.adapters.mixing import Ingredient, set_mix
    from dora_diffusion.generation.png_metadata import AdapterUse, picture_sha256

    weights: dict[str, Weight] = {}
    for one in plan.adapters:
        weights[one.name] = _loaded(manager, pipe, one)
    mixed = with_parts(weights, parts, {name: manager.reports[name].components for name in weights})
    ingredients = [Ingredient(one.name, mixed[one.name], one.schedule, one.mask) for one in plan.adapters]
    set_mix(manager, ingredients, blend=plan.blend)
    return [
        AdapterUse(
            one.name,
            manager.reports[one.name].sha256,
            mixed[one.name],
            plan.blend,
            one.schedule,
            None if one.mask is None else picture_sha256(one.mask),
            str(one.path),
            one.mask_file,
        )
        for one in plan.adapters
    ]


def _loaded(manager: "AdapterManager", pipe: Any, plan: "AdapterPlan") -> "Weight":
    """Load an adapter; its strength by the names of this base's parts."""
    from dora_diffusion.adapters.mixing import by_own_names, without_empty_blocks
    from dora_diffusion.generation.recipes import check_same

    report = manager.load_adapter(plan.path, name=plan.name)
    check_same(plan.path, plan.sha256, report.sha256, flag="--adapter")
    ranks = "/".join(map(str, report.ranks))
    words = f", new words {', '.join(report.words)}" if report.words else ""
    print(f"{plan.name}: {report.kind} rank {ranks}, {report.matched} of {report.total} layers{words}")
    for note in report.notes:
        print(f"{plan.name}: {note}")
    return without_empty_blocks(by_own_names(plan.weight, pipe), manager.paths(plan.name))


def add_ui(parser: argparse.ArgumentParser) -> None:
    parser.description = "Start the app in the browser. Needs the `ui` extra: pip install 'dora-diffusion[ui]'"
    parser.add_argument("--model", default="pocket", help=BASES)
    _add_files(parser)
    parser.add_argument("--adapters", type=Path, default=Path("."), help="folder to pick adapters from")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder for pictures")
    parser.add_argument(
        "--datasets", type=Path, action="append", help="folder of picture sets and recipes; may be repeated"
    )
    parser.add_argument("--models", type=Path, help="folder of further bases to switch to")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of training runs (default: runs)")
    add_device(parser)
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
            datasets=tuple(arguments.datasets or UiOptions.datasets),
            runs=arguments.runs,
            models=arguments.models,
            transformer=arguments.transformer,
            unet=arguments.unet,
            vae=arguments.vae,
            device=arguments.device,
        )
    )
    return 0
