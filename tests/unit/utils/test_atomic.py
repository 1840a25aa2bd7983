"""Files are there whole or not at all, whatever fails and whenever."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dora_diffusion.utils import atomic as storage
from tests.failing_disk import contents, fail_at_every_call, failing_at
from tests.tolerances import assert_identical

OLD, NEW = b"old " * 1000, b"new " * 2000


@contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """No file may grow past `size` bytes: writes fail half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Crash(Exception):
    """Stands for the process dying at this very call."""


def crash_at(monkeypatch: pytest.MonkeyPatch, call: int) -> list[str]:
    """Make the `call`-th call that changes the disk's state raise; returns the log of the calls before it."""
    log: list[str] = []

    def watched(name: str, real: Callable[..., None]) -> Callable[..., None]:
        def wrapper(*args: object, **options: object) -> None:
            if len(log) == call:
                raise Crash(name)
            log.append(name)
            real(*args, **options)

        return wrapper

    for name in ("fsync", "replace", "rename"):
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))
    monkeypatch.setattr(shutil, "rmtree", watched("rmtree", shutil.rmtree))
    return log


def put(folder: Path, step: int, *, keep: int = 2) -> Path:
    """Save a checkpoint of two files whose contents speak of the step."""
    place = folder / f"step-{step:08d}"
    storage.save_checkpoint(
        place,
        {
            "model.safetensors": lambda path: storage.save_tensors({"w": torch.full((64,), float(step))}, path),
            "progress.json": lambda path: storage.write_atomically(path, json.dumps({"step": step}).encode()),
        },
        keep=keep,
    )
    return place


