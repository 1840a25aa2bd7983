"""The doctor: what is wrong with a folder of pictures, before any model is loaded.

It reads captions and pictures with the very functions that training uses, so the two cannot disagree.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dora_diffusion.training.data.captions import (
    CAPTION_SUFFIXES,
    METADATA,
    METADATA_FILES,
    Captions,
    find_captions,
    find_sidecar,
    read_metadata,
    sidecars_of,
)
from dora_diffusion.training.data.concepts import repeated_folders
from dora_diffusion.training.data.examples import find_pictures
from dora_diffusion.utils.atomic import sha256_of
from dora_diffusion.utils.images import SUFFIXES, list_files, natural_order, read_image
from dora_diffusion.utils.text import shown_path

Kind = Literal[
    "corrupt",
    "missing-caption",
    "empty-caption",
    "orphan-caption",
    "not-an-image",
    "subfolder",
    "duplicate",
    "tiny",
    "odd-shape",
]

# In the order of the report; True where training would fail or something that lies in the folder would not be used.
_IS_LOSS: dict[Kind, bool] = {
    "corrupt": True,
    "missing-caption": True,
    "empty-caption": True,
    "orphan-caption": True,
    "not-an-image": True,
    "subfolder": True,
    "duplicate": False,
    "tiny": False,
    "odd-shape": False,
}

# Files for people, and litter of file managers: neither pictures nor captions, and nothing is lost with them.
_NOTES = frozenset({"readme", "license", "licence", "notice", "credits", "attribution", "sources"})
_LITTER = frozenset({"thumbs.db", "desktop.ini"})

_LONGEST_ASPECT = 3.0

# Re-saving, halving, brightening by a tenth or a slight crop stay below both; the same drawing on another background,
# or two drawings alike in shape, do not (tried on DreamBooth's photos and on emoji).
_NEAR_BITS = 6
_NEAR_COLOUR = 20.0


@dataclass(frozen=True)
class Finding:
    """One fault.

    Attributes:
        kind: what sort of fault.
        path: the file, or subfolder, that has it.
        message: what is wrong and how to mend it, without the path.
    """

    kind: Kind
    path: Path
    message: str


@dataclass(frozen=True)
class DoctorReport:
    """What was found in a folder.

    Attributes:
        folder: the folder examined.
        images: pictures that training would use, damaged ones included.
        sizes: (width, height) in pixels of every readable picture, upright.
        findings: the faults, gravest kind first, then in natural order.
    """

    folder: Path
    images: int
    sizes: tuple[tuple[int, int], ...]
    findings: tuple[Finding, ...]

    @property
    def losses(self) -> tuple[Finding, ...]:
        """The findings by which training would fail, or leave out something that lies in the folder."""
        return tuple(finding for finding in self.findings if _IS_LOSS[finding.kind])


@dataclass(frozen=True)
class _Look:
    """What is kept of a picture once it has been read: size, hash of its bytes, and how it looks from afar."""

    path: Path
    size: tuple[int, int]
    digest: str
    gradient_bits: int
    colours: NDArray[np.float32]


def examine(folder: str | Path, *, instance_prompt: str | None = None, min_side: int = 64) -> DoctorReport:
    """Read every picture and caption of a folder and say what is wrong with them.

    Args:
        folder: as for `find_examples`.
        instance_prompt: the caption of pictures that have none of their own; None makes those a finding.
        min_side: pictures with a shorter side, in pixels, are "tiny".

    Raises:
        ValueError: no such folder, or no pictures in it.
    """
    folder = Path(folder)
    repeated = repeated_folders(folder) if folder.is_dir() else []
    has_own = not repeated or any(path.suffix.lower() in SUFFIXES for path in list_files(folder))
    parts = [_examine_one(folder, instance_prompt)] if has_own else []
    parts += [_examine_one(inner.path, instance_prompt or inner.prompt) for inner in repeated]
    looks = [look for part in parts for look in part.looks]
    findings = [finding for part in parts for finding in part.findings]
    findings += [*_shape_findings(looks, min_side), *_duplicates(looks)]
    order = list(_IS_LOSS)
    findings.sort(key=lambda finding: (order.index(finding.kind), natural_order(finding.path)))
    images = sum(part.images for part in parts)
    return DoctorReport(folder, images, tuple(look.size for look in looks), tuple(findings))


@dataclass(frozen=True)
class _Part:
    """What is seen in one folder."""

    images: int
    looks: list[_Look]
    findings: list[Finding]


def _examine_one(folder: Path, instance_prompt: str | None) -> _Part:
    files = list_files(folder)
    findings: list[Finding] = []
    listed: dict[Path, Captions] = {}
    try:
        listed = read_metadata(folder)
    except ValueError as error:
        metadata = next(path for path in (folder / name for name in METADATA_FILES) if path.is_file())
        findings.append(Finding("corrupt", metadata, _without_path(error, metadata)))
        instance_prompt = instance_prompt or "unknown"  # no hail of missing captions: the file is the fault
    pictures = find_pictures(folder, listed)
    looks: list[_Look] = []
    for path in pictures:
        try:
            looks.append(_look(path))
        except ValueError as error:
            findings.append(Finding("corrupt", path, _without_path(error, path)))
    findings += _caption_findings(pictures, listed, instance_prompt)
    findings += _other_files(files, pictures)
    findings += _subfolders(folder, pictures)
    return _Part(len(pictures), looks, findings)


def _without_path(error: ValueError, path: Path) -> str:
    """`FILE: reason` -> `reason`, `FILE:3: reason` -> `line 3: reason`."""
    rest = str(error).removeprefix(f"{shown_path(path)}:")
    return f"line {rest}" if rest[:1].isdigit() else rest.strip()


def _look(path: Path) -> _Look:
    picture = read_image(path)
    grey = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX))
    # Krawetz's difference hash: where it grows brighter from left to right, on a grid of 8 x 8.
    bits = (grey[:, 1:] > grey[:, :-1]).ravel()
    colours = np.asarray(picture.resize((8, 8), Image.Resampling.BOX)).astype(np.float32)
    return _Look(path, picture.size, sha256_of(path), int.from_bytes(np.packbits(bits).tobytes(), "big"), colours)


def _caption_findings(
    pictures: Sequence[Path], listed: Mapping[Path, Captions], instance_prompt: str | None
) -> Iterator[Finding]:
    for path in pictures:
        try:
            captions = find_captions(path, listed)
        except ValueError as error:
            sidecar = find_sidecar(path) or path
            yield Finding("corrupt", sidecar, _without_path(error, sidecar))
            continue
        if captions is None and instance_prompt is None:
            yield Finding(
                "missing-caption", path, f"no {shown_path(path.stem)}.txt, no line in {METADATA}, no instance prompt"
            )
        elif captions == ():
            yield Finding(
                "empty-caption", path, "its caption is empty; write one, or remove it to use the instance prompt"
            )


def _other_files(files: Sequence[Path], pictures: Sequence[Path]) -> Iterator[Finding]:
    """Files of the folder that are no pictures, or captions of none."""
    sidecars = {sidecar for path in pictures for sidecar in sidecars_of(path)}
    for path in files:
        suffix = path.suffix.lower()
        is_note = path.stem.lower() in _NOTES and suffix in ("", ".txt", ".md")
        if suffix in SUFFIXES or path.name in METADATA_FILES or is_note or path.name.lower() in _LITTER:
            continue
        if suffix not in CAPTION_SUFFIXES:
            yield Finding("not-an-image", path, _why_unused(path))
        elif path not in sidecars:
            yield Finding("orphan-caption", path, "a caption without a picture of its name")


def _why_unused(path: Path) -> str:
    if path.suffix.lower() in (".heic", ".heif"):
        return "HEIC is not read; save it as JPEG or PNG"
    try:
        read_image(path)
    except ValueError:
        return "neither a picture nor a caption; it is not used"
    return f"a picture, but the suffix {path.suffix!r} is not one of a picture; rename it"


def _subfolders(folder: Path, pictures: Sequence[Path]) -> Iterator[Finding]:
    """Folders that hold pictures which no line of the metadata names."""
    used = set(pictures)
    used.update(path for repeated in repeated_folders(folder) for path in repeated.path.iterdir())
    for inner in sorted((path for path in folder.iterdir() if path.is_dir()), key=natural_order):
        if inner.name.startswith("."):
            continue
        unused = [path for path in inner.rglob("*") if path.suffix.lower() in SUFFIXES and path not in used]
        if unused:
            yield Finding("subfolder", inner, f"pictures in it are not used ({len(unused)}); move them up")


def _shape_findings(looks: Sequence[_Look], min_side: int) -> Iterator[Finding]:
    for look in looks:
        width, height = look.size
        if min(look.size) < min_side:
            yield Finding(
                "tiny", look.path, f"{width}x{height} pixels, expected at least {min_side} on the shorter side"
            )
        if max(look.size) > _LONGEST_ASPECT * min(look.size):
            yield Finding(
                "odd-shape", look.path, f"{width}x{height} pixels: cropped to a square, most of it is cut off"
            )


def _duplicates(looks: Sequence[_Look]) -> Iterator[Finding]:
    """Each picture that equals, or nearly equals, an earlier one."""
    for index, look in enumerate(looks):
        earlier = looks[:index]
        same = next((other for other in earlier if other.digest == look.digest), None)
        near = same or next((other for other in earlier if _nearly_equal(look, other)), None)
        if near is not None:
            how = "the same bytes as" if same else "nearly the same picture as"
            yield Finding("duplicate", look.path, f"{how} {shown_path(near.path.name)}; keep one of them")


def _nearly_equal(one: _Look, other: _Look) -> bool:
    if (one.gradient_bits ^ other.gradient_bits).bit_count() > _NEAR_BITS:
        return False
    return float(np.abs(one.colours - other.colours).mean()) <= _NEAR_COLOUR


def format_report(report: DoctorReport) -> str:
    """The report for people: a summary, one line for each finding, and the verdict."""
    lines = [f"{shown_path(report.folder)}: {report.images} {'picture' if report.images == 1 else 'pictures'}"]
    if report.sizes:
        lines.append(_size_summary(report.sizes))
    counts = Counter(finding.kind for finding in report.findings)
    if counts:
        lines.append("found: " + ", ".join(f"{counts[kind]} {kind}" for kind in _IS_LOSS if counts[kind]))
    for finding in report.findings:
        lines.append(f"  {finding.kind}: {shown_path(finding.path.relative_to(report.folder))}: {finding.message}")
    if report.losses:
        lines.append(f"{len(report.losses)} of these would be lost, or make training fail: mend them first")
    else:
        lines.append("nothing would be lost")
    return "\n".join(lines)


def _size_summary(sizes: Sequence[tuple[int, int]]) -> str:
    widths, heights = zip(*sizes, strict=True)
    shapes = Counter("square" if w == h else "landscape" if w > h else "portrait" for w, h in sizes)
    named = ", ".join(f"{shapes[shape]} {shape}" for shape in ("square", "landscape", "portrait") if shapes[shape])
    return f"widths {min(widths)}-{max(widths)}, heights {min(heights)}-{max(heights)} pixels; {named}"
