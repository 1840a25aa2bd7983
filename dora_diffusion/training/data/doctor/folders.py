"""What lies in a folder: pictures, their captions and masks, and files that are none of these."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.training.data.captions import (
    CAPTION_SUFFIXES,
    METADATA,
    METADATA_FILES,
    Captions,
    find_captions,
    find_sidecar,
    read_metadata,
    sidecars_of,
    with_trigger,
)
from dora_diffusion.training.data.concepts import Source, repeated_folders
from dora_diffusion.training.data.doctor.findings import Finding, reason_of
from dora_diffusion.training.data.examples import Example, find_pictures, or_else
from dora_diffusion.training.data.masks import MASK_FOLDER, Masks, find_masks, is_mask
from dora_diffusion.utils.images import SUFFIXES, list_files, natural_order, read_image
from dora_diffusion.utils.text import shown_path

if TYPE_CHECKING:  # a folder alone needs no pydantic
    from dora_diffusion.training.config import DataConfig

# Files for people, and litter of file managers: neither pictures nor captions, and nothing is lost with them.
_NOTES = frozenset({"readme", "license", "licence", "notice", "credits", "attribution", "sources"})
_LITTER = frozenset({"thumbs.db", "desktop.ini"})


@dataclass(frozen=True)
class Folder:
    """What is seen in one folder.

    Attributes:
        pictures: to learn.
        masks: of them.
        examples: those that have a caption.
        findings: what is wrong.
    """

    pictures: tuple[Path, ...]
    masks: Masks
    examples: tuple[Example, ...]
    findings: tuple[Finding, ...]


def look_through(source: Source, data: "DataConfig | None") -> Folder:
    """Take a folder apart; no picture is opened, but for those of no picture's name.

    Args:
        source: the folder, and the caption and trigger of its pictures.
        data: where triggers and captions' rules are known.

    Raises:
        ValueError: no such folder, or no pictures in it.
    """
    folder, findings = source.folder, list[Finding]()
    files = list_files(folder)
    listed: dict[Path, Captions] = {}
    has_bad_metadata = False
    try:
        listed = read_metadata(folder)
    except ValueError as error:
        metadata = next(path for path in (folder / name for name in METADATA_FILES) if path.is_file())
        findings.append(Finding("corrupt", metadata, reason_of(error, metadata)))
        has_bad_metadata = True
    found = find_pictures(folder, listed)
    masks = find_masks(found)
    pictures = tuple(path for path in found if not is_mask(path))
    examples: list[Example] = []
    for path in pictures:
        try:
            captions = _captions(path, listed, source, data)
        except _NoCaption as error:
            # no hail of missing captions where the file that holds them is the fault
            findings += [] if has_bad_metadata and error.finding.kind == "missing-caption" else [error.finding]
        else:
            mask, own = masks.of.get(path), source.resolutions
            examples.append(Example(path, captions[0], captions[1:], resolutions=own, mask=mask))
    findings += [*_orphan_masks(masks), *_same_stems(pictures, masks)]
    findings += [*_other_files(files, pictures), *_subfolders(folder, pictures, masks)]
    return Folder(pictures, masks, tuple(examples), tuple(findings))


class _NoCaption(Exception):
    """A picture has none that can be used."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.message)
        self.finding = finding


def _captions(path: Path, listed: Mapping[Path, Captions], source: Source, data: "DataConfig | None") -> Captions:
    """A picture's captions as they are trained."""
    try:
        own = find_captions(path, listed)
    except ValueError as error:
        sidecar = find_sidecar(path) or path
        raise _NoCaption(Finding("corrupt", sidecar, reason_of(error, sidecar))) from None
    by_name = data is not None and data.captions.from_file_name
    captions = or_else(own, path, source.prompt, from_file_name=by_name)
    if captions:
        try:
            return captions if data is None else with_trigger(captions, source.trigger, shown_path(path))
        except ValueError as error:
            raise _NoCaption(Finding("bad-caption", path, reason_of(error, path))) from None
    if own is None:
        message = f"no {shown_path(path.stem)}.txt, no line in {METADATA}, no instance prompt"
        raise _NoCaption(Finding("missing-caption", path, message))
    message = "its caption is empty; write one, or remove it to use the instance prompt"
    raise _NoCaption(Finding("empty-caption", path, message))


def _orphan_masks(masks: Masks) -> Iterator[Finding]:
    for path in masks.orphans:
        yield Finding("orphan-mask", path, "by its name a mask, but of no picture here; rename it or take it out")


def _same_stems(pictures: Sequence[Path], masks: Masks) -> Iterator[Finding]:
    """Pictures that share a caption's file or a mask with an earlier one."""
    for what, owned in (
        ("caption", {path: sidecar for path in pictures if (sidecar := find_sidecar(path)) is not None}),
        ("mask", masks.of),
    ):
        first: dict[Path, Path] = {}
        for path in pictures:
            if path in owned and (owner := first.setdefault(owned[path], path)) != path:
                names = f"{shown_path(owned[path].name)} with {shown_path(owner.name)}"
                yield Finding("same-stem", path, f"shares the {what} {names}; rename one of the pictures")


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


def _subfolders(folder: Path, pictures: Sequence[Path], masks: Masks) -> Iterator[Finding]:
    """Folders that hold pictures which no line of the metadata names, and that are no masks."""
    used = {*pictures, *masks.of.values(), *masks.orphans}
    used.update(path for repeated in repeated_folders(folder) for path in repeated.path.iterdir())
    used.update(path for repeated in repeated_folders(folder) for path in (repeated.path / MASK_FOLDER).glob("*"))
    for inner in sorted((path for path in folder.iterdir() if path.is_dir()), key=natural_order):
        if inner.name.startswith("."):
            continue
        unused = [path for path in inner.rglob("*") if path.suffix.lower() in SUFFIXES and path not in used]
        if unused:
            yield Finding("subfolder", inner, f"pictures in it are not used ({len(unused)}); move them up")


def mask_note(folders: Sequence[Folder], data: "DataConfig | None") -> list[str]:
    """That masks are there which a config does not use."""
    there = sorted({mask for folder in folders for mask in folder.masks.of.values()}, key=natural_order)
    if data is None or data.mask_outside is not None or not there:
        return []
    first = shown_path(there[0].name)
    if len(there) == 1:
        return [f"1 mask ({first}) is not used; set data.mask_outside to use it"]
    return [f"{len(there)} masks ({first} ...) are not used; set data.mask_outside to use them"]
