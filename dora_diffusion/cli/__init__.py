"""The command line: parse, check, one call. Heavy imports wait until a command runs, so `--help` is quick."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence

from dora_diffusion.cli.arguments import split_adapter
from dora_diffusion.cli.drawing import add_generate, add_ui
from dora_diffusion.cli.environment import add_env
from dora_diffusion.cli.files import add_convert, add_extract, add_inspect, add_resize
from dora_diffusion.cli.mixes import add_bake, add_blend
from dora_diffusion.cli.training import add_doctor, add_evaluate, add_import_config, add_train
from dora_diffusion.utils.console import OneLineParser, line_of_unicode_error, printing_anything
from dora_diffusion.utils.quiet import quiet_lines

__all__ = ["main", "split_adapter"]

Handler = Callable[[argparse.Namespace, Sequence[str]], int]
Add = Callable[[argparse.ArgumentParser], None]

# Command -> what it does, and what adds its arguments.
COMMANDS: Mapping[str, tuple[str, Add]] = {
    "doctor": ("check an image set before training", add_doctor),
    "train": ("train an adapter from a YAML config", add_train),
    "import-config": ("another trainer's file as a YAML config", add_import_config),
    "generate": ("draw pictures with adapters", add_generate),
    "inspect": ("what adapter files hold, and how they meet", add_inspect),
    "convert": ("write an adapter in another format", add_convert),
    "blend": ("make one adapter of several", add_blend),
    "resize": ("lower an adapter's rank", add_resize),
    "extract": ("an adapter out of a fine-tuned model", add_extract),
    "bake": ("write a base with adapters in its weights", add_bake),
    "evaluate": ("score a trained adapter, with pictures", add_evaluate),
    "ui": ("the app: load, blend, draw", add_ui),
    "env": ("versions and devices, for a bug report", add_env),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. A ValueError is one line on stderr and status 2, never a traceback."""
    with printing_anything():
        parser = _parser()
        parsed, rest = parser.parse_known_args(arguments)
        handler: Handler = parsed.handler
        if rest and not parsed.takes_settings:
            parsed.command.error(f"unrecognized arguments: {' '.join(rest)}")
        try:
            with quiet_lines():
                return handler(parsed, rest)
        except UnicodeError as error:
            print(f"dora-diffusion: {line_of_unicode_error(error)}", file=sys.stderr)
            return 2
        except (ValueError, OSError) as error:
            print(f"dora-diffusion: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("dora-diffusion: stopped", file=sys.stderr)
            return 130


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="dora-diffusion", description="Train, blend and draw with DoRA adapters.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (about, add) in COMMANDS.items():
        command = commands.add_parser(name, help=about)
        command.set_defaults(takes_settings=False, command=command)
        add(command)
    return parser