def test_one_that_is_spared_stays_beside_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        put(tmp_path, step, keep=3)
    storage.remove_elders(tmp_path / "step-00000003", keep=1, spared={"step-00000001"})
    assert steps_in(tmp_path) == [1, 3]
    files = {"x": lambda path: storage.write_atomically(path, b"x")}
    storage.save_checkpoint(tmp_path / "step-00000004", files, keep=1, spared={"step-00000003"})
    assert [path.name for path in storage.valid_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


def step_of(checkpoint: Path) -> int:
    """The step that both files of a checkpoint tell of."""
    step = json.loads((checkpoint / "progress.json").read_text())["step"]
    weights = storage.load_tensors(checkpoint / "model.safetensors")
    assert_identical(weights, {"w": torch.full((64,), float(step))})
    return int(step)


def steps_in(folder: Path) -> list[int]:
    return [step_of(path) for path in storage.valid_checkpoints(folder)]


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "file.bin"
    storage.write_atomically(target, OLD)
    storage.write_atomically(target, NEW)
    assert target.read_bytes() == NEW
    assert os.listdir(target.parent) == ["file.bin"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    target.write_bytes(OLD)
    with disk_full_after(len(NEW) // 2), pytest.raises(OSError, match="File too large"):
        storage.write_atomically(target, NEW)
    assert target.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("metadata", [None, {}, {"about": "nothing"}])
def test_a_file_of_no_tensors_can_be_read(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    """As an optimiser's before its first step is."""
    storage.save_tensors({}, tmp_path / "none.safetensors", metadata)
    assert storage.load_tensors(tmp_path / "none.safetensors") == {}


KILLED = """
import os, pathlib, signal, sys
from dora_diffusion.utils.atomic import atomic_file
with atomic_file(pathlib.Path(sys.argv[1])) as file:
    file.write(b"half of it")
    file.flush()
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    print("writing", flush=True)
    sys.stdin.read()
"""


def another_writer(target: Path, how: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(target), how]
    root = Path(__file__).parents[3]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root)


def test_a_kill_leaves_the_old_file_and_the_next_write_in_the_folder_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    target.write_bytes(OLD)
    with another_writer(target, "killed") as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert target.read_bytes() == OLD
    assert len(os.listdir(tmp_path)) == 2
    storage.write_atomically(tmp_path / "of another name.bin", NEW)
    assert sorted(os.listdir(tmp_path)) == ["file.bin", "of another name.bin"]
    assert target.read_bytes() == OLD


def test_what_another_writes_at_this_moment_is_left_to_it(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    with another_writer(target, "slow") as process:
        assert process.stdout is not None and process.stdout.readline() == b"writing\n"
        storage.write_atomically(tmp_path / "of another name.bin", NEW)
        with storage.atomic_file(tmp_path / "outer.bin") as outer:  # our own, of this very thread, too
            outer.write(OLD)
            storage.write_atomically(tmp_path / "inner.bin", NEW)
        process.communicate()
    assert process.returncode == 0
    assert target.read_bytes() == b"half of it"
    assert (tmp_path / "outer.bin").read_bytes() == OLD
    assert len(os.listdir(tmp_path)) == 4


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failing_call_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    target = tmp_path / "file.bin"
    target.write_bytes(OLD)
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left") as caught:
        storage.write_atomically(target, NEW)
    assert caught.value.filename == str(target)
    assert target.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["file.bin"]


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        "plain": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "half": torch.tensor([0.0, -0.0, 65504.0, 6e-8], dtype=torch.float16),
        "brain": torch.tensor([[1e30], [-1e-30]], dtype=torch.bfloat16),
        "number": torch.tensor(7),
    }
    storage.save_tensors(tensors, tmp_path / "file.safetensors", {"note": "Grüße"})
    assert_identical(storage.load_tensors(tmp_path / "file.safetensors"), tensors)


def flip_a_byte(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def truncate(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / "progress.json").unlink()


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / storage.MANIFEST).unlink()


def halve_the_manifest(checkpoint: Path) -> None:
    file = checkpoint / storage.MANIFEST
    file.write_bytes(file.read_bytes()[:40])


def empty_the_manifest(checkpoint: Path) -> None:
    (checkpoint / storage.MANIFEST).write_text("{}")


DAMAGES = [flip_a_byte, truncate, lose_a_file, lose_the_manifest, halve_the_manifest, empty_the_manifest]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    put(tmp_path, 1)
    newest = put(tmp_path, 2)
    assert storage.is_valid_checkpoint(newest)
    damage(newest)
    assert not storage.is_valid_checkpoint(newest)
    assert steps_in(tmp_path) == [1]


def test_the_newest_is_the_last_by_number(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        storage.save_checkpoint(
            tmp_path / f"step-{step}", {"f": lambda path: storage.write_atomically(path, b"x")}, keep=9
        )
    (tmp_path / "step-latest").mkdir()
    assert [path.name for path in storage.valid_checkpoints(tmp_path)] == ["step-9", "step-20", "step-100"]


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
def test_only_the_newest_stay(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in range(1, 6):
        put(tmp_path, step, keep=keep)
    assert steps_in(tmp_path) == left
    assert sorted(os.listdir(tmp_path)) == [f"step-{step:08d}" for step in left]


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path: Path) -> None:
    put(tmp_path, 1)
    flip_a_byte(put(tmp_path, 2))
    put(tmp_path, 3)
    assert steps_in(tmp_path) == [1, 3]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    put(tmp_path, 1, keep=1)
    with disk_full_after(100), pytest.raises(OSError, match="File too large"):
        put(tmp_path, 2, keep=1)
    assert steps_in(tmp_path) == [1]
    assert not (tmp_path / "step-00000002").exists()
    put(tmp_path, 2, keep=1)
    assert steps_in(tmp_path) == [2]
    assert os.listdir(tmp_path) == ["step-00000002"]


def test_a_crash_at_any_call_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    seen = set()
    for call in range(100):
        folder = tmp_path / str(call)
        put(folder, 1, keep=1)
        with pytest.MonkeyPatch.context() as patch:
            log = crash_at(patch, call)
            try:
                put(folder, 2, keep=1)
            except Crash:
                finished = False
            else:
                finished = True
        newest = steps_in(folder)[-1]
        seen.add(newest)
        assert newest == 2 or "rename" not in log  # once renamed into place, the new one counts
        if finished:
            break
        put(folder, 3, keep=1)
        assert steps_in(folder) == [3]
    assert finished and seen == {1, 2}


def test_a_checkpoint_saved_over_one_of_its_step_loses_neither(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    put(folder, 1)
    put(folder, 2)

    def save_again() -> None:
        files = {"other": lambda path: storage.write_atomically(path, NEW)}
        storage.save_checkpoint(folder / "step-00000002", files)

    assert len(fail_at_every_call(save_again, folder)) >= 10
    assert (folder / "step-00000002" / "other").read_bytes() == NEW
    assert len(storage.valid_checkpoints(folder)) == 2


def test_the_newest_is_found_where_a_killed_save_had_set_it_aside(tmp_path: Path) -> None:
    put(tmp_path, 1)
    newest = put(tmp_path, 2)
    before = contents(tmp_path)
    with failing_at(9, of=("rename", "replace"), onwards=True) as tried, pytest.raises(OSError, match="lies in"):
        for _ in range(5):
            put(tmp_path, 2)
    assert tried[-3:] == ["rename", "replace", "rename"] and not newest.exists()
    assert steps_in(tmp_path) == [1, 2]
    assert contents(tmp_path) == before


def test_an_elder_that_cannot_be_removed_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = os.unlink

    def refuse(path: str | Path, *, dir_fd: int | None = None) -> None:
        if dir_fd is not None:  # of a folder that is being removed
            raise PermissionError(13, "Permission denied")
        unlink(path)

    put(tmp_path, 1, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        put(tmp_path, 2, keep=1)
    assert steps_in(tmp_path) == [1, 2]
    put(tmp_path, 3, keep=1)
    assert steps_in(tmp_path) == [3]


def killed_at(call: int, work: Callable[[], object]) -> bool:
    """Do `work` in a process of its own dying at its `call`-th removal; whether it came through."""
    child = os.fork()
    if child == 0:
        removals = []

        def dying(real: Callable[..., None]) -> Callable[..., None]:
            def wrapper(*arguments: object, **options: object) -> None:
                if len(removals) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                removals.append(1)
                real(*arguments, **options)

            return wrapper

        os.unlink, os.rmdir = dying(os.unlink), dying(os.rmdir)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status == 0


def test_a_kill_while_old_checkpoints_are_removed_leaves_no_half_of_one(tmp_path: Path) -> None:
    for call in range(100):
        folder = tmp_path / str(call)
        for step in (1, 2, 3):
            put(folder, step, keep=3)
        came_through = killed_at(call, lambda folder=folder: put(folder, 4, keep=1))
        there = [path for path in folder.glob("step-*") if not storage.is_valid_checkpoint(path)]
        assert there == [], call
        assert steps_in(folder)[-1] in (3, 4)
        put(folder, 5, keep=1)
        assert os.listdir(folder) == ["step-00000005"]
        if came_through:
            break
    assert came_through and call > 10


def test_a_full_disk_leaves_nothing_of_a_step(tmp_path: Path) -> None:
    put(tmp_path, 1, keep=1)
    before = contents(tmp_path)
    for size in (0, 1, 100, 300):
        with disk_full_after(size), pytest.raises(OSError, match="File too large"):
            put(tmp_path, 2, keep=1)
        assert contents(tmp_path) == before


def test_a_save_hashes_what_is_new_and_what_stays_and_that_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(f"{path.parent.name}/{path.name}")
        return real(path)

    real = storage.sha256_of
    monkeypatch.setattr(storage, "sha256_of", counted)
    for step in range(1, 6):
        hashed.clear()
        for file in put(tmp_path, step, keep=3).iterdir():
            os.utime(file, ns=(10**18, 10**18))  # as if it had been a while ago
    files = ("model.safetensors", "progress.json")
    assert sorted(hashed) == [f"step-0000000{step}/{name}" for step in (4, 5) for name in files]
    assert steps_in(tmp_path) == [3, 4, 5]
    hashed.clear()
    newest, broken = storage.newest_checkpoint(tmp_path)
    assert (newest, broken) == (tmp_path / "step-00000005", [])
    assert {name.split("/")[0] for name in hashed} == {"step-00000005"}  # resuming reads that one anew, and no other


def test_the_newest_whole_one_is_found_below_those_that_are_broken(tmp_path: Path) -> None:
    assert storage.newest_checkpoint(tmp_path / "nowhere") == (None, [])
    for step in (1, 2, 3, 4):
        put(tmp_path, step, keep=9)
    for step in (3, 4):
        truncate(tmp_path / f"step-0000000{step}")
    broken = [tmp_path / "step-00000004", tmp_path / "step-00000003"]
    assert storage.newest_checkpoint(tmp_path) == (tmp_path / "step-00000002", broken)


def test_elders_that_are_not_whole_go_with_the_others(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        put(tmp_path, step, keep=9)
    (tmp_path / "step-00000001" / "progress.json").unlink()
    put(tmp_path, 4, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000004"]
