"""docs/reliability.md and the code say the same: every module that writes is there, and every test that is named is."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("dora_diffusion", "ui", "train_scripts", "examples")
ATOMIC = {"atomic_file", "atomic_path", "write_atomically", "save_tensors", "save_checkpoint", "write_tensor_file"}
# What writes at once, under whatever object's name.
PLAIN = {"write_text", "write_bytes", "save_file", "save_pretrained", "savefig", "touch", "imsave", "tofile", "to_csv"}
PLAIN |= {"copytree", "copyfile", "copy2", "mkstemp", "NamedTemporaryFile", "TemporaryDirectory"}
PLAIN |= {"init_trackers", "FileHandler", "SummaryWriter", "ZipFile"}
# `.save(...)` to these is in memory, or into a file that an atomic function has opened.
OPENED = {"buffer", "file", "picture", "new"}
# Objects of ours whose `save` is a module in the table itself.
OURS = {"checkpoint", "checkpoints", "self", "session", "self.session", "self._pictures", "self.library"}


def modules() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def called(call: ast.Call) -> str:
    """The last word of what is called."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def opens_to_write(call: ast.Call) -> bool:
    """`open`, of the builtins' or a path's, in a mode that writes; `os.open` has flags, and is `fdopen`'s."""
    modes = [*call.args, *(word.value for word in call.keywords if word.arg == "mode")]
    texts = [mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
    writes = any(re.fullmatch(r"[rwaxbt+]*[wax+][rwaxbt+]*", text) for text in texts)
    return called(call) in ("open", "fdopen") and writes


def saves_to_a_path(call: ast.Call) -> bool:
    """`.save(...)` of another library's object, such as a picture's, to something that is not open already."""
    if called(call) != "save" or not isinstance(call.func, ast.Attribute) or ast.unparse(call.func.value) in OURS:
        return False
    return not (call.args and ast.unparse(call.args[0]) in OPENED)


def dumps_to_a_file(call: ast.Call) -> bool:
    """`json.dump`, and `yaml.dump` or `safe_dump` to a stream."""
    if called(call) == "dump":
        return True
    return called(call) == "safe_dump" and (len(call.args) > 1 or any(word.arg == "stream" for word in call.keywords))


def is_plain(call: ast.Call) -> bool:
    return called(call) in PLAIN or opens_to_write(call) or saves_to_a_path(call) or dumps_to_a_file(call)


@cache
def writers() -> tuple[frozenset[str], frozenset[str]]:
    """Modules that call what is atomic, and those that write in any other way."""
    atomic, plain = set(), set()
    for path in modules():
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        name = path.relative_to(ROOT).as_posix()
        if any(called(call) in ATOMIC for call in calls):
            atomic.add(name)
        if any(map(is_plain, calls)) and name != "dora_diffusion/utils/atomic.py":
            plain.add(name)
    return frozenset(atomic), frozenset(plain)


def tables() -> tuple[str, str]:
    """The part of the page about what is whole at every moment, and that about what is not."""
    _, whole, grows = re.split(r"^## .*$", (ROOT / "docs/reliability.md").read_text(), flags=re.MULTILINE)
    return whole, grows


def named(table: str) -> set[str]:
    """The modules of a table's second column."""
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    return {name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row[1])}


def test_every_module_that_writes_is_in_the_table_and_no_other() -> None:
    whole, grows = map(named, tables())
    assert writers()[0] <= whole | grows
    # exports are made by `save_adapter` and `bake`; what is special is what becomes of them afterwards
    assert whole - writers()[0] == {"ui/tabs/export_files.py"}


def test_what_is_not_atomic_is_said_to_be_so() -> None:
    _, plain = writers()
    assert named(tables()[1]) == plain


@pytest.mark.parametrize("number", [0, 1])
def test_every_row_names_tests_that_there_are(number: int) -> None:
    rows = [line for line in tables()[number].splitlines() if line.startswith("| ")][2:]
    assert rows
    for row in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row)
        assert tests, row
        for file, name in tests:
            assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{name}"


@pytest.mark.parametrize(
    "line",
    [
        *('open(path, "w")', 'open(path, mode="ab")', 'path.open("x")', 'path.write_text("a")', "image.save(path)"),
        *("json.dump(found, file)", "yaml.safe_dump(found, file)", "model.save_pretrained(path)", 'open(path, "r+b")'),
    ],
)
def test_what_writes_is_seen(line: str) -> None:
    (call,) = [node for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Call)]
    assert is_plain(call)


@pytest.mark.parametrize(
    "line", ["open(path)", 'open(path, "rb")', "image.save(buffer)", "session.save(drawn)", "yaml.safe_dump(found)"]
)
def test_what_does_not_is_not(line: str) -> None:
    (call,) = [node for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Call)]
    assert not is_plain(call)
