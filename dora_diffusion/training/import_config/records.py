"""What a table of another trainer's options is made of: rows, and what a row answers to a value."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

CONCEPT = "data.concepts[]"
"""Of a key of ours that each folder has for itself."""


class _Unset:
    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = _Unset()
"""Where a trainer has no default that differs from what is done here."""

Kind = Literal["taken", "lost", "needless", "unknown"]


class Answer(NamedTuple):
    """What becomes of a value: settings of ours, or none, and a word about it."""

    kind: Kind
    settings: Mapping[str, Any]
    says: str = ""


@dataclass(frozen=True)
class Entry:
    """A key of a file with its value.

    Attributes:
        key: as the file has it, `datasets[0].folder_path`.
        name: the row that it is looked up by, `datasets[].folder_path`.
        value: as read.
        concepts: numbers of the folders that it speaks of; all of them for what is said of the whole run.
        is_said: whether the file says it, and not the trainer's default.
    """

    key: str
    name: str
    value: Any
    concepts: tuple[int, ...] = ()
    is_said: bool = True

    @property
    def is_empty(self) -> bool:
        """Whether it is there only to be filled in."""
        return self.value is None or (isinstance(self.value, str) and not self.value.strip())


@dataclass(frozen=True)
class Folder:
    """A folder of pictures as the other trainer counts it.

    Attributes:
        path: as the file has it.
        repeats: how often an epoch shows each picture.
        is_class: it keeps the class as it is, or is measured, and is not learnt.
        samples: how many an epoch takes of it, where that is what is given.
    """

    path: str
    repeats: float = 1
    is_class: bool = False
    samples: float | None = None


@dataclass(frozen=True)
class Source:
    """A file of another trainer, read.

    Attributes:
        path: of the file; relative paths in it start at its folder.
        entries: its keys, in its order.
        folders: of pictures, one for each of our concepts.
        tree: the one folder that is no concept but `data.instance_dir`; it may hold repeated ones (`10_name`).
        whole: the source that this one is a view of, from one folder.
    """

    path: Path
    entries: tuple[Entry, ...]
    folders: tuple[Folder, ...] = ()
    tree: str | None = None
    whole: "Source | None" = None
    _values: dict[str, Any] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        for entry in self.entries:
            if not entry.is_empty:
                self._values.setdefault(entry.name, entry.value)

    def get(self, name: str, default: Any = None) -> Any:
        """The first value of a row's name, or the default where there is none or it is empty."""
        return self._values.get(name, default)

    def has(self, name: str) -> bool:
        """Whether a value is given."""
        return name in self._values

    def values(self, name: str) -> list[Any]:
        """Every value of a row's name, of all folders."""
        entries = (self.whole or self).entries
        return [entry.value for entry in entries if entry.name == name and not entry.is_empty]

    def seen_from(self, entry: Entry) -> "Source":
        """The source as an entry of one folder sees it: what is said of other folders is not there."""
        if not entry.concepts:
            return self
        folders = tuple(self.folders[number] for number in entry.concepts if number < len(self.folders))
        near = [one for one in self.entries if set(one.concepts) >= set(entry.concepts)]
        rest = [one for one in self.entries if not one.concepts]
        return replace(self, entries=(*near, *rest), folders=folders, whole=self)

    def at(self, text: str) -> Path:
        """A path of the file, from its folder."""
        return self.path.parent / os.path.expanduser(text)

    def has_folder(self, text: str) -> bool:
        """Whether a folder of the file is on this machine."""
        return os.path.isdir(self.at(text))


Convert = Callable[[Any, Source], Answer]


@dataclass(frozen=True)
class Row:
    """One option of another trainer.

    Attributes:
        name: its dotted key, `datasets[].folder_path`; `cloud.*` is everything below cloud.
        ours: the keys of ours that it may set; () = no counterpart.
        says: what a reader of the guide should know: how it is turned, why there is no counterpart, what to do instead.
        convert: its value -> what becomes of it; a ValueError says why it cannot be taken.
        example: a value that is taken (or lost), for tests.
        beside: other keys that the example needs.
        unset: the trainer's own default, where ours would be another.
        is_secret: whether its value stays unsaid.
    """

    name: str
    ours: tuple[str, ...]
    says: str
    convert: Convert
    example: Any
    beside: Mapping[str, Any] = field(default_factory=dict)
    unset: Any = UNSET
    is_secret: bool = False


@dataclass(frozen=True)
class Tool:
    """A trainer whose files are read.

    Attributes:
        name: as people call it.
        kind: which of its files, "a training TOML".
        rows: its options.
        read: a file's data -> a source.
        is_whole: whether a file of it says all of a run, so that what it leaves unsaid has the trainer's default.
    """

    name: str
    kind: str
    rows: tuple[Row, ...]
    read: Callable[[Mapping[str, Any], Path], Source]
    is_whole: Callable[[Source], bool] = lambda source: True

    def row(self, name: str) -> Row | None:
        """The row of a key, or of a key above it."""
        if name in self._by_name:
            return self._by_name[name]
        parts = name.split(".")
        above = (".".join((*parts[:length], "*")) for length in range(len(parts) - 1, 0, -1))
        return next((self._by_name[prefix] for prefix in above if prefix in self._by_name), None)

    @cached_property
    def _by_name(self) -> Mapping[str, Row]:
        return {row.name: row for row in self.rows}


def to(key: str, value: Any, says: str = "") -> Answer:
    """One setting."""
    return Answer("taken", {key: value}, says)


def several(settings: Mapping[str, Any], says: str = "") -> Answer:
    """Several settings, or none where they are empty."""
    return Answer("taken" if settings else "needless", settings, says)


def lost(says: str) -> Answer:
    """No counterpart."""
    return Answer("lost", {}, says)


def needless(says: str) -> Answer:
    """Nothing is to be set for it to be as it was."""
    return Answer("needless", {}, says)


def is_off(value: Any, off: Iterable[Any] = ()) -> bool:
    """Whether a value says that something is not done: false, 0, empty, or one of `off`."""
    if isinstance(value, str):
        text = value.strip().lower()
        return text in {"", "false", "none", "off", "null", "0", "0.0"} or text in {str(other).lower() for other in off}
    return not value or value in list(off)


def copied(
    name: str, ours: str, example: Any, *, read: Callable[[Any], Any], unset: Any = UNSET, says: str = ""
) -> Row:
    """A row of an option that is the same here under another name."""
    return Row(name, (ours,), says, lambda value, source: to(ours, read(value)), example, unset=unset)


def without(
    says: str, names: str, *, off: tuple[Any, ...] = (), example: Any = 1, is_secret: bool = False
) -> list[Row]:
    """Rows of options without a counterpart.

    Args:
        says: why, and what to do instead.
        names: with spaces between.
        off: values, besides false, 0 and empty ones, that mean it is not done.
        example: a value that is lost.
        is_secret: whether their values stay unsaid.
    """

    def convert(value: Any, source: Source) -> Answer:
        return needless("off there too") if is_off(value, off) else lost(says)

    return [Row(name, (), says, convert, example, is_secret=is_secret) for name in names.split()]


def unneeded(says: str, names: str, *, example: Any = True, is_secret: bool = False) -> list[Row]:
    """Rows of options that need nothing here; see `without`."""
    return [
        Row(name, (), says, lambda value, source: needless(says), example, is_secret=is_secret)
        for name in names.split()
    ]
