"""The folder of adapters: what can be picked, found out from file headers only."""

from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.formats import detect_format


@dataclass(frozen=True)
class Stamp:
    """What tells a changed file from the one that was read."""

    modified_ns: int
    size: int


@dataclass(frozen=True)
class AdapterFile:
    """One file of the folder.

    Attributes:
        name: its path inside the folder without `.safetensors`, with `/` between parts; what the user picks.
        path: where it lies.
        stamp: the file's state when its header was read; None when even that failed.
        problem: why it cannot be used, in one line; None when its header is sound.
    """

    name: str
    path: Path
    stamp: Stamp | None
    problem: str | None


def stamp_of(path: Path) -> Stamp:
    """The file's present state."""
    status = path.stat()
    return Stamp(status.st_mtime_ns, status.st_size)


def _header_problem(path: Path) -> str | None:
    """Why the file is no adapter, in one line; None when its header is one's."""
    try:
        detect_format(path)
    except ValueError as error:
        return str(error).removeprefix(f"{path}: ")
    return None


class AdapterLibrary:
    """Files of a folder and of its direct subfolders, each header read once until the file changes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, AdapterFile] = {}

    @property
    def files(self) -> tuple[AdapterFile, ...]:
        """What the last `refresh` found, by name."""
        return tuple(self._files.values())

    @property
    def usable(self) -> tuple[str, ...]:
        """Names of the files whose header is sound."""
        return tuple(file.name for file in self._files.values() if file.problem is None)

    @property
    def broken(self) -> tuple[AdapterFile, ...]:
        """The others, with their reasons."""
        return tuple(file for file in self._files.values() if file.problem is not None)

    def refresh(self) -> None:
        """Look into the folder again."""
        paths = [*self.folder.glob("*.safetensors"), *self.folder.glob("*/*.safetensors")]
        visible = (path for path in paths if not path.relative_to(self.folder).as_posix().startswith("."))
        found = [self._look_at(path) for path in visible]
        self._files = {file.name: file for file in sorted(found, key=lambda file: file.name.lower())}

    def find(self, name: str) -> AdapterFile:
        """The file of that name.

        Raises:
            ValueError: it is not in the folder, or its header is broken.
        """
        if name not in self._files:
            raise ValueError(f"{name}: no such adapter in {self.folder}; press Refresh and pick one of the list")
        file = self._files[name]
        if file.problem is not None:
            raise ValueError(f"{name}: {file.problem}")
        return file

    def _look_at(self, path: Path) -> AdapterFile:
        name = path.relative_to(self.folder).with_suffix("").as_posix()
        try:
            stamp = stamp_of(path)
        except OSError as error:
            return AdapterFile(name, path, None, f"cannot be read ({error.strerror or type(error).__name__})")
        known = self._files.get(name)
        if known is not None and known.stamp == stamp:
            return known
        return AdapterFile(name, path, stamp, _header_problem(path))
