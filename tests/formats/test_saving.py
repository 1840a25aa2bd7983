"""What an adapter is written under and in, and the folders that stand for the file inside them."""

from pathlib import Path

import pytest
import torch

import dora_diffusion as dd
from dora_diffusion.cli import main
from dora_diffusion.cli.arguments import split_adapter
from dora_diffusion.formats import place_of
from dora_diffusion.inspection.header import summarise_header
from dora_diffusion.inspection.report import inspect_adapter
from dora_diffusion.state import AdapterState
from dora_diffusion.utils.atomic import sha256_of
from tests.pocket_random import random_adapter, random_pocket_pipeline
from tests.tolerances import assert_identical


@pytest.fixture(scope="module")
def adapter() -> AdapterState:
    return random_adapter(random_pocket_pipeline())


@pytest.fixture
def run_folder(tmp_path: Path, adapter: AdapterState) -> Path:
    """As training leaves it: an adapter, and a checkpoint with one."""
    folder = tmp_path / "subject:robot"
    (folder / "samples").mkdir(parents=True)
    for place in (folder, folder / "checkpoints" / "step-00000100", folder / "checkpoints" / "step-00000200"):
        dd.save_adapter(adapter, place / "adapter.safetensors")
    return folder


@pytest.mark.parametrize(
    "name, format, line",
    [
        ("ink.pt", "diffusers", "expected a name that ends in .safetensors, such as 'ink.safetensors'"),
        ("ink.bin", "kohya", "expected a name that ends in .safetensors, such as 'ink.safetensors'"),
        ("ink.ckpt", "lycoris", "expected a name that ends in .safetensors, such as 'ink.safetensors'"),
        ("ink", "diffusers", "expected a name that ends in .safetensors, such as 'ink.safetensors'"),
        ("ink-v1.5", "diffusers", "expected a name that ends in .safetensors, such as 'ink-v1.5.safetensors'"),
        ("ink.safetensors", "peft", "the peft format is a folder; give a name without .safetensors, 'ink'"),
        ("ink.bin", "peft", "the peft format is a folder; give a name without .bin, 'ink'"),
    ],
)
def test_names_that_say_something_else_are_refused(tmp_path, adapter, name: str, format: str, line: str) -> None:
    with pytest.raises(ValueError) as caught:
        dd.save_adapter(adapter, tmp_path / name, format=format)
    assert str(caught.value) == f"{tmp_path / name}: {line}"
    assert list(tmp_path.iterdir()) == []
    assert dd.save_adapter(adapter, tmp_path / "ink-v1.5", format="peft").is_dir()


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dtype_is_that_of_all_but_magnitudes(tmp_path, adapter, format: str, dtype: torch.dtype) -> None:
    path = dd.save_adapter(
        adapter, tmp_path / ("a" if format == "peft" else "a.safetensors"), format=format, dtype=dtype
    )
    found = dd.load_adapter(path)
    for name, module in adapter.modules.items():
        read = found.modules[name]
        assert read.magnitude is not None and module.magnitude is not None
        assert_identical(read.magnitude.flatten(), module.magnitude.flatten())
        assert_identical(read.up.to(dtype), module.up.to(dtype))
        assert (read.down.dtype, read.up.dtype) == (dtype, dtype)


def test_convert_keeps_magnitudes_too(tmp_path, adapter) -> None:
    source, target = dd.save_adapter(adapter, tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    assert main(["convert", str(source), str(target), "--dtype", "bf16"]) == 0
    for name, module in dd.load_adapter(target).modules.items():
        magnitude = adapter.modules[name].magnitude
        assert magnitude is not None and module.magnitude is not None and module.down.dtype == torch.bfloat16
        assert_identical(module.magnitude, magnitude)


@pytest.mark.parametrize("format", ["diffusers", "kohya", "comfyui", "peft", "lycoris"])
def test_a_bare_state_says_what_to_write(tmp_path, format: str) -> None:
    pipe = random_pocket_pipeline()
    injection = dd.inject(pipe.unet, dd.DoRAConfig(rank=2))
    with pytest.raises(ValueError, match=r"'down_blocks' is no component .*injection\.state\(\)\.under\(\"unet\"\)"):
        dd.save_adapter(
            injection.state(), tmp_path / "a.safetensors" if format != "peft" else tmp_path / "a", format=format
        )
    assert list(tmp_path.iterdir()) == []
    dd.save_adapter(injection.state().under("unet"), tmp_path / "a.safetensors")


def test_a_folder_of_training_stands_for_its_adapter(run_folder: Path, adapter: AdapterState) -> None:
    for place in (run_folder, run_folder / "checkpoints" / "step-00000100", str(run_folder)):
        found, file = dd.load_adapter(place), Path(place) / "adapter.safetensors"
        assert found.origin == "diffusers"
        assert_identical({n: m.down for n, m in found.modules.items()}, {n: m.down for n, m in adapter.modules.items()})
        assert dd.examine(place) == dd.examine(file)
        assert summarise_header(place) == summarise_header(file)
        assert inspect_adapter(place)["sha256"] == sha256_of(file)
    manager = dd.AdapterManager(random_pocket_pipeline())
    report = manager.load_adapter(run_folder, name="robot")
    assert report.sha256 == sha256_of(run_folder / "adapter.safetensors")


def test_folders_of_peft_stay_theirs_and_others_are_refused(tmp_path, run_folder: Path, adapter: AdapterState) -> None:
    folder = dd.save_adapter(adapter, tmp_path / "peft", format="peft")
    dd.save_adapter(adapter, folder / "adapter.safetensors")
    assert place_of(folder) == folder and dd.load_adapter(folder).origin == "peft"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: a folder without training's adapter\.safetensors and without PEFT's"):
        dd.load_adapter(tmp_path / "empty")
    (run_folder / "adapter.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected its checkpoint .*step-00000200$"):
        dd.load_adapter(run_folder)


def test_commands_take_a_run_for_its_adapter(tmp_path, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size, out = ("--width", "64", "--height", "64", "--steps", "1"), tmp_path / "out.safetensors"
    draw = ("generate", "--prompt", "a", "--output", str(tmp_path / "a.png"), *size)
    checkpoint = run_folder / "checkpoints" / "step-00000100"
    for arguments in (
        ("inspect", run_folder),
        ("convert", run_folder, out),
        ("resize", checkpoint, out, "--rank", "1"),
        ("blend", out, "--adapter", f"{run_folder}:0.5", "--adapter", checkpoint),
        ("bake", "pocket", tmp_path / "baked", "--adapter", f"{run_folder}:0.5"),
        (*draw, "--adapter", f"{run_folder}:0.8", "--part", "subject:robot:unet=0.5"),
    ):
        assert main([str(argument) for argument in arguments]) == 0, arguments
    assert "subject:robot: DoRA" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path)]) == 2
    assert "a folder without" in capsys.readouterr().err


def test_a_strength_is_what_follows_the_last_colon(tmp_path: Path, run_folder: Path) -> None:
    assert split_adapter(str(run_folder)) == (run_folder, 1.0)
    assert split_adapter(f"{run_folder}:0.8") == (run_folder, 0.8)
    assert split_adapter(r"C:\runs\ink") == (Path(r"C:\runs\ink"), 1.0)
    assert split_adapter(r"C:\runs\ink:0.8") == (Path(r"C:\runs\ink"), 0.8)
    assert split_adapter("ink.safetensors:-1") == (Path("ink.safetensors"), -1.0)
