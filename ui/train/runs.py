"""Run folders: what training wrote there, read while it is under way, and checkpoints taken into the library."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorboard.compat.proto.event_pb2 import Event

from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run.checkpoint import ADAPTER
from dora_diffusion.utils.atomic import MANIFEST, atomic_file, sha256_of
from ui.backend.checks import check_name
from ui.library.library import AdapterLibrary

CONFIG, LOG, OUTCOME = "config.yaml", "train.log", "validation.json"
_MAX_EVENT = 1 << 20
_TAGS = ("loss/train", "loss/validation", "loss/fit")  # the last two on fixed noise: held-out pictures, or trained ones


@dataclass(frozen=True)
class Losses:
    """Step -> loss, in the order of the steps.

    Attributes:
        train, validation: of the optimised pictures, and on fixed noise.
        written: `time.time()` of the newest loss; 0 before the first.
    """

    train: dict[int, float] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    written: float = 0.0


class LossReader:
    """The losses of one run, from the TensorBoard files in its folder; each byte is read once."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._forget()

    def _forget(self) -> None:
        self._read: dict[Path, int] = {}
        self._begun: set[Path] = set()
        self._losses: dict[str, dict[int, float]] = {tag: {} for tag in _TAGS}
        self._written = 0.0

    def losses(self) -> Losses:
        """All that is written so far; what is done again after a resumption takes the place of the first time."""
        files = sorted(_event_files(self._run), key=lambda path: path.name)
        if not self._read.keys() <= set(files):  # the folder was removed; there may be another run of its name
            self._forget()
        for file in files:
            self._take(file)
        train, *fixed = (dict(sorted(values.items())) for values in self._losses.values())
        validation = dict(sorted((step, loss) for losses in fixed for step, loss in losses.items()))
        return Losses(train, validation, self._written)

    def _take(self, file: Path) -> None:
        start = self._read.get(file, 0)
        try:
            with open(file, "rb") as stream:
                stream.seek(start)
                data = stream.read()
        except OSError:  # the folder was removed meanwhile
            return
        for record, end in _records(data):
            try:
                event = Event.FromString(record)
            except DecodeError:  # no log of ours
                return
            for value in event.summary.value:
                if value.tag in self._losses:
                    if file not in self._begun:
                        self._forget_from(event.step)
                        self._begun.add(file)
                    self._losses[value.tag][event.step] = value.simple_value
                    self._written = max(self._written, event.wall_time)
            self._read[file] = start + end

    def _forget_from(self, step: int) -> None:
        """What an earlier start did beyond the checkpoint that the next one went on from."""
        for tag, values in self._losses.items():
            self._losses[tag] = {at: loss for at, loss in values.items() if at < step}


def _records(data: bytes) -> Iterator[tuple[bytes, int]]:
    """The whole records of a TFRecord file (length, its checksum, data, its checksum), with where each ends."""
    at = 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        end = at + 12 + length + 4
        if length > _MAX_EVENT or end > len(data):  # not ours, or not yet written out
            return
        yield data[at + 12 : end - 4], end
        at = end


def _event_files(run: Path) -> Iterator[Path]:
    return (run / "logs").rglob("events.out.tfevents.*")


def forget_attempt(run: Path) -> None:
    """Remove the losses and samples of a start that learnt nothing, lest they are shown as the next one's."""
    for file in (*_event_files(run), *(path for _, path in list_samples(run))):
        file.unlink(missing_ok=True)


def list_runs(runs: Path) -> list[str]:
    """The names of run folders, the newest first."""
    found = [path.parent for path in runs.glob(f"*/{CONFIG}") if not path.parent.name.startswith(".")]
    return [path.name for path in sorted(found, key=changed_at, reverse=True)]


