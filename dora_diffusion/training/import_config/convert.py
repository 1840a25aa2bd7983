"""A source of another trainer -> our configuration, with a line for each of its keys."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dora_diffusion.training import yaml_config
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.import_config.records import CONCEPT, UNSET, Answer, Entry, Row, Source, Tool

FOLDERS = ("data.instance_dir", "data.validation_dir", f"{CONCEPT}.dir", "prior.class_dir", "evaluation.truth_dir")
FILES = ("base.transformer", "base.unet", "base.vae", "adapter.start", "base.adapters")
NO_FOLDER = "pictures"
"""Stands for a folder that the file does not name."""
_SECRET = re.compile(r"token|secret|password|api_?key", re.IGNORECASE)
# A run of one folder, without concepts, says these elsewhere.
_WITHOUT_CONCEPTS = {
    "dir": "data.instance_dir",
    "prompt": "data.instance_prompt",
    "trigger": "data.trigger",
    "caption_dropout": "data.captions.dropout",
    "resolution": "data.resolution",
}


@dataclass(frozen=True)
class Line:
    """A key of theirs, and what became of it.

    Attributes:
        entry: the key with its value.
        answer: what its row says.
        is_secret: its value stays unsaid.
    """

    entry: Entry
    answer: Answer
    is_secret: bool = False


@dataclass(frozen=True)
class Imported:
    """What a file became.

    Attributes:
        tool: whose it was.
        lines: one for each of its keys, in its order, then those that it leaves to its trainer's defaults.
        settings: dotted key of ours (`data.concepts[0].dir`) -> value.
        missing: dotted keys whose folder or file is not on this machine, with it.
        notes: what else is to be said.
    """

    tool: Tool
    lines: tuple[Line, ...]
    settings: Mapping[str, Any]
    missing: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def data(self) -> dict[str, Any]:
        """The settings as the sections of a YAML file, in the order of TrainConfig's."""
        return nested(self.settings)


@dataclass
class _Draft:
    """Settings as they come together, and which line gave each."""

    source: Source
    settings: dict[str, Any] = field(default_factory=dict)
    givers: dict[str, int] = field(default_factory=dict)
    taken: dict[int, dict[str, Any]] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)

    def put(self, number: int, entry: Entry, answer: Answer, *, of_folders: bool) -> None:
        """Take an answer's settings, those of folders or the others, unless they are there already.

        Args:
            number: of the line.
            entry: of the line.
            answer: what its row says.
            of_folders: which of them.
        """
        for key, value in answer.settings.items():
            if key.startswith(CONCEPT) != of_folders:
                continue
            places = list(self._places(key, entry))
            if not places:
                self.refused.setdefault(number, f"{key} needs a concept")
            for place in places:
                if self.settings.setdefault(place, value) == value:
                    self.taken.setdefault(number, {})[place if len(places) == 1 else key] = value
                    self.givers.setdefault(place, number)
                elif not place.startswith("data.concepts["):
                    said = f"{place} is one for all here, and {self.settings[place]!r} came first"
                    self.refused.setdefault(number, said)

    def answer(self, number: int, answer: Answer) -> Answer:
        """What became of an answer."""
        taken = self.taken.get(number, {})
        if taken or not answer.settings:
            return answer._replace(settings=taken)
        if number in self.refused:
            return Answer("lost", {}, self.refused[number])
        return Answer("needless", {}, "each folder says its own")

    def _places(self, key: str, entry: Entry) -> Iterator[str]:
        if not key.startswith(CONCEPT):
            yield key
            return
        name = key.removeprefix(f"{CONCEPT}.")
        count = len(self.source.folders)
        numbers = entry.concepts or range(count)
        if self.source.tree is not None and not entry.concepts:
            numbers = ()
        yield from (f"data.concepts[{number}].{name}" for number in numbers)
        if not numbers and name in _WITHOUT_CONCEPTS:
            yield _WITHOUT_CONCEPTS[name]


