"""What lies in a folder of adapters: files, pictures and notes beside them. Names and dates only, nothing is opened.

Ten thousand files are listed on every look, so this is `os.scandir` and strings.
"""

import os
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dora_diffusion.formats.safetensors_reader import shown

SUFFIX = ".safetensors"
MOST_FOLDERS, MOST_FILES, DEEPEST = 5_000, 50_000, 8
# As A1111, ComfyUI's browsers and civitai's downloaders call them; the first that is there counts.
_PICTURES = (".preview.png", ".png", ".preview.jpg", ".jpg", ".preview.jpeg", ".jpeg", ".preview.webp", ".webp")
_NOTES = (".civitai.info", ".json")
_PEFT_CONFIG = "adapter_config.json"
_PEFT_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
# In the folder of a checkpoint only this is an adapter: the rest belongs to the training.
_CHECKPOINT, _ITS_ADAPTER = {"manifest.json", "optimizer.safetensors"}, "adapter.safetensors"
_WHOLE_MODEL = "model_index.json"


class Stamp(NamedTuple):
    """What tells a changed file from the one that was read."""

    modified_ns: int
    size: int


class Entry(NamedTuple):
    """One adapter as the folder lists it.

    Attributes:
        name: its path inside the folder, with `/` between parts and without the suffix.
        path: where it lies.
        stamp: its state, and that of the note beside it; None when it cannot be asked for.
        problem: why it cannot be an adapter, or None.
        thumbnail, note: paths beside it, or None.
    """

    name: str
    path: str
    stamp: Stamp | None
    problem: str | None = None
    thumbnail: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Listing:
    """A folder's adapters, and what was left out in one line (empty: nothing)."""

    entries: tuple[Entry, ...]
    left_out: str


def stamp_of(path: Path) -> Stamp:
    """The present state of a file; of a folder, of all that it holds: the newest date and the sum of sizes."""
    if not path.is_dir():
        status = path.stat()
        return Stamp(status.st_mtime_ns, status.st_size)
    inside = [file.stat() for file in path.rglob("*") if file.is_file()]
    return Stamp(max((s.st_mtime_ns for s in inside), default=0), sum(s.st_size for s in inside))


def list_folder(folder: Path) -> Listing:
    """Adapters of a folder and its subfolders; hidden ones, whole models and the rest of checkpoints are left out."""
    entries: list[Entry] = []
    waiting, seen, left_out = deque([(str(folder), "", 0)]), set[tuple[int, int]](), ""
    while waiting:
        where, prefix, depth = waiting.popleft()
        if len(seen) >= MOST_FOLDERS or len(entries) >= MOST_FILES:
            left_out = f"Only the first {len(entries)} files in {len(seen)} folders are listed."
            break
        inside = _inside(where, seen)
        if _WHOLE_MODEL in inside:
            continue
        entries += _adapters(inside, prefix)
        for name, item in inside.items():
            if _is_folder(item) and not name.endswith(SUFFIX):
                if (adapter := _peft(item, f"{prefix}{name}")) is not None:
                    entries.append(adapter)
                elif depth < DEEPEST:
                    waiting.append((item.path, f"{prefix}{name}/", depth + 1))
    return Listing(tuple(entries), left_out)


def _inside(where: str, seen: set[tuple[int, int]]) -> Mapping[str, os.DirEntry[str]]:
    """What a folder holds, by name; nothing for one that was seen (links may go round) or cannot be read."""
    try:
        status = os.stat(where)
        if (status.st_dev, status.st_ino) in seen:
            return {}
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(where) as items:
            return {item.name: item for item in items if not item.name.startswith(".")}
    except OSError:
        return {}


def _adapters(inside: Mapping[str, os.DirEntry[str]], prefix: str) -> Iterator[Entry]:
    is_checkpoint = inside.keys() >= _CHECKPOINT
    for name, item in inside.items():
        if name.endswith(SUFFIX) and (name == _ITS_ADAPTER or not is_checkpoint):
            yield _entry(item, prefix, inside)


def _entry(item: os.DirEntry[str], prefix: str, inside: Mapping[str, os.DirEntry[str]]) -> Entry:
    stem = item.name[: -len(SUFFIX)]
    name = prefix + stem
    if shown(name, len(name)) != name:  # what cannot be printed or encoded cannot be picked in a browser either
        return Entry(shown(name, len(name)), item.path, None, "its name cannot be shown here; rename the file")
    try:
        status = item.stat()
    except OSError as error:
        return Entry(name, item.path, None, f"cannot be read ({error.strerror or type(error).__name__})")
    picture = next((inside[found].path for end in _PICTURES if (found := stem + end) in inside), None)
    note = next((inside[found] for end in _NOTES if (found := stem + end) in inside), None)
    noted = 0 if note is None else _modified(note)
    stamp = Stamp(max(status.st_mtime_ns, noted), status.st_size)
    return Entry(name, item.path, stamp, None, picture, None if note is None else note.path)


def _modified(item: os.DirEntry[str]) -> int:
    try:
        return item.stat().st_mtime_ns
    except OSError:
        return 0


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:
        return False


def _peft(item: os.DirEntry[str], name: str) -> Entry | None:
    """A folder of PEFT's, or one that holds such folders named by component."""
    configs = (_PEFT_CONFIG, *(f"{part}/{_PEFT_CONFIG}" for part in _PEFT_PARTS))
    if not any(os.path.isfile(os.path.join(item.path, config)) for config in configs):
        return None
    try:
        return Entry(f"{name}/", item.path, stamp_of(Path(item.path)))
    except OSError as error:
        return Entry(f"{name}/", item.path, None, f"cannot be read ({error.strerror or type(error).__name__})")
