"""The container: what is sound is read as safetensors reads it, what is not costs little and is one line."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.fuzz.corpus import special_files
from benchmarks.fuzz.parts import Parts, taken_apart, with_length
from benchmarks.fuzz.watch import Watch, faults
from dora_diffusion.formats import safetensors_reader as container
from dora_diffusion.formats.safetensors_reader import (
    DTYPES,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    read_header,
    read_tensors,
    shown,
)
from tests.tolerances import assert_identical


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file_of(path: Path, entries: dict[str, Any], data: bytes, metadata: dict[str, Any] | None = None) -> Path:
    path.write_bytes(Parts(entries, data, metadata or {}).packed())
    return path


def refusal(path: Path, read: Callable[[Path], object] = read_tensors) -> str:
    """The one line that a file is refused with, without its name."""
    with pytest.raises(ValueError) as caught:
        read(path)
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert message.startswith(f"{shown(path, 300)}: ")
    assert len(message.splitlines()) == 1
    assert len(message) < 500
    assert message.isprintable()
    return message.removeprefix(f"{shown(path, 300)}: ")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1, 2, 3, 1, 2), (0,), (4, 0, 2)], ids=str)
def test_every_dtype_and_shape_is_read_as_safetensors_reads_it(tmp_path, dtype: torch.dtype, shape) -> None:
    torch.manual_seed(0)
    count = torch.Size(shape).numel()
    # 0x3? is finite in every dtype, and 0 or 1 are the only two booleans
    raw = torch.randint(0, 2 if dtype == torch.bool else 64, (count * dtype.itemsize,), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
    # an odd number of bytes before it, to be sorted behind by the writer, which puts wide types first
    save_file({"a": tensor, "b": torch.ones(3, dtype=torch.uint8)}, tmp_path / "x.safetensors", {"note": "kept"})
    found = read_tensors(tmp_path / "x.safetensors")
    ours, metadata = found.tensors, found.metadata
    theirs = load_file(tmp_path / "x.safetensors")
    assert ours.keys() == theirs.keys()
    assert metadata == {"note": "kept"}
    for key, expected in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (expected.dtype, expected.shape)
        assert_identical(ours[key].reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def test_unaligned_tensors_are_read(tmp_path) -> None:
    value = torch.tensor([1.5, -2.0])
    data = b"\x07" + value.numpy().tobytes()
    path = file_of(tmp_path / "x", {"a": entry("U8", [1], [0, 1]), "b": entry("F32", [2], [1, 9])}, data)
    tensors = read_tensors(path).tensors
    assert_identical(tensors["b"], value)
    assert tensors["b"].data_ptr() % 4 == 0
    assert_identical(tensors["a"], torch.tensor([7], dtype=torch.uint8))


def test_tensors_are_views_that_can_be_written_and_saved(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4), "b": torch.full((4,), 2.0)}, path)
    before = path.read_bytes()
    tensors = read_tensors(path).tensors
    tensors["a"].zero_()
    assert_identical(tensors["b"], torch.full((4,), 2.0))
    assert path.read_bytes() == before
    save_file(tensors, tmp_path / "again.safetensors")
    assert_identical(load_file(tmp_path / "again.safetensors")["a"], torch.zeros(4))


def test_keys_keep_the_order_of_the_header(tmp_path) -> None:
    entries = {"b": entry(offsets=[4, 8]), "a": entry(offsets=[0, 4])}
    assert list(read_tensors(file_of(tmp_path / "x", entries, bytes(8))).tensors) == ["b", "a"]


def test_metadata_and_blanks_are_free(tmp_path) -> None:
    metadata = {
        "tags": json.dumps({f'a "tag" {n}': [n, {"b\\": "\\"}] for n in range(20_000)}),
        "": "\n",
        "é": "\U0001f600",
    }
    path = file_of(tmp_path / "x", {"a": entry()}, bytes(4), metadata)
    assert read_tensors(path).metadata == metadata
    header = json.dumps({"a": entry()}, indent=4).encode() + b" " * 99
    (tmp_path / "y").write_bytes(with_length(header)[0] + bytes(4))
    assert read_header(tmp_path / "y")["a"]["shape"] == [1]


def test_a_full_size_lokr_passes(tmp_path) -> None:
    key = "lora_unet_input_blocks_{}_1_transformer_blocks_{}_ff_net_0_proj.lokr_w2_a"
    count = 15_000
    entries = {key.format(n, n): entry("F16", [1, 4], [8 * n, 8 * n + 8]) for n in range(count)}
    assert len(read_tensors(file_of(tmp_path / "x", entries, bytes(8 * count), {"ss": "x" * 2**20})).tensors) == count


FRACTIONS = [dtype for dtype in DTYPES.values() if dtype.is_floating_point or dtype.is_complex]
NOT_FINITE = [
    (dtype, value)
    for dtype in FRACTIONS
    for value in (float("nan"), float("inf"), float("-inf"))
    if not torch.tensor(value).to(dtype).to(torch.complex64).isfinite()  # some types of a byte have no infinity
]


@pytest.mark.parametrize(("dtype", "value"), NOT_FINITE, ids=str)
@pytest.mark.parametrize("place", [0, 2**18 - 1, 2**18, 2**18 + 4], ids=str)
def test_a_value_that_is_not_finite_is_found_wherever_it_is(tmp_path, dtype, value: float, place: int) -> None:
    broken = torch.zeros(2**18 + 5).to(dtype)
    broken[place] = value
    raw = broken.view(torch.uint8)
    good = entry("U8", [8], [0, 8])
    name = next(name for name, known in DTYPES.items() if known == dtype)
    bad = entry(name, list(broken.shape), [8, 8 + len(raw)])
    path = file_of(tmp_path / "x", {"good": good, "bad": bad}, bytes(8) + raw.numpy().tobytes())
    assert refusal(path) == "bad holds NaN or infinite values"


NUMBERS: tuple[Any, ...] = (-1, 1.0, True, None, "1", [1], 2**63)
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "shape of a wrong size": ({"a": entry(shape=[2])}, "does not fill its 4 bytes"),
    "shape that overflows": ({"a": entry(shape=[2**32, 2**32, 4])}, "does not fill"),
    "shape that overflows to its size": ({"a": entry(shape=[2**62, 4, 1])}, "does not fill"),
    "no numbers of an absurd shape": ({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}, "does not fill"),
    "seven sides": ({"a": entry(shape=[1] * 7)}, "expected whole numbers"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, "'shape' is missing"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, "'dtype' is missing"),
    "no entry": ({"a": 8}, "expected an object"),
    "an entry in an entry": ({"a": {**entry(), "b": {"c": 1}}}, "objects within objects"),
    "an unknown dtype": ({"a": entry("F33")}, "dtype F33 is unknown"),
    "a dtype of 100 kB": ({"a": entry("F" * 100_000)}, "is unknown"),
    "a dtype that is none": ({"a": entry(dtype=None)}, "dtype None is unknown"),  # type: ignore[arg-type]
    "offsets turned round": ({"a": entry(offsets=[4, 0])}, "does not fill"),
    "one offset": ({"a": entry(offsets=[4])}, "expected whole numbers"),
    "an overlap": ({"a": entry(), "b": entry()}, "overlap or leave a hole at byte 0"),
    "a hole": ({"a": entry(), "b": entry(offsets=[8, 12])}, "overlap or leave a hole at byte 8"),
    "more than the file": ({"a": entry(shape=[2**38], offsets=[0, 2**40])}, "the file is cut short or too long"),
    "less than the file": ({}, "tensors end at byte 0 of 4"),
    "lines in a key": ({"\r\na\u2028": entry()}, "all printable"),
    "terminal codes in a key": ({"\x1b[2J": entry()}, "all printable"),
    "half a character in a key": ({"\ud800": entry()}, "all printable"),
    "a key of 10 kB": ({"k" * 10_000: entry()}, "of 10000 characters: expected at most 256"),
    **{f"a side {number!r}": ({"a": entry(shape=[number])}, "a: shape") for number in NUMBERS},
    **{
        f"an offset {number!r}": ({"a": entry(offsets=[0, number])}, "a: shape")
        for number in NUMBERS
        if number != 10**40
    },
    "a side of forty digits": ({"a": entry(shape=[10**40])}, "a number of twenty digits"),
    **{f"shape {shape!r}": ({"a": entry(shape=shape)}, "a: shape") for shape in ("", "11", None, 4)},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_header_is_one_line(tmp_path, name: str) -> None:
    entries, expected = BROKEN[name]
    path = file_of(tmp_path / "x.safetensors", entries, bytes(4))
    for read in (read_header, read_tensors):
        assert expected in refusal(path, read)


METADATA: tuple[Any, ...] = ([], "a", 8, None, {"a": 8}, {"a": None}, {"a": {}}, {"a": "\ud800"}, {"a\nb": ""})


@pytest.mark.parametrize("metadata", [*METADATA, {str(n): "" for n in range(5000)}], ids=lambda value: repr(value)[:30])
def test_metadata_are_strings(tmp_path, metadata: Any) -> None:
    header = json.dumps({"__metadata__": metadata, "a": entry()}).encode()
    (tmp_path / "x").write_bytes(with_length(header)[0] + bytes(4))
    assert refusal(tmp_path / "x")


TWICE = (
    '{"a":%s,"a":%s}',
    '{"a":%s,"\\u0061":%s}',
    '{"__metadata__":{"n":"1"},"__metadata__":{"n":"2"},"a":%s}',
    '{"__metadata__":{"n":"1","n":"2"},"a":%s}',
    '{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}',
    '{"a":{"dtype":"F32","shape":[2],"shape":[1],"data_offsets":[0,4]}}',
)


@pytest.mark.parametrize("text", TWICE)
def test_no_key_occurs_twice_on_any_level(tmp_path, text: str) -> None:
    header = text.replace("%s", json.dumps(entry())).encode()
    (tmp_path / "x").write_bytes(with_length(header)[0] + bytes(4))
    assert "occurs twice" in refusal(tmp_path / "x")


@pytest.mark.parametrize("length", [0, 1, 5, 7, 8, 9, 60, -1, -4, -5])
def test_a_file_cut_anywhere_is_refused(tmp_path, length: int) -> None:
    whole = Parts({"a": entry()}, bytes(4)).packed()
    (tmp_path / "x").write_bytes(whole[:length])
    assert refusal(tmp_path / "x")


def test_encodings_other_than_plain_utf8_are_refused(tmp_path) -> None:
    text = json.dumps({"a": entry()})
    for header in (b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16"), text.encode("utf-32-le"), b'{"\xff":0}'):
        (tmp_path / "x").write_bytes(with_length(header)[0] + bytes(4))
        assert "JSON" in refusal(tmp_path / "x")


def test_packed_types_pass_in_a_header_and_are_not_read(tmp_path) -> None:
    path = file_of(tmp_path / "x", {"a": entry("F4", [8], [0, 4])}, bytes(4))
    assert read_header(path)["a"]["dtype"] == "F4"
    assert "packed as F4" in refusal(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_what_is_no_file_does_not_block(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    assert "expected a file" in refusal(tmp_path / "pipe")
    assert "expected a file" in refusal(tmp_path / "zero")
    assert "expected a file" in refusal(tmp_path)
    assert "cannot be read" in refusal(tmp_path / "loop")
    assert "No such file" in refusal(tmp_path / "missing")
    assert "cannot be read" in refusal(Path("a\0b"))


def test_names_of_files_cannot_break_the_line(tmp_path) -> None:
    for name in ("a\nb", "a\x1b[2Jb", "a\u2028b", "n" * 200):
        assert refusal(tmp_path / name)
        (tmp_path / name).write_bytes(b"")
        assert refusal(tmp_path / name)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_a_locked_file_is_refused(tmp_path) -> None:
    path = file_of(tmp_path / "x", {"a": entry()}, bytes(4))
    path.chmod(0)
    assert "Permission denied" in refusal(path)


@pytest.mark.parametrize("change", ["shorter", "longer", "same size"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, change: str) -> None:
    path = file_of(tmp_path / "x", {"a": entry("U8", [100_000], [0, 100_000])}, bytes(100_000))
    with container.Container(path) as file:
        if change == "shorter":
            os.truncate(path, 50_000)
        else:
            with open(path, "r+b") as other:
                other.seek(0, os.SEEK_END if change == "longer" else os.SEEK_SET)
                other.write(b"\x01")
            os.utime(path, ns=(0, 1))
        with pytest.raises(ValueError, match="changed while it was read"):
            file.contents()


def test_a_file_that_is_replaced_or_removed_is_read_as_it_was(tmp_path) -> None:
    path = file_of(tmp_path / "x", {"a": entry("U8", [4], [0, 4])}, b"\x01\x02\x03\x04")
    with container.Container(path) as file:
        os.replace(file_of(tmp_path / "y", {"b": entry("U8", [1], [0, 1])}, b"\x09"), path)
        assert file.contents().tensors["a"].tolist() == [1, 2, 3, 4]


def test_readers_beside_a_writer_see_one_file_or_an_error(tmp_path) -> None:
    path = tmp_path / "x"
    versions = [Parts({"a": entry("U8", [n], [0, n])}, bytes([n % 251]) * n).packed() for n in (50_000, 90_000)]
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for version in versions:
                path.write_bytes(version)  # not atomic, on purpose

    path.write_bytes(versions[0])
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            try:
                values = read_tensors(path).tensors["a"]
            except ValueError as error:
                assert str(path) in str(error)
            else:
                assert values.unique().tolist() == [len(values) % 251]
    finally:
        stop.set()
        writer.join()


COSTLY = [name for name, make in special_files().items() if "without end" in name or "most allowed" in name] + [
    "header of 100 MB", "a million tiny tensors", "a hundred thousand", "deep lists", "deep objects", "deep in a shape",
    "long number", "numbers of 4,000 digits", "a key of 5 MB", "widest characters", "one wide character",
    "long bad dtype", "most tensors, widest keys", "most tensors, most sides",
    "lists within the count", "sparse, of 1 TB",
]  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by Linux")
@pytest.mark.parametrize("name", COSTLY)
def test_the_worst_headers_cost_little(tmp_path, name: str) -> None:
    path = tmp_path / "x.safetensors"
    special_files()[name](path)
    size = path.stat().st_blocks * 512
    with Watch({"header": read_header}) as watch:
        (outcome,) = watch.read(path)
    assert faults(outcome, path, size, slack=3.0) == []


def test_the_memory_is_the_files_own(tmp_path) -> None:
    size = 96 * 2**20
    path = file_of(tmp_path / "x", {"a": entry("F32", [size // 4], [0, size])}, bytes(size))
    code = (
        "import resource, sys; from dora_diffusion.formats.safetensors_reader import read_tensors\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "kept = read_tensors(sys.argv[1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    grown = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    assert int(grown) * (1 if sys.platform == "darwin" else 1024) < 1.25 * size


def test_the_limits_are_what_the_messages_say(tmp_path) -> None:
    path = tmp_path / "x"
    path.write_bytes(with_length(b" " * (MAX_HEADER_BYTES + 1))[0])
    assert refusal(path) == f"header of {MAX_HEADER_BYTES + 1} bytes, expected at most {MAX_HEADER_BYTES}"
    entries = {str(n): entry("U8", [0], [0, 0]) for n in range(MAX_TENSORS)}
    assert len(read_header(file_of(path, entries, b"", {"a": "b"}))) == MAX_TENSORS + 1
    assert str(MAX_TENSORS) in refusal(file_of(path, {**entries, "more": entry("U8", [0], [0, 0])}, b""))


def test_what_is_taken_apart_is_put_together() -> None:
    parts = Parts({"a": entry(shape=[1], offsets=[0, 4])}, bytes(4), {"n": "1"})
    assert taken_apart(parts.packed()) == parts


def test_shown_text_is_short_and_on_one_line() -> None:
    assert shown("plain é") == "plain é"
    assert shown("a\nb\x00\ud800") == "a\\nb\\x00\\ud800"
    assert shown("x" * 300) == "x" * 50 + "..." + "x" * 50