def convert(source: Source, tool: Tool, *, output: Path) -> Imported:
    """Everything of a source that we have a setting for, checked by TrainConfig.

    Args:
        source: as its tool read it.
        tool: with the table.
        output: the YAML file that is meant; relative paths are made to start there.

    Raises:
        ValueError: one line; what is left is no configuration.
    """
    entries = [*source.entries, *_defaults(source, tool)]
    draft = _Draft(source)
    said = [_answer(entry, tool, source) for entry in entries]
    for of_folders in (True, False):
        for number in _in_order(entries, source, learnt_first=not of_folders):
            draft.put(number, entries[number], said[number], of_folders=of_folders)
    answers = [draft.answer(number, answer) for number, answer in enumerate(said)]
    notes = _fill_in(draft, source, tool)
    _relocate(draft.settings, source, output)
    _check(draft, answers, output)
    lines = tuple(
        Line(entry, answers[number], _is_secret(entry, tool.row(entry.name)))
        for number, entry in enumerate(entries)
        if entry.is_said or answers[number].settings or answers[number].kind == "lost"
    )
    return Imported(tool, lines, draft.settings, dict(_missing(draft.settings, output.parent)), tuple(notes))


def _in_order(entries: Sequence[Entry], source: Source, *, learnt_first: bool) -> list[int]:
    """Numbers of entries: what is said of few folders before what is of all, and defaults, which are of all, last."""

    def key(number: int) -> tuple[bool, float]:
        entry = entries[number]
        is_class = bool(entry.concepts) and all(source.folders[concept].is_class for concept in entry.concepts)
        return learnt_first and is_class, len(entry.concepts) or float("inf")

    return sorted(range(len(entries)), key=key)


def _defaults(source: Source, tool: Tool) -> Iterator[Entry]:
    """What a file leaves unsaid, where its trainer does something else than we."""
    if tool.is_whole(source):
        for row in tool.rows:
            if row.unset is not UNSET and not source.has(row.name):
                yield Entry(row.name, row.name, row.unset, is_said=False)


def _answer(entry: Entry, tool: Tool, source: Source) -> Answer:
    row = tool.row(entry.name)
    if row is None:
        return Answer("unknown", {}, "")
    if entry.is_empty:
        return Answer("needless", {}, "not set there")
    try:
        return row.convert(entry.value, source.seen_from(entry))
    except (ValueError, OverflowError) as error:
        return Answer("lost", {}, str(error))


def _is_secret(entry: Entry, row: Row | None) -> bool:
    return row.is_secret if row is not None else bool(_SECRET.search(entry.key))


def _fill_in(draft: _Draft, source: Source, tool: Tool) -> list[str]:
    """What TrainConfig cannot do without."""
    notes = []
    if "output_dir" not in draft.settings:
        draft.settings["output_dir"] = f"runs/{source.path.stem}"
        notes.append(f"output_dir: {draft.settings['output_dir']}: the file names no folder for the run")
    concepts = [f"data.concepts[{number}]" for number in range(len(source.folders))]
    roles = [draft.settings.get(f"{concept}.role", "instance") for concept in concepts]
    for concept in concepts:
        if f"{concept}.dir" not in draft.settings:
            draft.settings[f"{concept}.dir"] = NO_FOLDER
            notes.append(f"{concept}.dir: {NO_FOLDER}: the file names no folder for it; put yours there")
    if "data.instance_dir" not in draft.settings and "instance" not in roles:
        draft.settings["data.instance_dir"] = NO_FOLDER
        notes.append(f"data.instance_dir: {NO_FOLDER}: the file names no folder of pictures; put yours there")
    if not tool.is_whole(source):
        notes.append("the file says nothing of model and training: those are our defaults")
    return notes


def _relocate(settings: dict[str, Any], source: Source, output: Path) -> None:
    """Let relative paths, which start at the source's folder, start at the output's."""
    for key, value in settings.items():
        if _any(key) in (*FOLDERS, *FILES, "data.cache_dir"):
            if isinstance(value, Mapping):
                settings[key] = {_moved(path, source, output): strength for path, strength in value.items()}
            else:
                settings[key] = _moved(value, source, output)
        elif key == "model" and _is_path(value, source):
            moved = _moved(value, source, output)
            settings[key] = moved if os.path.isabs(moved) or moved.startswith("..") else f"./{moved}"


