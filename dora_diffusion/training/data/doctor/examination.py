"""The examination of a folder, or of all that a config names: every check, in one report."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.training.data.buckets import LONGEST_ASPECT, SLIVER_ASPECT
from dora_diffusion.training.data.concepts import Source, sources_in, sources_of
from dora_diffusion.training.data.doctor.duplicates import duplicates
from dora_diffusion.training.data.doctor.findings import IS_LOSS, DoctorReport, Finding
from dora_diffusion.training.data.doctor.folders import Folder, look_through, mask_note
from dora_diffusion.training.data.doctor.looks import Asked, Look, look_at_all, notes_of
from dora_diffusion.training.data.examples import Example
from dora_diffusion.utils.images import natural_order
from dora_diffusion.utils.progress import Progress

if TYPE_CHECKING:  # a folder alone needs neither torch nor pydantic
    from dora_diffusion.training.config import DataConfig, TrainConfig
    from dora_diffusion.training.data.doctor.captions_read import Reading
    from dora_diffusion.training.data.doctor.shapes import Sizing

MIN_SIDE = 64
# Where pictures are cropped to squares, longer ones lose most of what they show.
_LONGEST_IN_SQUARE = 3


def _silent(done: int, total: int) -> None:
    """Nobody is told how far it is."""


@dataclass(frozen=True)
class _Checks:
    """What pictures are examined by.

    Attributes:
        data: a config's, where there is one.
        sizing: where it is known at which sizes pictures are trained.
        reading: where it is known what reads the captions.
        min_side: pictures with a shorter side are tiny.
    """

    data: "DataConfig | None" = None
    sizing: "Sizing | None" = None
    reading: "Reading | None" = None
    min_side: int = MIN_SIDE


def examine(
    folder: str | Path,
    *,
    instance_prompt: str | None = None,
    min_side: int = MIN_SIDE,
    model: str | None = None,
    resolutions: Sequence[int] = (),
    progress: Progress = _silent,
) -> DoctorReport:
    """Read every picture and caption of a folder and say what is wrong with them.

    Args:
        folder: as for `find_examples`.
        instance_prompt: the caption of pictures that have none of their own; None makes those a finding.
        min_side: pictures with a shorter side, in pixels, are "tiny".
        model: the base that will be trained: pictures are put in its buckets, captions read by its tokenizers.
        resolutions: to train at; () = the base's own, or, without one, no buckets.
        progress: is told how many pictures have been read.

    Raises:
        ValueError: no such folder, no pictures in it, no such base, or a resolution that it cannot be trained at.
    """
    folder = Path(folder)
    sources = sources_in(folder, instance_prompt)
    checks = _Checks(min_side=min_side)
    if model is not None or resolutions:
        from dora_diffusion.training.config import DataConfig
        from dora_diffusion.training.data.doctor.captions_read import base_of, without_base

        for side in resolutions:
            if side < 8 or side % 8:
                raise ValueError(f"resolution: got {side}, expected a multiple of 8 pixels")
        sides = list(resolutions) or None
        data = DataConfig(instance_dir=folder, instance_prompt=instance_prompt or None, resolution=sides)
        sizing, reading = without_base(data) if model is None else base_of(model, data)
        checks = replace(checks, sizing=sizing, reading=reading)
    return _examine(folder, sources, checks, progress)


def examine_config(config: "TrainConfig", *, progress: Progress = _silent) -> DoctorReport:
    """Read the pictures and captions of all folders of a config, as its training would.

    Args:
        config: with its base, its resolutions, and what it makes of captions and masks.
        progress: is told how many pictures have been read.

    Raises:
        ValueError: as `examine`.
    """
    from dora_diffusion.training.data.doctor.captions_read import base_of

    sources = sources_of(config.data)
    sizing, reading = base_of(config.model, config.data, config.words)
    folder = Path(os.path.commonpath([source.folder for source in sources]))
    return _examine(folder, sources, _Checks(config.data, sizing, reading), progress)


def _examine(folder: Path, sources: Sequence[Source], checks: _Checks, progress: Progress) -> DoctorReport:
    folders = [look_through(source, checks.data) for source in sources]
    looks, findings = look_at_all(_asked(folders, checks.data), progress)
    findings += [finding for part in folders for finding in part.findings]
    findings += [*_shape_findings(looks, checks), *duplicates(looks)]
    originals = {look.path: look.size for look in looks if not _is_sliver(look)}
    examples = [
        replace(example, original=originals[example.path])
        for part in folders
        for example in part.examples
        if example.path in originals
    ]
    sized: list[Example] = []
    if checks.sizing is not None:
        from dora_diffusion.training.data.doctor.shapes import sized_examples

        sized, too_small = sized_examples(examples, checks.sizing)
        findings += too_small
    if checks.reading is not None:
        findings += checks.reading.findings(examples)
    return DoctorReport(
        folder,
        len({path for part in folders for path in part.pictures}),
        tuple(look.size for look in looks),
        tuple(_in_order(findings)),
        (*mask_note(folders, checks.data), *notes_of(looks)),
        tuple(sized),
        "" if checks.sizing is None else str(checks.sizing),
    )


def _asked(folders: Sequence[Folder], data: "DataConfig | None") -> list[Asked]:
    """Every picture once. What a mask is like is asked where it is used, or may be."""
    asked: dict[Path, Asked] = {}
    for folder in folders:
        for path in folder.pictures:
            mask = folder.masks.of.get(path)
            uses_mask = mask is not None if data is None else data.mask_outside is not None
            asked[path] = Asked(path, mask, uses_mask)
    return list(asked.values())


def _in_order(findings: Sequence[Finding]) -> list[Finding]:
    """The gravest kind first, each once."""
    order = {kind: number for number, kind in enumerate(IS_LOSS)}
    once = list(dict.fromkeys(findings))
    return sorted(once, key=lambda finding: (order[finding.kind], natural_order(finding.path)))


def _is_sliver(look: Look) -> bool:
    return max(look.size) > SLIVER_ASPECT * min(look.size)


def _shape_findings(looks: Sequence[Look], checks: _Checks) -> Iterator[Finding]:
    in_squares = checks.data is not None and not checks.data.buckets
    for look in looks:
        pixels = f"{look.size[0]}x{look.size[1]} pixels"
        if min(look.size) < checks.min_side:
            message = f"{pixels}, expected at least {checks.min_side} on the shorter side"
            yield Finding("tiny", look.path, message)
        if _is_sliver(look):
            message = f"{pixels}, longer than {SLIVER_ASPECT}:1, which training refuses; crop it or take it out"
            yield Finding("sliver", look.path, message)
        elif in_squares and max(look.size) > _LONGEST_IN_SQUARE * min(look.size):
            yield Finding("odd-shape", look.path, f"{pixels}: cropped to a square, most of it is cut off")
        elif max(look.size) > LONGEST_ASPECT * min(look.size):
            cut = 100 * (1 - LONGEST_ASPECT * min(look.size) / max(look.size))
            message = f"{pixels}, longer than {LONGEST_ASPECT}:1: at least {cut:.0f} % of it is cut off"
            yield Finding("odd-shape", look.path, message)
