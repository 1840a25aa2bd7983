"""`generate` and `ui`: what draws."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.cli.arguments import BASES, MODES, add_mix, free_name, name_of_file, split_adapter, with_parts
from dora_diffusion.utils.console import typed_text

if TYPE_CHECKING:
    from dora_diffusion.adapters.manager import AdapterManager
    from dora_diffusion.generation.png_metadata import AdapterUse


def add_generate(parser: argparse.ArgumentParser) -> None:
    parser.description = "Draw a picture. Several --adapter options blend: --adapter ink.safetensors:0.8"
    parser.add_argument("--model", default="pocket", help=BASES)
    parser.add_argument("--model-config", metavar="FOLDER", help="configs for a .safetensors file: a diffusers folder")
    _add_files(parser)
    add_mix(parser)
    parser.add_argument("--blend", choices=MODES, default="additive", help="how adapters mix (default: additive)")
    parser.add_argument("--words", action="append", default=[], metavar="FILE", help="a new word; may be repeated")
    parser.add_argument("--prompt", type=typed_text, required=True)
    parser.add_argument("--negative-prompt", type=typed_text, default="")
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


def _add_files(parser: argparse.ArgumentParser) -> None:
    """Components of the base in files of their own."""
    for part in ("transformer", "unet", "vae"):
        about = f"the base's {part} from a .safetensors or .gguf file"
        parser.add_argument(f"--{part}", type=Path, metavar="FILE", help=about)


def _generate(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    adapters = [split_adapter(text) for text in arguments.adapter]
    if missing := [str(path) for path, _ in adapters if not path.exists()]:
        raise ValueError(f"--adapter {missing[0]}: no such file")
    if missing := [path for path in arguments.words if not Path(path).is_file()]:
        raise ValueError(f"--words {missing[0]}: no such file")
    if arguments.output.suffix.lower() != ".png":
        raise ValueError(f"--output {arguments.output}: pictures are written as PNG; give a name that ends in .png")
    import torch
    from tqdm import tqdm

    from dora_diffusion.adapters.manager import AdapterManager
    from dora_diffusion.generation.generate import GenerationSettings, StepReport, generate
    from dora_diffusion.generation.png_metadata import WordUse, save_picture
    from dora_diffusion.pipelines.loading import load_pipeline
    from dora_diffusion.pipelines.textual_inversion import install_words, load_word

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
        transformer=arguments.transformer,
        unet=arguments.unet,
        vae=arguments.vae,
    )
    words = [load_word(path) for path in arguments.words]
    if words:
        install_words(pipe, words)
    spelt = [WordUse(state.word, state.sha256 or "") for state in words]
    uses = _blend(AdapterManager(pipe), adapters, arguments.part, arguments.blend)
    with tqdm(total=settings.steps, desc="drawing") as bar:

        def advance(report: StepReport) -> None:
            bar.update(report.step - bar.n)

        picture = generate(pipe, settings, on_step=advance)
    path = save_picture(picture, arguments.output, settings, model=arguments.model, adapters=uses, words=spelt)
    print(f"wrote {path}")
    return 0


def _blend(
    manager: "AdapterManager", adapters: Sequence[tuple[Path, float]], parts: Sequence[str], mode: str
) -> "list[AdapterUse]":
    """Load the adapters under their files' names and set their strengths."""
    from dora_diffusion.generation.png_metadata import AdapterUse

    weights, components = {}, {}
    for path, strength in adapters:
        name = free_name(name_of_file(path), manager.names)
        report = manager.load_adapter(path, name=name)
        weights[name], components[name] = strength, report.components
        print(
            f"{name}: {report.kind} rank {'/'.join(map(str, report.ranks))}, {report.matched} of {report.total} layers"
        )
    mixed = with_parts(weights, parts, components)
    manager.set_adapters(mixed, blend=mode)
    return [AdapterUse(name, manager.reports[name].sha256, weight, mode) for name, weight in mixed.items()]


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
        )
    )
    return 0
