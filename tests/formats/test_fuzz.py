"""A slice of `make fuzz`: broken adapter files are read or refused in one line, quickly and in little memory."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.fuzz import report, run
from benchmarks.fuzz.corpus import special_files
from benchmarks.fuzz.mutations import MUTATIONS, mutated
from benchmarks.fuzz.samples import sound_files
from benchmarks.fuzz.watch import Outcome, Watch, faults
from dora_diffusion.formats import FORMATS

COUNT = 24 * len(MUTATIONS)  # some 400
# In time: how fast the machine is that runs the tests, and what else it does, nobody knows. The slowest file takes here
# a twentieth of what this gives it; those that are mutated are small, and take a thirtieth of theirs.
SLACK, SLACK_OF_SMALL = 15.0, 2.0
PATIENCE = 300.0  # seconds
SEED = 20  # another than `make fuzz` has

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")


@pytest.fixture(scope="module")
def watch(tmp_path_factory) -> Iterator[Watch]:
    run.warm_up(tmp_path_factory.mktemp("warm"))
    with Watch(patience=PATIENCE) as watch:
        yield watch


def test_every_mutation_of_every_format_keeps_the_promise(tmp_path, watch: Watch) -> None:
    said: list[str] = []
    cases = list(run.mutated_cases(tmp_path, watch, COUNT, SEED, said.append, slack=SLACK_OF_SMALL))
    assert said == []
    kinds = [case.outcomes[0].kind for case in cases]
    assert kinds.count("read") > 60
    assert kinds.count("refused") > 200
    assert list(tmp_path.iterdir()) == []
    page = report.report(report.summary(cases, "a test", 1.0))
    assert f"**{COUNT} files, 0 broke a promise.**" in page


@pytest.mark.parametrize("name", special_files())
def test_a_special_file_keeps_the_promise(tmp_path, watch: Watch, name: str) -> None:
    path = tmp_path / "x.safetensors"
    special_files()[name](path)
    size = run.bytes_of(path)
    watch.renew()
    outcomes = watch.read(path)
    found = {outcome.reader: wrong for outcome in outcomes if (wrong := faults(outcome, path, size, slack=SLACK))}
    if path.is_file():
        path.unlink()  # some are large
    assert found == {}


def test_sound_files_are_of_every_format() -> None:
    sound = sound_files()
    assert {name.split(": ")[0] for name in sound} == {*FORMATS, "by hand"}
    assert mutated(sound, 3, 8) == mutated(sound, 3, 8)
    assert mutated(sound, 3, 8) != mutated(sound, 4, 8)


class Hands:
    """A clock that goes where it is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


HANDS = Hands()


def _sleep(path: Path) -> None:
    import time

    time.sleep(PATIENCE)


def _die(path: Path) -> None:
    import os

    os._exit(1)


def _take(path: Path) -> None:
    bytearray(b"x") * (200 * 2**20)


def _work(path: Path) -> None:
    HANDS.now += 0.5
    raise ValueError(f"{path}: late")


def _fail(path: Path) -> None:
    raise KeyError("x")


def _ramble(path: Path) -> None:
    raise ValueError("two\nlines")


def _succeed(path: Path) -> None:
    """A reader with nothing to object to."""


def test_the_watch_sees_what_it_watches_for(tmp_path) -> None:
    readers = {
        "die": _die,
        "take": _take,
        "work": _work,
        "fail": _fail,
        "ramble": _ramble,
        "fine": _succeed,
    }
    path = tmp_path / "x"
    with Watch(readers, PATIENCE, HANDS) as watch:
        outcomes = {outcome.reader: outcome for outcome in watch.read(path)}
    with Watch({"sleep": _sleep}, patience=0.1) as watch:
        (outcomes["sleep"],) = watch.read(path)
    found = {name: " ".join(faults(outcome, path, 0)) for name, outcome in outcomes.items()}
    assert found["sleep"] == "hang"
    assert found["die"] == "died"
    assert sys.platform != "linux" or "MB of memory" in found["take"]
    assert found["work"] == "500 ms"
    assert found["fail"] == "crash"
    assert "KeyError" in outcomes["fail"].trace
    assert found["ramble"] == "message of 9 characters, 2 lines message does not name the file"
    assert found["fine"] == ""


def test_a_broken_promise_is_kept_and_reported(tmp_path) -> None:
    with Watch({"load": _fail}) as watch:
        cases = list(run.mutated_cases(tmp_path, watch, 2, SEED, lambda line: None))
    kept = sorted(path.suffix for path in tmp_path.iterdir())
    assert kept == [".safetensors", ".safetensors", ".txt", ".txt"]
    page = report.report(report.summary(cases, "a test", 1.0))
    assert "2 broke a promise" in page
    assert "## Broken promises" in page
    shutil.rmtree(tmp_path)


def test_a_quick_read_is_no_fault_and_a_slow_one_is(tmp_path) -> None:
    path = tmp_path / "x"
    assert faults(Outcome("load", "read", seconds=0.5), path, 0) == []
    assert faults(Outcome("load", "refused", f"{path}: no", seconds=0.5), path, 0) == ["500 ms"]
    assert faults(Outcome("load", "read", memory=70 * 2**20), path, 10 * 2**20) == []
