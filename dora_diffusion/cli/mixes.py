"""`blend` and `bake`: several adapters into one file, or into a base. What is written is read back and compared."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.cli.arguments import (
    LOCAL_BASES,
    MERGES,
    MODES,
    add_mix,
    add_to,
    check_output,
    open_base,
    progress,
    read_mix,
)

if TYPE_CHECKING:
    from dora_diffusion.pipelines.base_weights import BaseWeights
    from dora_diffusion.state import AdapterState


def add_blend(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make one adapter of several. compose (the default) is again a DoRA and exact; the modes named after tools "
        "draw as those tools do; ties, dare and the like merge differences."
    )
    parser.add_argument("output", type=Path, metavar="OUT")
    add_mix(parser)
    parser.add_argument("--base", help=f"{LOCAL_BASES} (default: none where plain LoRAs make a plain one, else pocket)")
    parser.add_argument("--mode", choices=(*MODES, *MERGES), default="compose")
    parser.add_argument("--rank", type=int, help="of each layer at most (default: the sum of the adapters' ranks)")
    parser.add_argument("--density", type=float, default=0.5, help="what ties, dare and magnitude-prune keep")
    parser.add_argument("--seed", type=int, default=0, help="of dare's choice")
    add_to(parser, default="diffusers", says="diffusers")
    parser.set_defaults(handler=_blend)


def _blend(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from dora_diffusion.blending import BlendOptions, blend_with_report, needs_base
    from dora_diffusion.formats import save_adapter
    from dora_diffusion.utils.atomic import atomic_path

    check_output(arguments.output, arguments.to)
    base = open_base(arguments.base or "pocket")
    states, weights = read_mix(arguments.adapter, arguments.part, base)
    options = BlendOptions(density=arguments.density, seed=arguments.seed)
    is_needed = arguments.base is not None or needs_base(states, weights, mode=arguments.mode, options=options)
    known = base if is_needed else None
    with progress("blending") as advance, _pocket_named(arguments.base, known):
        blended = blend_with_report(
            states, weights, base=known, mode=arguments.mode, rank=arguments.rank, options=options, progress=advance
        )
    with atomic_path(arguments.output) as path:
        save_adapter(blended.adapter, path, format=arguments.to)
        sentence = _read_back(path, blended.adapter, (states, weights), arguments.mode, known)
    print(f"wrote {arguments.output} ({arguments.to})\n{blended.report.sentence()}\n{sentence}")
    return 0


@contextmanager
def _pocket_named(asked: str | None, known: "BaseWeights | None") -> Iterator[None]:
    """A mistake that may come of the base says that none was named."""
    try:
        yield
    except ValueError as error:
        if asked is None and known is not None:
            raise ValueError(f"{error} (the base is pocket, for --base names no other)") from None
        raise


def _read_back(
    path: Path,
    blended: "AdapterState",
    mix: "tuple[Mapping[str, AdapterState], Mapping[str, Any]]",
    mode: str,
    base: "BaseWeights | None",
) -> str:
    """What was written beside the live mix where there is one and a base, else beside what was to be written."""
    from dora_diffusion.formats import load_adapter
    from dora_diffusion.inspection.verify import verify_blend, verify_copy

    written = load_adapter(path, base=base)
    if mode not in MODES or base is None:
        return verify_copy(written, blended).sentence()
    with progress("reading back") as advance:
        found = verify_blend(written, *mix, base=base, mode=mode, progress=advance)
    return f"{found.sentence()} against the live {mode} mix"


def add_bake(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write a base with adapters in its weights: a whole model that knows nothing of adapters."
    parser.add_argument("base", metavar="BASE", help=LOCAL_BASES)
    parser.add_argument("output", type=Path, metavar="OUT", help="a folder, or a .safetensors file for a single file")
    add_mix(parser)
    parser.add_argument("--mode", choices=MODES, default="additive")
    parser.set_defaults(handler=_bake)


def _bake(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from dora_diffusion.blending.bake import bake, verify

    states, weights = read_mix(arguments.adapter, arguments.part, open_base(arguments.base))
    with progress("baking", unit="B") as advance:
        report = bake(arguments.base, states, weights, arguments.output, mode=arguments.mode, on_progress=advance)
    print(f"wrote {report.output}: {report.layers} layers and {report.vectors} vectors changed")
    if report.extra:
        print(
            f"left out: {len(report.extra)} tensors of the adapters that belong to no layer, such as {report.extra[0]}"
        )
    check = verify(arguments.output, arguments.base, states, weights, mode=arguments.mode)
    if check.changed:
        raise ValueError(f"{arguments.output}: {check.changed[0]} differs from the base's, and no adapter touches it")
    print(
        f"read back: largest relative error {check.error:.2g} of {check.checked} ({check.layer}), "
        f"rounding to its dtype allows {check.rounding:.2g}; every other tensor is the base's, byte for byte"
    )
    return 0
