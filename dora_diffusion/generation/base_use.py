"""The base that a picture was drawn with, as its PNG names it: where it lies, and the files of parts of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_diffusion.utils.atomic import sha256_of
from dora_diffusion.utils.checks import check_fields
from dora_diffusion.utils.text import shown_path

PARTS = ("transformer", "unet", "vae")


@dataclass(frozen=True)
class PartUse:
    """A file that stood in for a part of the base: `unet`, where it lay, and its hash."""

    part: str
    file: str
    sha256: str

    def __post_init__(self) -> None:
        check_fields(self)
        if self.part not in PARTS:
            raise ValueError(f"part {self.part[:40]!r}: expected one of {', '.join(PARTS)}")


@dataclass(frozen=True)
class BaseUse:
    """A base, as it was drawn with.

    Attributes:
        source: what `load_pipeline` took.
        dtype: `fp32` and the like.
        device: "cpu", "cuda", "mps".
        config: the folder or hub id beside a single file; None without one.
        sha256: of a base that is a single file; None for any other.
        parts: the files that stood in for its own.
    """

    source: str
    dtype: str = "fp32"
    device: str = "cpu"
    config: str | None = None
    sha256: str | None = None
    parts: tuple[PartUse, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def files(self) -> dict[str, Path]:
        """Part -> file, as `load_pipeline` takes them."""
        return {use.part: Path(use.file) for use in self.parts}


def hashed_parts(files: Mapping[str, Path | None]) -> tuple[PartUse, ...]:
    """Part -> file as records; a ValueError for a file that is not there."""
    given = {part: file for part, file in files.items() if file is not None}
    return tuple(PartUse(part, str(file), hash_of_file(file)) for part, file in given.items())


def hash_of_source(source: str | Path) -> str | None:
    """The hash of a base that is a single file; None for a folder, an embedded base or a hub id."""
    path = Path(source)
    return hash_of_file(path) if path.suffix and path.is_file() else None


def hash_of_file(path: Path) -> str:
    """SHA-256 of a file; a ValueError of one line when there is none."""
    if not path.is_file():
        raise ValueError(f"{shown_path(path)}: no such file")
    return sha256_of(path)


def base_of_entry(entry: Mapping[str, Any] | None) -> BaseUse | None:
    """What a PNG's record says of the base, None where it says nothing; ValueErrors for what is no such record."""
    if entry is None:
        return None
    parts = tuple(
        PartUse(str(one["part"]), str(one["file"]), str(one["sha256"])) for one in entry["parts"][: len(PARTS)]
    )
    known = ("source", "dtype", "device", "config", "sha256")
    return BaseUse(**{name: entry[name] for name in known}, parts=parts)
