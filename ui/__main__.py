"""`python -m ui`: parse, then start. The heavy imports come after parsing, so `--help` is quick."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dora_diffusion.utils.console import OneLineParser, line_of_unicode_error, printing_anything
from ui.options import UiOptions


def _parser() -> argparse.ArgumentParser:
    default = UiOptions()
    parser = OneLineParser(prog="python -m ui", description="Draw with a mix of adapters, in the browser.")
    parser.add_argument(
        "--model", default=default.model, help="base: pocket, pocket-dit, a folder, a file, a hub id (%(default)s)"
    )
    for part in ("transformer", "unet", "vae"):
        parser.add_argument(f"--{part}", type=Path, metavar="FILE", help=f"the base's {part} from a file of its own")
    parser.add_argument("--adapters", type=Path, default=default.adapters, help="folder of *.safetensors (%(default)s)")
    parser.add_argument("--output", type=Path, default=default.output, help="where pictures go (%(default)s)")
    parser.add_argument("--host", default=default.host, help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=default.port, help="port to listen on (%(default)s)")
    parser.add_argument(
        "--datasets",
        type=Path,
        nargs="+",
        default=default.datasets,
        help="where pictures to train on lie (examples datasets)",
    )
    parser.add_argument("--models", type=Path, help="folder of further bases to switch to")
    parser.add_argument(
        "--device", default=default.device, help="what draws: cpu, cuda, xpu, mps or auto (%(default)s)"
    )
    parser.add_argument("--runs", type=Path, default=default.runs, help="where training runs go (%(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the app until Ctrl+C; exit 2 with one line on bad input."""
    # transformers says at every start that it does without torchvision; a user has no use for that
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with printing_anything():
        given = _parser().parse_args(arguments)
        try:
            _launch(given)
        except UnicodeError as error:
            print(f"error: {line_of_unicode_error(error)}", file=sys.stderr)
            return 2
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0


def _launch(given: argparse.Namespace) -> None:
    options = UiOptions(
        model=given.model,
        adapters=given.adapters,
        output=given.output,
        host=given.host,
        port=given.port,
        datasets=tuple(given.datasets),
        runs=given.runs,
        models=given.models,
        transformer=given.transformer,
        unet=given.unet,
        vae=given.vae,
        device=given.device,
    )
    from ui.app import launch

    launch(options)


if __name__ == "__main__":
    sys.exit(main())
