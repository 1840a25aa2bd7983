"""`blend` and `bake`: several adapters into one file, or into a base. What is written is read back and compared."""

import argparse
from collections.abc import Sequence
from pathlib import Path

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


def add_blend(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make one adapter of several. compose (the default) is again a DoRA and exact; the modes named after tools "
        "draw as those tools do; ties, dare and the like merge differences."
    )
    parser.add_argument("output", type=Path, metavar="OUT")
    add_mix(parser)
    parser.add_argument("--base", default="pocket", help=f"{LOCAL_BASES} (default: pocket)")
    parser.add_argument("--mode", choices=(*MODES, *MERGES), default="compose")
    parser.add_argument("--rank", type=int, help="of each layer at most (default: the sum of the adapters' ranks)")
    parser.add_argument("--density", type=float, default=0.5, help="what ties, dare and magnitude-prune keep")
    parser.add_argument("--seed", type=int, default=0, help="of dare's choice")
    add_to(parser, default="diffusers", says="diffusers")
    parser.set_defaults(handler=_blend)


def _blend(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from dora_diffusion.blending import BlendOptions, blend_with_report
    from dora_diffusion.formats import load_adapter, save_adapter
    from dora_diffusion.inspection.verify import verify_blend, verify_copy
    from dora_diffusion.utils.atomic import atomic_path

    check_output(arguments.output, arguments.to)
    base = open_base(arguments.base)
    states, weights = read_mix(arguments.adapter, arguments.part, base)
    options = BlendOptions(density=arguments.density, seed=arguments.seed)
    with progress("blending") as advance:
        blended = blend_with_report(
            states, weights, base=base, mode=arguments.mode, rank=arguments.rank, options=options, progress=advance
        )
    with atomic_path(arguments.output) as path:
        save_adapter(blended.adapter, path, format=arguments.to)
        written = load_adapter(path, base=base)
        if arguments.mode in MODES:
            with progress("reading back") as advance:
                found = verify_blend(written, states, weights, base=base, mode=arguments.mode, progress=advance)
            sentence = f"{found.sentence()} against the live {arguments.mode} mix"
        else:
            sentence = verify_copy(written, blended.adapter).sentence()
    print(f"wrote {arguments.output} ({arguments.to})\n{blended.report.sentence()}\n{sentence}")
    return 0


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
