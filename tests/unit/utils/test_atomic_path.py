"""A file or folder takes another's place whole or not at all: whatever fails, whoever is killed, whatever was there."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dora_diffusion.utils import atomic as storage
from dora_diffusion.utils.atomic import atomic_path
from tests.failing_disk import contents, fail_at_every_call, failing_at


def make_file(path: Path, text: str) -> None:
    path.write_text(text)


def make_folder(path: Path, text: str) -> None:
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "a.txt").write_text(text)
    (path / f"{text}.txt").write_text(text)


def make_link_to_folder(path: Path, text: str) -> None:
    make_folder(path.parent / "elsewhere", text)
    path.symlink_to("elsewhere")


def make_link_to_file(path: Path, text: str) -> None:
    make_file(path.parent / "elsewhere", text)
    path.symlink_to("elsewhere")


def make_broken_link(path: Path, text: str) -> None:
    path.symlink_to(f"nowhere, {text}")


Make = Callable[[Path, str], None]
KINDS: dict[str, Make] = {"file": make_file, "folder": make_folder}
OLD: dict[str, Make] = {
    **KINDS,
    "link to a folder": make_link_to_folder,
    "link to a file": make_link_to_file,
    "broken link": make_broken_link,
}
new_kinds = pytest.mark.parametrize("new", KINDS)
old_kinds = pytest.mark.parametrize("old", OLD)


def put(path: Path, kind: str, text: str = "new") -> None:
    with atomic_path(path) as place:
        assert place.name == path.name and place.suffix == path.suffix
        KINDS[kind](place, text)


def expected(path: Path, kind: str, text: str = "new") -> dict[str, bytes | str | None]:
    """What a folder would hold if nothing but `path` were in it."""
    room = path.parent.parent / f"expected {kind} {text}"
    room.mkdir()
    KINDS[kind](room / path.name, text)
    return contents(room)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "room").mkdir()
    return tmp_path / "room" / "thing.x"


@new_kinds
def test_something_new(path: Path, new: str) -> None:
    put(path, new)
    assert contents(path.parent) == expected(path, new)


@new_kinds
@old_kinds
def test_what_was_there_is_replaced_whole(path: Path, old: str, new: str) -> None:
    OLD[old](path, "old")
    beside = {name: found for name, found in contents(path.parent).items() if name.startswith("elsewhere")}
    put(path, new)
    assert not path.is_symlink()
    assert contents(path.parent) == beside | expected(path, new)


@new_kinds
@old_kinds
def test_whatever_call_fails_the_old_stays(path: Path, old: str, new: str) -> None:
    OLD[old](path, "old")
    is_one_step = new == "file" and old != "folder"
    messages = fail_at_every_call(lambda: put(path, new), path.parent, may_be_new=is_one_step)
    assert len(messages) >= 4
    assert all(str(path) in message and "\n" not in message and ".staging" not in message for message in messages)


@new_kinds
def test_whatever_call_fails_nothing_is_left_where_nothing_was(path: Path, new: str) -> None:
    messages = fail_at_every_call(lambda: put(path, new), path.parent)
    assert len(messages) >= 4 and contents(path.parent) == expected(path, new)


@old_kinds
def test_a_block_that_builds_nothing_leaves_the_old(path: Path, old: str) -> None:
    OLD[old](path, "old")
    before = contents(path.parent)
    with pytest.raises(FileNotFoundError) as caught, atomic_path(path):
        pass
    assert caught.value.filename == str(path) and contents(path.parent) == before


def test_an_error_or_a_stop_inside_leaves_the_old(path: Path) -> None:
    make_folder(path, "old")
    before = contents(path.parent)
    for error in (ValueError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)), atomic_path(path) as place:
            make_folder(place, "half")
            raise error
        assert contents(path.parent) == before


def test_a_stop_while_they_change_places_leaves_the_old(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    make_folder(path, "old")
    before = contents(path.parent)
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        put(path, "folder")
    assert contents(path.parent) == before


def test_errors_inside_name_the_path(path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{path}/inner: bad$"), atomic_path(path) as place:
        raise ValueError(f"{place}/inner: bad")
    with pytest.raises(FileNotFoundError) as caught, atomic_path(path) as place:
        (place / "inner").read_text()
    assert caught.value.filename == f"{path}/inner"
    with pytest.raises(FileNotFoundError) as caught, atomic_path(path):
        Path("/another/file").read_text()
    assert caught.value.filename == "/another/file"
    with pytest.raises(OSError) as caught, atomic_path(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(path)
    for nameless in (Path("."), Path("/"), path / ".."):
        with pytest.raises(ValueError, match="ends in the name of a file or folder"), atomic_path(nameless):
            raise AssertionError("never here")
    assert contents(path.parent) == {}


@pytest.mark.parametrize("kind", ["folder", "link to a folder"])
def test_an_old_one_that_cannot_be_put_back_is_kept_and_told_of(path: Path, kind: str) -> None:
    OLD[kind](path, "old")
    before = contents(path.parent)
    with failing_at(1, of=("rename", "replace"), onwards=True), pytest.raises(OSError) as caught:
        put(path, "folder")
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    lies_in = Path(message.partition("could not be put back and lies in ")[2].partition(": '")[0])
    assert not os.path.lexists(path)
    with pytest.raises(ValueError), atomic_path(path):  # the next call puts it back, even if it fails itself
        assert contents(path.parent).items() >= before.items()
        raise ValueError
    assert contents(path.parent) == before and not lies_in.parent.exists()


def test_an_old_one_that_could_not_be_put_back_is_never_removed(path: Path) -> None:
    make_folder(path, "old")
    with failing_at(1, of=("rename", "replace"), onwards=True), pytest.raises(OSError):
        put(path, "folder")
    make_folder(path, "another")  # by hand
    put(path, "folder")
    storage.recover(path.parent)
    kept = [file for file in path.parent.rglob("old.txt")]
    assert len(kept) == 1 and ".staging" in str(kept[0]) and (path / "new.txt").is_file()


def test_something_that_came_between_is_not_written_over(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(new: Path, target: Path) -> None:
        Path(target).write_text("a stranger's")
        raise OSError(errno.ENOSPC, "No space left on device", str(new), None, str(target))

    make_folder(path, "old")
    monkeypatch.setattr(os, "replace", taken)
    with pytest.raises(OSError, match="something else was put there meanwhile; what was there .* lies in"):
        put(path, "folder")
    assert path.read_text() == "a stranger's" and list(path.parent.rglob("old.txt"))


def test_an_old_one_that_cannot_be_removed_is_no_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EACCES, "Permission denied")))
        put(path, "folder")
    assert (path / "new.txt").is_file() and list(path.parent.rglob("old.txt"))
    shutil.rmtree(path)  # even now what is left, perhaps not all of it, is not put back
    storage.recover(path.parent)
    assert contents(path.parent) == {}


def test_names_that_begin_alike_stay_apart(path: Path) -> None:
    longer = path.with_name("thing.x.01234567.staging")
    for each in (path, longer, path.with_name("thing"), path.with_name("[a]*?")):
        make_folder(each, "old")
    before = contents(path.parent)
    with atomic_path(longer) as outer, atomic_path(path) as inner:
        make_folder(outer, "outer")
        make_folder(inner, "inner")
        storage.recover(path.parent)
    after = contents(path.parent)
    changed = {name.partition("/")[0] for name in after.keys() | before.keys() if after.get(name) != before.get(name)}
    assert changed == {"thing.x", "thing.x.01234567.staging"}
    put(path.with_name("[a]*?"), "file")
    assert path.with_name("[a]*?").read_text() == "new"


def test_folders_that_only_look_alike_are_left(path: Path) -> None:
    for name in (".thing.x.before", ".thing.x.baking", ".thing.x.0123.staging", ".staging"):
        make_folder(path.with_name(name), "mine")
    before = contents(path.parent)
    put(path, "file")
    storage.recover(path.parent)
    assert contents(path.parent) == before | {"thing.x": b"new"}


@new_kinds
def test_two_threads_write_one_path(path: Path, new: str) -> None:
    make_folder(path, "old")
    problems: list[BaseException] = []

    def write(text: str) -> None:
        try:
            for _ in range(40):
                put(path, new, text)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert contents(path.parent) in [expected(path, new, text) for text in ("one", "two", "three")]


# A process for each call; it writes until it kills itself there, before or after the call is made.
KILLED = """
import os, pathlib, signal, sys
from dora_diffusion.utils import atomic as storage
from tests.unit.utils.test_atomic_path import put
room, old, new = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
for call in range(40):
    if (child := os.fork()) == 0:
        made = 0
        def watched(real):
            def wrapper(*arguments, **options):
                global made
                made += 1
                if made == call // 2 + 1:
                    if call % 2:
                        real(*arguments, **options)
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)
            return wrapper
        for name in ("mkdir", "rename", "replace", "fsync", "rmdir", "unlink"):
            setattr(os, name, watched(getattr(os, name)))
        put(room / str(call) / "thing.x", new)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.parametrize(("old", "new"), [("folder", "folder"), ("file", "folder"), ("folder", "file")])
