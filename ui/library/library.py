"""The folder of adapters: what can be picked, found out from file headers only.

Ten thousand files are listed at once and read behind: `refresh` lists the folder, reads headers for a moment and
leaves the rest to a thread. What was read is kept until a file changes, in an index file across starts.
"""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from dora_diffusion.inspection.header import HeaderSummary, Structure, summarise_header
from ui.library.shelf import Entry, Stamp, list_folder, stamp_of
from ui.library.shelf_index import Known, default_index, read_index, write_index
from ui.library.shelf_notes import words_beside

__all__ = ["AdapterFile", "AdapterLibrary", "Stamp", "stamp_of"]

PATIENCE = 1.5  # seconds of reading headers that a `refresh` waits for
INDEXED_FROM = 256  # files; fewer are read before anyone notices
SAVE_EVERY = 20.0  # seconds, while headers are read behind


@dataclass(frozen=True)
class AdapterFile:
    """One file of the folder, or one folder of PEFT's, whose name then ends with `/`.

    Attributes:
        name: its path inside the folder without `.safetensors`, with `/` between parts; what the user picks.
        where: the path where it lies.
        stamp: the file's state when its header was read; None when even that failed.
        problem: why it cannot be used, in one line; None when its header is sound, or not read yet.
        seen: what its header says; None when it is broken, or not read yet.
        thumbnail: a picture beside it, or None.
        note: a file of another tool beside it that tells its trigger words, or None.
    """

    name: str
    where: str
    stamp: Stamp | None
    problem: str | None
    seen: HeaderSummary | None = None
    thumbnail: str | None = None
    note: str | None = None

    @property
    def path(self) -> Path:
        """Where it lies."""
        return Path(self.where)  # made when it is asked for: ten thousand would take a while

    @property
    def is_read(self) -> bool:
        """Whether its header was looked at."""
        return self.seen is not None or self.problem is not None

    @property
    def title(self) -> str:
        """What its maker calls it, or else the last part of its name."""
        return (self.seen.declared.title if self.seen else "") or self.name.rstrip("/").rpartition("/")[2]

    @property
    def kind(self) -> str:
        """ "DoRA", "LoRA" ...; empty when nothing is known of it."""
        return self.seen.structure.kind if self.seen else ""

    @property
    def family(self) -> str:
        """The model family it is for; empty when that is not known."""
        return self.seen.structure.family if self.seen else ""

    @property
    def rank(self) -> str:
        """ "16", or "4 to 32"."""
        ranks = self.seen.structure.ranks if self.seen else ()
        return "" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"

    @property
    def base(self) -> str:
        """What its trainer called the base; empty when it says nothing."""
        return self.seen.declared.base if self.seen else ""

    @property
    def triggers(self) -> tuple[str, ...]:
        """Words and phrases to put into a prompt."""
        return self.seen.declared.triggers if self.seen else ()

    @property
    def tags(self) -> tuple[str, ...]:
        """What its captions are about, the most frequent first."""
        return self.seen.declared.tags if self.seen else ()

    @cached_property
    def haystack(self) -> str:
        """All that a search looks through, in small letters."""
        declared = self.seen.declared if self.seen else None
        texts = (
            ()
            if declared is None
            else (declared.title, declared.author, declared.base, *declared.triggers, *declared.tags)
        )
        return "\n".join((self.name, self.kind, *texts)).lower()

    @property
    def bytes(self) -> int:
        """Its size; 0 when it cannot be read."""
        return self.stamp.size if self.stamp else 0