def _is_path(model: Any, source: Source) -> bool:
    """Whether a base is a file or folder and no hub id."""
    if not isinstance(model, str) or "\\" in model or os.path.isabs(os.path.expanduser(model)):
        return False
    return (
        model.startswith(".")
        or bool(Path(model).suffix in {".safetensors", ".ckpt", ".sft", ".gguf"})
        or os.path.exists(source.at(model))
    )


def _moved(path: Any, source: Source, output: Path) -> Any:
    if not isinstance(path, str) or "\\" in path or os.path.isabs(os.path.expanduser(path)):
        return path
    here, there = source.path.parent.absolute(), output.parent.absolute()
    return path if here == there else Path(os.path.relpath(here / path, there)).as_posix()


def _any(key: str) -> str:
    return re.sub(r"\[\d+\]", "[]", key)


def _check(draft: _Draft, answers: list[Answer], output: Path) -> None:
    """Take out what TrainConfig refuses, with its reason, until it takes the rest."""
    while True:
        try:
            TrainConfig.model_validate(_with_stand_ins(draft.settings, output))
            return
        except ValidationError as error:
            key, message = yaml_config.first_mistake(error, TrainConfig)
            place = _culprit(draft, key)
            if place is None:
                raise ValueError(f"{key}: {message}") from None
        del draft.settings[place]
        number = draft.givers.pop(place)
        left = {name: value for name, value in answers[number].settings.items() if name not in (place, _any(place))}
        says = f"{place} is not in this version" if message.startswith("no such key") else f"{place}: {message}"
        answers[number] = Answer("taken" if left else "lost", left, says)


def _with_stand_ins(settings: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """The settings with something that is there in the place of each folder and file, for others are refused."""
    room = Path(__file__).parent
    stand_ins = {**dict.fromkeys(FOLDERS, room), "prior.class_dir": room.parent, **dict.fromkeys(FILES, Path(__file__))}

    def there(key: str, path: Any) -> Any:
        if not isinstance(path, str):
            return path
        found = output.parent / os.path.expanduser(path)
        return str(found if os.path.exists(found) else stand_ins[_any(key)])

    def with_paths(key: str, value: Any) -> Any:
        if _any(key) not in stand_ins:
            return value
        if isinstance(value, Mapping):
            return {there(key, path): one for path, one in value.items()}
        return there(key, value)

    return nested({key: with_paths(key, value) for key, value in settings.items()})


def _culprit(draft: _Draft, key: str) -> str | None:
    """Which setting is to blame for a mistake: that of its key, one below it, or the last of its section."""
    given = [known for known in draft.settings if known in draft.givers and _any(known) != f"{CONCEPT}.dir"]
    at = [known for known in given if known == key or known.startswith((f"{key}.", f"{key}["))]
    beside = [known for known in given if known.rpartition(".")[0] == key.rpartition(".")[0]]
    return at[0] if at else beside[-1] if beside else None


def _missing(settings: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if _any(key) in (*FOLDERS, *FILES):
            for path in value if isinstance(value, Mapping) else [value]:
                if not os.path.exists(folder / os.path.expanduser(path)):
                    yield key, path


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`{"data.concepts[0].dir": "a"}` -> `{"data": {"concepts": [{"dir": "a"}]}}`, sections in TrainConfig's order."""
    order = [*TrainConfig.model_fields]
    found: dict[str, Any] = {}
    for key in sorted(settings, key=lambda name: order.index(first) if (first := name.split(".")[0]) in order else 99):
        at: Any = found
        *sections, name = key.split(".")
        for section in sections:
            part, bracket, number = section.partition("[")
            at = at.setdefault(part, [] if bracket else {})
            if bracket:
                place = int(number.rstrip("]"))
                at.extend({} for _ in range(place + 1 - len(at)))
                at = at[place]
        at[name] = settings[key]
    return found


def without_values(line: Line) -> Line:
    """A line whose value stays unsaid."""
    return replace(line, entry=replace(line.entry, value="(not shown)")) if line.is_secret else line