def test_a_kill_at_any_call_loses_neither(tmp_path: Path, old: str, new: str) -> None:
    for call in range(40):
        (tmp_path / str(call)).mkdir()
        KINDS[old](tmp_path / str(call) / "thing.x", "old")
    before = contents(tmp_path / "0")
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), old, new]
    codes = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]).stdout
    assert set(codes.split()) == {"-9", "0"} and codes.split()[-1] == "0"
    after = expected(tmp_path / "0" / "thing.x", new)
    missing = set()
    for call in range(40):
        room = tmp_path / str(call)
        missing.add((room / "thing.x").exists())
        storage.recover(room)
        assert contents(room) in (before, after), call
        put(room / "thing.x", "file", "next")
        assert contents(room) == {"thing.x": b"next"}
    assert missing == {True, False}  # there was a moment without it


def test_what_is_being_built_is_not_taken_for_abandoned(path: Path) -> None:
    with atomic_path(path) as first:
        make_folder(first, "first")
        put(path, "folder", "second")
        storage.recover(path.parent)
    assert contents(path.parent) == expected(path, "folder", "first")


def test_a_folder_that_may_not_be_written_to(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    make_folder(path, "old")
    before = contents(path.parent)
    path.parent.chmod(0o500)
    try:
        with pytest.raises(PermissionError) as caught:
            put(path, "folder")
        assert caught.value.filename == str(path)
    finally:
        path.parent.chmod(0o700)
    assert contents(path.parent) == before