class AdapterLibrary:
    """Adapters in a folder, each header read once until the file changes. Any thread may ask."""

    def __init__(self, folder: Path, *, index: Path | None = None) -> None:
        """Nothing is listed before the first `refresh`.

        Args:
            folder: searched with its subfolders.
            index: a JSON file that keeps what was read; by default one in the user's cache folder. It is written for
                folders of `INDEXED_FROM` files or more.
        """
        self.folder = folder
        self.version = 0
        self.notice = ""
        self._index = index or default_index(folder)
        self._remembered: dict[str, Known] | None = None
        self._files: dict[str, AdapterFile] = {}
        self._structures: dict[bytes, Structure] = {}
        self._lock = threading.RLock()
        self._reader: threading.Thread | None = None
        self._closing = threading.Event()
        self._looked, self._cost = float("-inf"), 0.0
        self._saved, self._saved_at = -1, float("-inf")

    @property
    def files(self) -> tuple[AdapterFile, ...]:
        """What the last `refresh` found, by name."""
        return tuple(self._files.values())

    @property
    def usable(self) -> tuple[str, ...]:
        """Names of the files whose header is sound, or not read yet."""
        return tuple(file.name for file in self.files if file.problem is None)

    @property
    def broken(self) -> tuple[AdapterFile, ...]:
        """The others, with their reasons."""
        return tuple(file for file in self.files if file.problem is not None)

    @property
    def unread(self) -> int:
        """How many headers are still to be read."""
        return sum(not file.is_read for file in self.files)

    def refresh(self, patience: float = PATIENCE) -> None:
        """Look into the folder again, and read new headers for some seconds; a thread reads the rest.

        `version` grows when anything has changed; `notice` says what was left out.
        """
        started = time.perf_counter()
        with self._lock:
            if self._remembered is None:
                self._remembered = read_index(self._index)
            listing = list_folder(self.folder)
            self.notice = listing.left_out
            self._take(listing.entries)
            self._looked, self._cost = time.monotonic(), time.perf_counter() - started
        self._read_until(time.perf_counter() + patience)
        if self.unread:
            self._read_behind()
        elif time.monotonic() - self._saved_at > SAVE_EVERY:
            self.save()

    def watch(self, every: float = 2.0) -> int:
        """Refresh unless that was done a moment ago, by whichever tab; returns `version`.

        A folder that takes long to list is listed less often: a fiftieth of the time at most.
        """
        if time.monotonic() - self._looked > max(every, 50 * self._cost):
            self.refresh(patience=0.1)
        return self.version

    def find(self, name: str) -> AdapterFile:
        """The file of that name; its header is read, if it was not.

        Raises:
            ValueError: it is not in the folder, or its header is broken.
        """
        file = self._files.get(name) if isinstance(name, str) else None
        if file is None:
            raise ValueError(f"{name}: no such adapter in {self.folder}; press Refresh and pick one of the list")
        if not file.is_read:
            file = self._read(file)
            self._put(file)
        if file.problem is not None:
            raise ValueError(f"{name}: {file.problem}")
        return file

    def close(self) -> None:
        """Stop reading, and keep what was read."""
        self._closing.set()
        if self._reader is not None:
            self._reader.join()
        self.save()

    def save(self) -> None:
        """Write the index, if anything was read since it was written."""
        files = self.files
        if len(files) < INDEXED_FROM or self._saved == self.version:
            return
        self._saved, self._saved_at = self.version, time.monotonic()
        known = {file.name: Known(file.stamp, file.problem, file.seen) for file in files if file.stamp and file.is_read}
        try:
            write_index(self._index, known)
        except OSError as error:
            self.notice = f"What was read cannot be kept in {self._index} ({error.strerror})."

    def _take(self, entries: Iterable[Entry]) -> None:
        """Make the list agree with the folder; what has not changed keeps what was read of it."""
        found = {entry.name: self._file_of(entry) for entry in entries}
        if found != self._files:
            self._files = dict(sorted(found.items(), key=lambda item: (item[0].lower(), item[0])))
            self.version += 1

    def _file_of(self, entry: Entry) -> AdapterFile:
        had = self._files.get(entry.name)
        if had is not None and had.stamp == entry.stamp is not None and had.note == entry.note:
            return had if had.thumbnail == entry.thumbnail else replace(had, thumbnail=entry.thumbnail)
        known = self._remembered.get(entry.name) if self._remembered else None
        file = AdapterFile(entry.name, entry.path, entry.stamp, entry.problem, None, entry.thumbnail, entry.note)
        if known is None or entry.problem is not None or known.stamp != entry.stamp:
            return file if file != had else had
        return replace(file, problem=known.problem, seen=known.seen)

    def _read(self, file: AdapterFile) -> AdapterFile:
        try:
            seen = summarise_header(file.path, self._structures)
        except ValueError as error:
            return replace(file, problem=str(error).removeprefix(f"{file.where}: "))
        if file.note is not None:
            words = dict.fromkeys((*words_beside(Path(file.note)), *seen.declared.triggers))
            seen = replace(seen, declared=replace(seen.declared, triggers=tuple(words)))
        return replace(file, seen=seen)

    def _read_until(self, end: float) -> None:
        for file in self.files:
            if time.perf_counter() > end or self._closing.is_set():
                return
            if not file.is_read:
                self._put(self._read(file))

    def _put(self, file: AdapterFile) -> None:
        """Note what was read, unless the file has changed or gone meanwhile."""
        with self._lock:
            had = self._files.get(file.name)
            if had is not None and had.stamp == file.stamp:
                self._files[file.name] = replace(file, thumbnail=had.thumbnail)
                self.version += 1

    def _read_behind(self) -> None:
        with self._lock:
            if self._reader is None or not self._reader.is_alive():
                self._reader = threading.Thread(target=self._read_all, name="adapter headers", daemon=True)
                self._reader.start()

    def _read_all(self) -> None:
        """Read what is unread, and keep it now and then: an app that is stopped need not begin anew."""
        while self.unread and not self._closing.is_set():
            self._read_until(time.perf_counter() + SAVE_EVERY)
            self.save()
