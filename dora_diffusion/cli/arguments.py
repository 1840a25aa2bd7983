"""What several commands share: names of bases, adapters with strengths, progress bars."""

import argparse
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.utils.console import typed_text
from dora_diffusion.utils.text import encodable

if TYPE_CHECKING:
    from dora_diffusion.pipelines.base_weights import BaseWeights
    from dora_diffusion.state import AdapterState

BASES = "pocket, pocket-dit, a diffusers folder, a .safetensors file or a hub id (default: pocket)"
LOCAL_BASES = "pocket, pocket-dit, a diffusers folder or a .safetensors file"
# Spelt out, for importing the library costs seconds; a test keeps the lists true.
MODES = ("additive", "compose", "direction-magnitude", "peft", "comfyui", "a1111", "lycoris")
TOOL_NAMES = ("comfyui", "forge", "a1111", "invokeai", "sdnext", "diffusers")
MERGES = ("svd", "magnitude-prune", "ties", "dare-linear", "dare-ties")


def _format_name(text: str) -> str:
    """A known format's name; the formats are imported, for seconds, when one is given, and not for help."""
    from dora_diffusion.formats import FORMATS

    if text not in FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r} is no format: expected one of {', '.join(FORMATS)}")
    return text


def add_to(parser: argparse.ArgumentParser, *, default: str | None, says: str) -> None:
    """--to, the format that is written; `says`: what its default is, in words."""
    known = "diffusers, peft, kohya, comfyui, lycoris or another of docs/formats.md"
    parser.add_argument("--to", type=_format_name, metavar="FORMAT", default=default, help=f"{known} (default: {says})")


def split_adapter(text: str) -> tuple[Path, float]:
    """`ink.safetensors:0.8` -> (path, 0.8); without a strength 1. A ValueError names the option."""
    if text.endswith(".safetensors") or Path(text).exists():
        return Path(text), 1.0
    path, colon, strength = text.rpartition(":")
    is_drive = len(path) == 1 and path.isalpha()  # C:\runs\ink
    try:
        return (Path(path), float(strength)) if colon and not is_drive else (Path(text), 1.0)
    except ValueError:
        raise ValueError(f"--adapter {text}: expected FILE or FILE:STRENGTH, such as ink.safetensors:0.8") from None


def split_part(text: str) -> tuple[str, str, float]:
    """`ink:unet.up_blocks=1.2` -> (ink, unet.up_blocks, 1.2); a ValueError names the option."""
    whole, equals, strength = text.rpartition("=")
    name, colon, part = whole.rpartition(":")
    try:
        if equals and colon and name and part:
            return name, part, float(strength)
    except ValueError:
        pass
    raise ValueError(f"--part {text}: expected NAME:PART=STRENGTH, such as ink:unet.up_blocks=1.2") from None


def add_mix(parser: argparse.ArgumentParser) -> None:
    """--adapter and --part."""
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="FILE[:STRENGTH]", help="may be repeated (strength: 1)"
    )
    parser.add_argument(
        "--part",
        action="append",
        default=[],
        metavar="NAME:PART=STRENGTH",
        help="another strength for a component or block; NAME is the file's, as in ink:unet.up_blocks=1.2",
    )


def add_device(parser: argparse.ArgumentParser, *, default: str | None = "auto") -> None:
    """--device; a `default` of None tells a command that none was named."""
    about = "what draws: cpu, cuda, xpu, mps, or auto, the best that is here (default: auto)"
    parser.add_argument("--device", default=default, metavar="DEVICE", help=about)


def name_of_file(path: Path) -> str:
    """What an adapter is called here, and in the metadata that is written: its file's name, as text."""
    return encodable(typed_text(path.stem))


def free_name(stem: str, taken: Container[str]) -> str:
    """`ink`, or `ink-2`, `ink-3` ... where that is taken."""
    names = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
    return next(name for name in names if name not in taken)


def check_output(path: Path, format: str | None) -> None:
    """Refuse a place that cannot be written to, before minutes of work.

    Raises:
        ValueError: the name does not suit the format, or what is there is in the way.
    """
    from dora_diffusion.formats import check_name
    from dora_diffusion.formats.peft import check_place

    check_name(path, format or "diffusers")
    if format == "peft":
        check_place(path)
    elif path.is_dir():
        raise ValueError(f"{path} is a folder; expected the name of a file")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{path}: nothing can be written to {parent}")


def read_mix(
    adapters: Sequence[str], parts: Sequence[str], base: "BaseWeights"
) -> tuple[dict[str, "AdapterState"], dict[str, Any]]:
    """Adapters by their files' names, and their strengths.

    Raises:
        ValueError: a file that is missing, twice the same name, or a part of an adapter that is not there.
    """
    from dora_diffusion.formats import load_adapter

    if not adapters:
        raise ValueError("--adapter: name one at least, such as --adapter ink.safetensors:0.8")
    states: dict[str, AdapterState] = {}
    weights: dict[str, Any] = {}
    for text in adapters:
        path, strength = split_adapter(text)
        if not path.exists():
            raise ValueError(f"--adapter {path}: no such file")
        name = free_name(name_of_file(path), states)
        states[name], weights[name] = load_adapter(path, base=base), strength
    return states, with_parts(weights, parts, {name: state.components for name, state in states.items()})


def with_parts(
    weights: Mapping[str, Any], parts: Sequence[str], components: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Strengths, with those of --part put in; what a part leaves unsaid keeps the adapter's own.

    Args:
        weights: name -> strength.
        parts: NAME:PART=STRENGTH each.
        components: name -> the pipeline's parts that the adapter changes.
    """
    by_name: dict[str, Any] = dict(weights)
    for text in parts:
        name, part, strength = split_part(text)
        if name not in by_name:
            raise ValueError(f"--part {text}: no adapter named {name!r}; there are {', '.join(by_name) or 'none'}")
        weight = by_name[name]
        whole = weight if isinstance(weight, Mapping) else dict.fromkeys(components[name], weight)
        by_name[name] = {**whole, part: strength}
    return by_name


def open_base(name: str) -> "BaseWeights":
    """A base's weights, read as they are needed; a ValueError of one line when there is none."""
    from dora_diffusion.pipelines.base_weights import base_weights

    return base_weights(name)


@contextmanager
def progress(description: str, unit: str = "layer") -> Iterator[Callable[..., None]]:
    """A bar that takes (done, total) and whatever else it is told; it appears with the first news."""
    from tqdm import tqdm

    bars: list[tqdm] = []

    def advance(done: int, total: int, *more: object) -> None:
        if not bars:
            bars.append(tqdm(desc=description, total=total, unit=unit, unit_scale=unit == "B"))
        bars[0].update(done - bars[0].n)

    try:
        yield advance
    finally:
        for bar in bars:
            bar.close()
