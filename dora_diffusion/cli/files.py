"""`inspect`, `convert`, `resize`, `extract`: one adapter in, one out. What is written is read back and compared."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.cli.arguments import LOCAL_BASES, TOOL_NAMES, add_to, check_output, open_base, progress

if TYPE_CHECKING:
    from dora_diffusion.inspection.verify import Verified
    from dora_diffusion.pipelines.base_weights import BaseWeights
    from dora_diffusion.state import AdapterState

_DTYPES = ("fp32", "bf16", "fp16")


def add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.description = "What adapter files hold. Several, with a base: also how far they get in each other's way."
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="a file, a run's folder or one of PEFT's")
    parser.add_argument("--model", "--base", dest="base", help=f"match it against a base: {LOCAL_BASES}")
    parser.add_argument("--json", action="store_true", help="for programs")
    _add_reading(parser)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="magnitudes and directions by block; needs --model")
    parser.set_defaults(handler=_inspect)


def _inspect(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    if arguments.plot is not None and arguments.base is None:
        raise ValueError("--plot compares with the base's own weights: name it with --model")
    from dora_diffusion.blending import interference
    from dora_diffusion.inspection.report import describe, facts_of, load_to_inspect

    base = None if arguments.base is None else open_base(arguments.base)
    family, strict = arguments.family, not arguments.partial
    loaded = {path: load_to_inspect(path, base=base, family=family, strict=strict) for path in arguments.files}
    found = [facts_of(path, *loaded[path], base=base) for path in arguments.files]
    states = {label: loaded[path][0] for label, path in _labels(arguments.files).items()}
    crossed = interference(states, base=base) if base is not None and len(found) > 1 else None
    if arguments.json:
        everything = found[0] if len(found) == 1 else {"files": found, "interference": crossed and crossed.as_json()}
        print(json.dumps(everything, indent=1))
    else:
        print("\n\n".join(describe(facts) for facts in found))
        if crossed is not None:
            print(f"\nnorms of W' - W by block, and cosines between adapters:\n{crossed.table()}")
    if arguments.plot is not None and base is not None:
        from dora_diffusion.inspection.plots import plot_adapters

        print(f"wrote {plot_adapters(states, base, arguments.plot)}")
    return 0


def _labels(paths: Sequence[Path]) -> dict[str, Path]:
    """Files by their names, or by their whole paths where two are called alike."""
    names = [path.stem for path in paths]
    return {name if names.count(name) == 1 else str(path): path for name, path in zip(names, paths, strict=True)}


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write an adapter in another format, or for another tool; nothing is lost, or the reason is said. --for, "
        "--lora, --dora and --axis out change what it is, and need the base."
    )
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("output", type=Path, metavar="OUT", help="a .safetensors file; a folder for peft")
    _add_to(parser)
    parser.add_argument("--base", help=LOCAL_BASES)
    _add_reading(parser)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--lora", action="store_true", help="make a plain LoRA of a DoRA (with --rank; else whole)")
    kind.add_argument("--dora", action="store_true", help="give every plain layer magnitudes; exact")
    kind.add_argument("--axis", choices=["out"], help="make magnitudes per input magnitudes per output")
    kind.add_argument("--for", dest="tool", choices=TOOL_NAMES, help="make what this tool draws as we draw")
    parser.add_argument("--rank", type=int, help="of the new pairs")
    parser.set_defaults(handler=_convert)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", help="the model that the file is for, where its names are those of several")
    parser.add_argument(
        "--partial", action="store_true", help="take the layers that can be computed, where others are beside them"
    )


def _add_to(parser: argparse.ArgumentParser) -> None:
    add_to(parser, default=None, says="that of IN, else diffusers")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the tensors (default: as they are)")


def _convert(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    changes = arguments.lora or arguments.dora or arguments.axis
    if changes and arguments.base is None:
        raise ValueError("--lora, --dora and --axis compare with the base's weights: name it with --base")
    if arguments.rank is not None and not (arguments.lora or arguments.axis or arguments.tool):
        raise ValueError("--rank goes with --lora, --axis or --for; to change the rank alone: dora-diffusion resize")
    if arguments.tool is not None:
        return _convert_for_tool(arguments)
    from dora_diffusion.formats import FORMATS, load_adapter

    base = None if arguments.base is None else open_base(arguments.base)
    original = load_adapter(arguments.source, base=base, family=arguments.family, strict=not arguments.partial)
    format = _format(original, arguments)
    if arguments.lora and arguments.rank is None and not FORMATS[format].suffixes.holds("diff"):
        able = ", ".join(name for name, dialect in FORMATS.items() if dialect.suffixes.holds("diff"))
        raise ValueError(f"--lora without --rank is a whole difference; name a --rank, or a format of {able}")
    adapter = _changed(original, arguments, base) if base is not None and changes else original
    _write(adapter, arguments, format, lambda path: _compared(path, original, base))
    return 0


def _convert_for_tool(arguments: argparse.Namespace) -> int:
    if arguments.to is not None:
        raise ValueError(f"--for {arguments.tool} chooses the format that it reads: leave out --to")
    if arguments.base is None:
        raise ValueError(f"--for {arguments.tool} compares with the base's weights: name it with --base")
    from dora_diffusion.conversion import for_tool
    from dora_diffusion.formats import load_adapter
    from dora_diffusion.formats.reading import as_stored
    from dora_diffusion.inspection.verify import verify_for_tool

    check_output(arguments.output, None)
    base, strict = open_base(arguments.base), not arguments.partial
    original = load_adapter(arguments.source, base=base, family=arguments.family, strict=strict)
    with progress("converting") as advance:
        made = for_tool(original, arguments.tool, base=base, rank=arguments.rank, strict=strict, progress=advance)

    def verify(path: Path) -> "Verified":
        stored = load_adapter(path, base=as_stored)
        with progress("reading back") as advance:
            return verify_for_tool(stored, original, made.tool, base=base, progress=advance)

    _write(made.adapter, arguments, made.format, verify)
    print(made.sentence())
    return 0


def _format(adapter: "AdapterState", arguments: argparse.Namespace) -> str:
    """The format to write, its place checked before any work."""
    from dora_diffusion.formats import FORMATS

    format = str(arguments.to or (adapter.origin if adapter.origin in FORMATS else "diffusers"))
    check_output(arguments.output, format)
    return format


def _compared(path: Path, original: "AdapterState", base: "BaseWeights | None") -> "Verified":
    """What was written beside what it was made of: the weights where a base is at hand, else the tensors."""
    from dora_diffusion.formats import load_adapter
    from dora_diffusion.inspection.verify import verify_blend, verify_copy

    if base is None:
        return verify_copy(load_adapter(path), original)
    with progress("reading back") as advance:
        return verify_blend(load_adapter(path, base=base), {"": original}, {"": 1.0}, base=base, progress=advance)


def _changed(adapter: "AdapterState", arguments: argparse.Namespace, base: "BaseWeights") -> "AdapterState":
    from dora_diffusion.conversion import to_dora, to_lora, to_out_axis

    with progress("converting") as advance:
        if arguments.dora:
            return to_dora(adapter, base=base, progress=advance)
        if arguments.lora:
            return to_lora(adapter, base=base, rank=arguments.rank, progress=advance)
        return to_out_axis(adapter, base=base, rank=arguments.rank, progress=advance)


def _write(
    adapter: "AdapterState", arguments: argparse.Namespace, format: str, verify: "Callable[[Path], Verified]"
) -> None:
    """Write beside the output, read back, and only then put it in its place: OUT may be IN."""
    import torch

    from dora_diffusion.formats import save_adapter
    from dora_diffusion.state import cast
    from dora_diffusion.utils.atomic import atomic_path

    if arguments.dtype is not None:
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        adapter = cast(adapter, dtypes[arguments.dtype])
    with atomic_path(arguments.output) as path:
        save_adapter(adapter, path, format=format)
        sentence = verify(path).sentence()
    print(f"wrote {arguments.output} ({format})\n{sentence}")


def add_resize(parser: argparse.ArgumentParser) -> None:
    parser.description = "Lower an adapter's rank, every layer as near as that allows; magnitudes stay."
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--rank", type=int, help="the highest rank left")
    parser.add_argument("--error", type=float, default=0.0, help="fewer ranks, up to this relative error in a layer")
    parser.add_argument("--base", help=f"seek what is nearest to the drawn weight: {LOCAL_BASES}")
    _add_reading(parser)
    _add_to(parser)
    parser.set_defaults(handler=_resize)


def _resize(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from dora_diffusion.conversion import Report, resize
    from dora_diffusion.formats import load_adapter

    base = None if arguments.base is None else open_base(arguments.base)
    original = load_adapter(arguments.source, base=base, family=arguments.family, strict=not arguments.partial)
    format = _format(original, arguments)
    reports: list[Report] = []
    with progress("resizing") as advance:
        adapter = resize(
            original,
            rank=arguments.rank,
            error=arguments.error,
            base=base,
            progress=advance,
            report=reports.append,
        )
    _write(adapter, arguments, format, lambda path: _compared(path, original, base))
    print(reports[0].sentence())
    return 0


def add_extract(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "An adapter out of a fine-tuned model: the DoRA that turns the base into it, as near as can be."
    )
    parser.add_argument("tuned", metavar="TUNED", help="a diffusers folder or a .safetensors file")
    parser.add_argument("base", metavar="BASE", help=LOCAL_BASES)
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", default=None, metavar="PRESET", help="attention, all-linear or all, or a regex")
    parser.add_argument("--lora", action="store_true", help="a plain LoRA instead")
    parser.add_argument("--error", type=float, default=0.0, help="fewer ranks, up to this relative error in a layer")
    parser.add_argument(
        "--vectors", action="store_true", help="also changed biases and normalisations (lycoris, kohya)"
    )
    _add_to(parser)
    parser.set_defaults(handler=_extract)


def _extract(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from dora_diffusion.conversion import Extraction, Report, extract
    from dora_diffusion.formats import load_adapter
    from dora_diffusion.inspection.verify import verify_tuned

    tuned, base = open_base(arguments.tuned), open_base(arguments.base)
    options = Extraction(
        target_modules=arguments.layers,
        use_dora=not arguments.lora,
        error=arguments.error,
        vectors=arguments.vectors,
    )
    format = arguments.to or "diffusers"
    check_output(arguments.output, format)
    reports: list[Report] = []
    with progress("extracting") as advance:
        adapter = extract(tuned, base, rank=arguments.rank, options=options, progress=advance, report=reports.append)

    def verify(path: Path) -> "Verified":
        with progress("reading back") as advance:
            return verify_tuned(load_adapter(path, base=base), tuned, base=base, progress=advance)

    _write(adapter, arguments, format, verify)
    print(reports[0].sentence())
    return 0
