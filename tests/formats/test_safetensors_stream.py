"""Safetensors files are read and written tensor by tensor, whole or not at all, in the memory of one tensor."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor

from dora_diffusion.formats.safetensors_reader import DTYPES
from dora_diffusion.formats.safetensors_stream import Slot, TensorFile, write_tensor_file
from tests.tolerances import assert_identical

DTYPES_OF_FILES = tuple(DTYPES.values())


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {
        "matrix": torch.randn(5, 3, generator=generator),
        "scalar": torch.tensor(2.5),
        "nothing": torch.zeros(0, 4),
        "kernel": torch.randn(2, 3, 3, 3, generator=generator).bfloat16(),
    }
    for dtype in DTYPES_OF_FILES:
        found[f"of {dtype}"] = torch.randint(0, 2, (7,), generator=generator).to(dtype)
    return found


def copied(file: TensorFile) -> Iterator[tuple[str, Iterator[bytes]]]:
    return ((key, file.blocks(key)) for key in file.slots)


def refusal(path: Path, key: str | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        file = TensorFile(path)
        file.read(key or next(iter(file.slots)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_dtype_and_shape_reads_as_safetensors_reads_it(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "a.safetensors", metadata={"who": "me"})
    file = TensorFile(tmp_path / "a.safetensors")
    assert file.metadata == {"who": "me"}
    assert_identical({key: file.read(key) for key in file.slots}, load_file(tmp_path / "a.safetensors"))


def test_a_copy_has_the_same_bytes(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "a.safetensors", metadata={"who": "me"})
    file = TensorFile(tmp_path / "a.safetensors")
    write_tensor_file(tmp_path / "b.safetensors", file.slots, copied(file), metadata=file.metadata)
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_what_is_written_safetensors_reads(tmp_path: Path) -> None:
    given = tensors()
    names = {dtype: name for name, dtype in DTYPES.items()}
    slots = {key: Slot(names[tensor.dtype], tuple(tensor.shape)) for key, tensor in given.items()}
    by_size = dict(sorted(slots.items(), key=lambda item: -DTYPES[item[1].dtype].itemsize))
    write_tensor_file(tmp_path / "a.safetensors", by_size, ((key, given[key]) for key in by_size), metadata={"é": "ü"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"é": "ü"}
        assert_identical({key: file.get_tensor(key) for key in file.keys()}, given)  # noqa: SIM118


def test_a_transposed_tensor_is_written_by_its_values(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    write_tensor_file(tmp_path / "a.safetensors", {"a": Slot("F32", (3, 2))}, [("a", matrix.T)])
    assert_identical(load_file(tmp_path / "a.safetensors")["a"], matrix.T)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ([("b", torch.zeros(2))], "'b' came where 'a' was expected"),
        ([], "'a' never came"),
        ([("a", torch.zeros(2)), ("a", torch.zeros(2))], "came where None was expected"),
        ([("a", torch.zeros(3))], "is torch.float32 (3,), expected F32 (2,)"),
        ([("a", torch.zeros(2).half())], "is torch.float16 (2,), expected F32 (2,)"),
        ([("a", iter([b"1234"]))], "came with 4 bytes, expected 8"),
    ],
)
def test_what_was_not_announced_leaves_no_file(tmp_path: Path, given: list[tuple[str, Tensor]], complaint: str) -> None:
    with pytest.raises(ValueError) as caught:
        write_tensor_file(tmp_path / "a.safetensors", {"a": Slot("F32", (2,))}, given)
    assert complaint in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_changes_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="the file changed while it was being read"):
        file.read("a")
    assert "cut short" in refusal(path)
    path.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        file.read("a")


@pytest.mark.parametrize("size", [1000, None], ids=["shorter", "of the same size"])
def test_a_file_that_changes_within_one_tensor_is_an_error(tmp_path: Path, size: int | None) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(10_000_000)}, path)
    blocks = TensorFile(path).blocks("a")
    next(blocks)
    with open(path, "r+b") as file:
        file.truncate(size or path.stat().st_size)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(ValueError, match="changed"):
        list(blocks)


def test_missing_and_foreign_files_are_refused_in_one_line(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "none.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"hello, this is no tensor file")
    assert "not a safetensors file" in refusal(tmp_path / "b.safetensors")
    save_file({"a": torch.zeros(3)}, tmp_path / "c.safetensors")
    assert "no tensor 'b' among its 1" in refusal(tmp_path / "c.safetensors", "b")


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is counted in other units elsewhere")
def test_a_large_file_passes_in_the_memory_of_its_largest_tensor(tmp_path: Path) -> None:
    path, count, each = tmp_path / "a.safetensors", 24, 4 * 2**20
    slots = {f"t{index:02}": Slot("F32", (each // 4,)) for index in range(count)}
    write_tensor_file(path, slots, ((key, torch.full((each // 4,), 1.5)) for key in slots))
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from dora_diffusion.formats.safetensors_stream import TensorFile, write_tensor_file\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "source = TensorFile(sys.argv[1]); source.read('t00'); before = peak()\n"
        "write_tensor_file(Path(sys.argv[2]), source.slots, ((key, source.read(key)) for key in source.slots))\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", program, str(path), str(tmp_path / "b.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 6 * each < path.stat().st_size
