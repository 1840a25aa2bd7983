"""The sections, each on its own: in a process of its own with a limit of its own, so that none can spoil another."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu.setting import Row, Rows, Setting
from dora_diffusion.utils.atomic import write_atomically
from dora_diffusion.utils.text import first_line


@dataclass(frozen=True)
class Section:
    """A section.

    Attributes:
        title: for the page.
        module: of this package, whose `rows` it is.
        seconds: that it may take; together less than ten minutes.
    """

    title: str
    module: str
    seconds: float


SECTIONS: Mapping[str, Section] = {
    "tests": Section("Tests marked gpu", "tests_marked", 90),
    "memory": Section("Peak memory beside its estimate", "memory", 140),
    "steps": Section("Training steps beside PEFT's", "steps", 210),
    "hotswap": Section("Adapters swapped under a compiled model", "hot_swap", 75),
    "app": Section("The app under load", "app", 45),
}
_TO_END = 5.0  # seconds before its limit at which a section should be at its end


@dataclass(frozen=True)
class Outcome:
    """What a section came to.

    Attributes:
        rows: what it measured, also where it did not come to its end.
        error: why it did not, on one line; None if it did.
        seconds: that it took.
    """

    rows: tuple[Row, ...]
    error: str | None
    seconds: float

    @property
    def faults(self) -> list[str]:
        """All that went wrong, a line each."""
        rows = [f"{row.get('name')}: {error}" for row in self.rows for error in errors_of(row)]
        return ([] if self.error is None else [self.error]) + rows


def errors_of(value: Any) -> list[str]:
    """Every `error` in a row, however deep."""
    if not isinstance(value, Mapping):
        return []
    own = [str(value["error"])] if "error" in value else []
    return own + [error for one in value.values() for error in errors_of(one)]


def run_here(name: str, setting: Setting, file: Path) -> int:
    """A section in this process; its rows are in a file as soon as they are known. Returns an exit status."""
    found: list[Row] = []
    try:
        make: Callable[[Setting], Rows] = import_module(f"benchmarks.gpu.{SECTIONS[name].module}").rows
        for row in make(setting):
            found.append(row)
            _save(file, found, None)
    except Exception as error:
        _save(file, found, f"{type(error).__name__}: {first_line(error)}")
        return 1
    return 0


def _save(file: Path, rows: list[Row], error: str | None) -> None:
    write_atomically(file, json.dumps({"rows": rows, "error": error}).encode())


def run_apart(command: list[str], file: Path, seconds: float) -> Outcome:
    """A command that leaves a section's file, in a process of its own, ended after so many seconds."""
    began = time.monotonic()
    error: str | None = None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            error = f"ended with {done.returncode}: {said[-1] if said else 'it said nothing'}"
    except subprocess.TimeoutExpired:
        error = f"did not end within {seconds:.0f} s"
    return read_outcome(file, error, time.monotonic() - began)


def read_outcome(file: Path, error: str | None, seconds: float) -> Outcome:
    """What a section left; `error`: what is known of its process."""
    left = json.loads(file.read_text()) if file.is_file() else {"rows": [], "error": None}
    return Outcome(tuple(left["rows"]), left["error"] or error, round(seconds, 1))


def command_of(name: str, setting: Setting, file: Path) -> list[str]:
    """The command line of one section."""
    tiny = ["--tiny"] if setting.is_tiny else []
    own = ["--section", name, "--device", setting.device, "--file", str(file), "--seconds", str(setting.seconds)]
    return [sys.executable, "-m", "benchmarks.gpu", *own, *tiny]


def outcome_of(name: str, device: str, folder: Path, *, is_tiny: bool, is_here: bool) -> Outcome:
    """Run a section, here or apart."""
    file = folder / f"{name}.json"
    setting = Setting(device, is_tiny, SECTIONS[name].seconds - _TO_END)
    if not is_here:
        return run_apart(command_of(name, setting, file), file, SECTIONS[name].seconds)
    began = time.monotonic()
    run_here(name, setting, file)
    return read_outcome(file, None, time.monotonic() - began)


def plain(outcome: Outcome) -> dict[str, Any]:
    """For gpu.json."""
    return asdict(outcome)