def changed_at(path: Path) -> float:
    """Its time of modification; 0 when it was removed meanwhile."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def is_through(run: Path) -> bool:
    """Whether training came to its end and left its files; the losses alone do not tell."""
    return (run / OUTCOME).is_file() and ((run / ADAPTER).is_file() or (run / "words").is_dir())


def ended_early(run: Path) -> bool:
    """Whether a run that is through ended before its last step, as no measurement was better any more."""
    try:
        return bool(json.loads((run / MANIFEST).read_text()).get("ended_early"))
    except (OSError, ValueError, AttributeError):
        return False


def find_run(runs: Path, name: object) -> Path:
    """The run folder of that name.

    Raises:
        ValueError: none is listed under it.
    """
    if isinstance(name, str) and name in list_runs(runs):
        return runs / name
    raise ValueError(f"run: got {'nothing' if not name else repr(name)[:60]}, expected one of {runs}; pick one")


def run_config(run: Path) -> TrainConfig:
    """The configuration a run was started with.

    Raises:
        ValueError: it cannot be read, or it writes to another folder than its own.
    """
    config = TrainConfig.from_yaml(run / CONFIG)
    if config.output_dir.resolve() != run.resolve():
        raise ValueError(f"{run / CONFIG}: output_dir is {config.output_dir}, expected the folder it lies in")
    return config


def list_samples(run: Path) -> list[tuple[int, Path]]:
    """(step, picture with a column for each sample prompt), oldest first."""
    found = [path for path in (run / "samples").glob("step-*.png") if path.stem[5:].isdigit()]
    return sorted((int(path.stem[5:]), path) for path in found)


def list_checkpoints(run: Path) -> dict[int, Path]:
    """Step -> adapter file of each checkpoint that holds one, oldest first."""
    folders = [path.parent for path in (run / "checkpoints").glob(f"step-*/{ADAPTER}")]
    whole = [path for path in folders if path.name[5:].isdigit() and (path / MANIFEST).is_file()]
    found = {int(path.name[5:]): path / ADAPTER for path in whole}
    return dict(sorted(found.items()))


def find_checkpoint(run: Path, step: object) -> Path:
    """The adapter file of a checkpoint.

    Raises:
        ValueError: the run has none at that step.
    """
    known = list_checkpoints(run)
    if isinstance(step, int) and not isinstance(step, bool) and step in known:
        return known[step]
    steps = ", ".join(map(str, known)) or "none yet"
    raise ValueError(f"checkpoint: got {'nothing' if step is None else repr(step)[:40]}, expected one of: {steps}")


def send_to_library(run: Path, step: object, library: AdapterLibrary, *, name: object = "") -> str:
    """Copy a checkpoint's adapter into the library, whole or not at all.

    Args:
        run: its run folder.
        step: of the checkpoint.
        library: gets the file, and is refreshed.
        name: there; empty is `RUN-stepSTEP`, with the start of its hash where another adapter has that name.

    Returns:
        The name. A file that is there already with the same content is left as it is.

    Raises:
        ValueError: no such checkpoint, a name that is none, or one that another adapter has.
    """
    source = find_checkpoint(run, step)
    try:
        content = sha256_of(source)
        usual = f"{run.name[:40]}-step{step}"
        wanted = check_name("name in the library", name or usual)
        if not name and _is_taken(library.folder / f"{usual}.safetensors", content):
            wanted = f"{usual}-{content[:8]}"
        target = library.folder / f"{wanted}.safetensors"
        if _is_taken(target, content):
            raise ValueError(f"{wanted}: the library has another adapter of that name; choose one that is free")
        if not target.exists():
            with atomic_file(target) as file:
                file.write(source.read_bytes())
    except OSError as error:
        where = f"{run.name}, step {step}"
        raise ValueError(f"{where}: cannot be copied into {library.folder} ({error.strerror})") from None
    library.refresh()
    return wanted


def _is_taken(target: Path, content: str) -> bool:
    """Whether something else than a file of that hash is there."""
    return target.exists() and not (target.is_file() and sha256_of(target) == content)
