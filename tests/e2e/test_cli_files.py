"""inspect, convert, blend, resize, extract, bake as people run them: what is written is compared, errors are a line."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.blending import BLEND_SENTENCES
from dora_diffusion.cli import COMMANDS, main
from dora_diffusion.cli.arguments import MERGES, MODES, TOOL_NAMES, split_adapter, split_part
from dora_diffusion.conversion import TOOLS
from dora_diffusion.formats import FORMATS, detect_format, load_adapter, save_adapter
from dora_diffusion.generation.generate import GenerationSettings, generate
from dora_diffusion.inspection.verify import verify_blend
from dora_diffusion.pipelines.base_weights import base_weights
from dora_diffusion.pipelines.loading import load_pipeline
from tests.failing_disk import RENAMES, fail_at_every_call
from tests.pocket_random import random_adapter, random_pocket_pipeline


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A base of random weights, and two adapters for it, ink (DoRA) and lego (LoRA)."""
    folder = tmp_path_factory.mktemp("files")
    pipe = random_pocket_pipeline()
    pipe.save_pretrained(folder / "base")
    save_adapter(random_adapter(pipe), folder / "ink.safetensors")
    save_adapter(random_adapter(pipe, 1, use_dora=False), folder / "lego.safetensors", format="kohya")
    return folder


def run(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def fails(capsys, *arguments: object) -> str:
    """Run a command that must fail; returns its single line on stderr."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dora-diffusion: ")
    return error


def error_in(output: str) -> float:
    """The relative error that a command printed of what it read back."""
    found = re.search(r"read back.*: largest relative error ([0-9.e+-]+) of", output)
    assert found is not None, output
    return float(found[1])


def test_the_lists_of_the_command_line_are_the_librarys() -> None:
    assert {*MODES, *MERGES} == set(BLEND_SENTENCES)
    assert tuple(TOOLS) == TOOL_NAMES


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in ("original", "comfyui", "omi")])
def test_convert_writes_every_format_and_compares(capsys, tmp_path, files, format: str) -> None:
    source = files / ("lego.safetensors" if format == "old-diffusers" else "ink.safetensors")
    target = tmp_path / ("out" if format == "peft" else "out.safetensors")
    output = run(capsys, "convert", source, target, "--to", format)
    assert f"({format})" in output and error_in(output) < 1e-6
    assert load_adapter(target).modules.keys() == load_adapter(source).modules.keys()
    output = run(capsys, "convert", source, target, "--to", format, "--base", files / "base")
    assert error_in(output) < 1e-5


def test_convert_between_kinds(capsys, tmp_path, files) -> None:
    base = ("--base", files / "base")
    target = tmp_path / "out.safetensors"
    output = run(capsys, "convert", files / "lego.safetensors", target, "--dora", *base)
    assert error_in(output) < 1e-5 and load_adapter(target).is_dora
    assert detect_format(target) == "kohya"  # as it came
    output = run(capsys, "convert", files / "ink.safetensors", target, "--lora", *base, "--to", "lycoris")
    assert error_in(output) < 1e-5 and not load_adapter(target).is_dora
    output = run(capsys, "convert", files / "ink.safetensors", target, "--lora", "--rank", "4", *base)
    assert 0.01 < error_in(output) < 1
    output = run(capsys, "convert", files / "ink.safetensors", target, "--dtype", "bf16", *base)
    assert 1e-4 < error_in(output) < 3e-2


@pytest.mark.parametrize("tool", TOOL_NAMES)
def test_convert_for_a_tool_says_how_near_it_draws(capsys, tmp_path, files, tool: str) -> None:
    target = tmp_path / "out.safetensors"
    arguments = ("convert", files / "ink.safetensors", target, "--for", tool, "--base", files / "base")
    said = run(capsys, *arguments)
    assert f"read back as {TOOLS[tool].title} computes it" in said and error_in(said) < 1e-4
    original, base = load_adapter(files / "ink.safetensors"), base_weights(files / "base")
    assert verify_blend(load_adapter(target, base=base), {"": original}, {"": 1.0}, base=base).error < 1e-4
    if tool == "a1111":
        assert 0 < error_in(run(capsys, *arguments, "--rank", 4)) < 1


def test_convert_for_a_tool_needs_a_base_and_chooses_the_format(capsys, tmp_path, files) -> None:
    arguments = ("convert", files / "ink.safetensors", tmp_path / "out.safetensors", "--for", "comfyui")
    assert "name it with --base" in fails(capsys, *arguments)
    assert "leave out --to" in fails(capsys, *arguments, "--base", files / "base", "--to", "kohya")
    assert not (tmp_path / "out.safetensors").exists()


def test_inspect_says_everything_and_how_two_meet(capsys, tmp_path, files) -> None:
    ink, lego = files / "ink.safetensors", files / "lego.safetensors"
    output = run(capsys, "inspect", ink, lego, "--model", files / "base", "--plot", tmp_path / "plot.png")
    assert "ink.safetensors: DoRA, rank 4, magnitudes per output, diffusers format" in output
    assert "lego.safetensors: LoRA, rank 4, kohya format" in output
    assert "matches" in output and "ink ~ lego" in output
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size[0] > 600
    facts = json.loads(run(capsys, "inspect", ink, lego, "--model", files / "base", "--json"))
    assert [found["kind"] for found in facts["files"]] == ["DoRA", "LoRA"]
    assert -1 <= facts["interference"]["pairs"][0]["cosine"] <= 1
    assert "name it with --model" in fails(capsys, "inspect", ink, "--plot", tmp_path / "plot.png")


@pytest.mark.parametrize("mode", [*MODES, *MERGES])
def test_blend_in_every_mode_is_compared_with_the_live_mix(capsys, tmp_path, files, mode: str) -> None:
    adapters = ("--adapter", f"{files / 'ink.safetensors'}:0.8", "--adapter", f"{files / 'lego.safetensors'}:-0.4")
    target = tmp_path / "mix.safetensors"
    part = ("--part", "ink:unet.up_blocks=0.2")
    output = run(capsys, "blend", target, *adapters, *part, "--base", files / "base", "--mode", mode, "--to", "kohya")
    assert f"{mode}: " in output
    limit = 1e-4 if mode != "a1111" else 1.0  # with magnitudes per output, that mode is no DoRA
    assert error_in(output) < limit
    assert "modelspec.merged_from" in load_adapter(target).metadata


def test_a_blend_draws_as_the_manager_does(capsys, tmp_path, files) -> None:
    ink, lego, target = files / "ink.safetensors", files / "lego.safetensors", tmp_path / "mix.safetensors"
    adapters = ("--adapter", f"{ink}:0.8", "--adapter", f"{lego}:0.5")
    run(capsys, "blend", target, *adapters, "--base", files / "base", "--mode", "additive")
    live, saved = load_pipeline(files / "base"), load_pipeline(files / "base")
    manager = AdapterManager(live)
    manager.load_adapter(ink, name="ink")
    manager.load_adapter(lego, name="lego")
    manager.set_adapters({"ink": 0.8, "lego": 0.5})
    manager.fuse()
    other = AdapterManager(saved)
    other.load_adapter(target, name="mix")
    other.set_adapters({"mix": 1.0})
    other.fuse()
    for (name, one), (_, two) in zip(live.unet.named_parameters(), saved.unet.named_parameters(), strict=True):
        assert (one - two).norm() <= 1e-5 * one.norm(), name


def test_resize_and_extract(capsys, tmp_path, files) -> None:
    target = tmp_path / "small.safetensors"
    output = run(capsys, "resize", files / "ink.safetensors", target, "--rank", "2", "--base", files / "base")
    assert load_adapter(target).ranks == (2,) and 0.01 < error_in(output) < 1
    assert "rank" in fails(capsys, "resize", files / "ink.safetensors", target)
    adapter = ("--adapter", files / "ink.safetensors")
    output = run(capsys, "bake", files / "base", tmp_path / "tuned", *adapter)
    assert error_in(output) < 1e-6
    output = run(capsys, "extract", tmp_path / "tuned", files / "base", target, "--rank", "4")
    assert error_in(output) < 2e-3 and load_adapter(target).is_dora
    output = run(capsys, "extract", tmp_path / "tuned", files / "base", target, "--rank", "4", "--lora")
    assert error_in(output) > 0.05  # which is why one extracts a DoRA


def test_a_baked_folder_draws_the_mix(capsys, tmp_path, files) -> None:
    lego = files / "lego.safetensors"
    output = run(capsys, "bake", files / "base", tmp_path / "baked", "--adapter", f"{lego}:0.7")
    assert "byte for byte" in output
    live = load_pipeline(files / "base")
    manager = AdapterManager(live)
    manager.load_adapter(lego, name="lego")
    manager.set_adapters({"lego": 0.7})
    settings = GenerationSettings("a cat", steps=2)
    one, other = generate(load_pipeline(tmp_path / "baked"), settings), generate(live, settings)
    assert max(high for _, high in ImageChops.difference(one, other).getextrema()) <= 1
    (tmp_path / "other").mkdir()
    assert "choose another name" in fails(capsys, "bake", files / "base", tmp_path / "other", "--adapter", lego)


def test_mistakes_are_one_line(capsys, tmp_path, files) -> None:
    ink, base = files / "ink.safetensors", files / "base"
    target = tmp_path / "out.safetensors"
    assert "original name" in fails(capsys, "convert", ink, target, "--to", "comfyui")
    assert "name it with --base" in fails(capsys, "convert", ink, target, "--lora")
    assert "dora-diffusion resize" in fails(capsys, "convert", ink, target, "--rank", "2")
    assert "no such file" in fails(capsys, "blend", target, "--adapter", tmp_path / "no.safetensors", "--base", base)
    assert "name one at least" in fails(capsys, "blend", target, "--base", base)
    assert "no adapter named 'x'" in fails(
        capsys, "blend", target, "--adapter", ink, "--part", "x:unet=1", "--base", base
    )
    assert "expected NAME:PART=STRENGTH" in fails(
        capsys, "blend", target, "--adapter", ink, "--part", "unet", "--base", base
    )
    assert "nowhere" in fails(capsys, "bake", tmp_path / "nowhere", tmp_path / "x", "--adapter", ink)
    assert not list(tmp_path.iterdir())


def test_strengths_are_split() -> None:
    assert split_adapter("a.safetensors:0.5") == (Path("a.safetensors"), 0.5)
    assert split_part("ink:unet.up_blocks=1.2") == ("ink", "unet.up_blocks", 1.2)
    assert all(about for about, _ in COMMANDS.values())


def test_names_that_collide_stay_apart(capsys, tmp_path, files) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ink.safetensors").write_bytes((files / "ink.safetensors").read_bytes())
    (tmp_path / "a" / "ink-2.safetensors").write_bytes((files / "ink.safetensors").read_bytes())
    names = ("a/ink-2", "a/ink", "b/ink")
    adapters = [f"--adapter={tmp_path / name}.safetensors:0.25" for name in names]
    target = tmp_path / "mix.safetensors"
    run(capsys, "blend", target, *adapters, "--base", files / "base", "--mode", "additive")
    assert load_adapter(target).ranks == (12,)


def test_a_file_that_would_be_broken_leaves_the_old_one(capsys, tmp_path, files) -> None:
    ink = load_adapter(files / "ink.safetensors")
    big = {path: replace(module, up=1e6 * module.up) for path, module in ink.modules.items()}
    path = save_adapter(replace(ink, modules=big), tmp_path / "big.safetensors")
    before = path.read_bytes()
    assert "NaN or infinite values, in torch.float16; nothing was written" in fails(
        capsys, "convert", path, path, "--dtype", "fp16"
    )
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_peft_folder_is_replaced_whole(capsys, tmp_path, files) -> None:
    target = tmp_path / "peft"
    run(capsys, "convert", files / "ink.safetensors", target, "--to", "peft")
    assert load_adapter(target).components == ("unet", "text_encoder")
    ink = load_adapter(files / "ink.safetensors")
    unet = {path: module for path, module in ink.modules.items() if path.startswith("unet")}
    save_adapter(replace(ink, modules=unet), target, format="peft")
    assert load_adapter(target).components == ("unet",)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert "no adapter of PEFT's" in fails(
        capsys, "convert", files / "ink.safetensors", tmp_path / "mine", "--to", "peft"
    )
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize("command", ["convert", "convert in place", "blend", "extract", "convert to peft", "bake"])
def test_whatever_call_fails_the_old_output_stays(capsys, tmp_path, files, command: str) -> None:
    room, ink, lego, base = tmp_path / "room", files / "ink.safetensors", files / "lego.safetensors", files / "base"
    out = room / "out.safetensors"
    if command == "convert to peft":
        out, commands = room / "out", [["convert", lego, room / "out", "--to", "peft"]]
    elif command == "blend":
        commands = [["blend", out, f"--adapter={ink}", f"--adapter={lego}", "--base", base]]
    elif command in ("extract", "bake"):
        run(capsys, "bake", base, room / "baked", f"--adapter={ink}:0.5")
        commands = [["extract", room / "baked", base, out, "--rank", "2"]]
        if command == "bake":
            out, commands = room / "baked", [["bake", base, room / "baked", f"--adapter={ink}"]]
    else:
        commands = [["convert", out if "place" in command else lego, out, "--to", "kohya"]]
    if command != "bake":
        save_adapter(load_adapter(ink), out, format="peft" if out.suffix == "" else "diffusers")

    def work() -> None:
        if main([str(argument) for argument in commands[0]]):
            *_, line = capsys.readouterr().err.strip().splitlines()
            assert line.startswith("dora-diffusion: ")
            raise ValueError(line)

    messages = fail_at_every_call(work, room, of=RENAMES)
    assert len(messages) >= 2
    assert all(str(out) in text and "No space left on device" in text and ".staging" not in text for text in messages)


def test_outputs_are_checked_before_the_work(capsys, tmp_path, files) -> None:
    ink, base = files / "ink.safetensors", files / "base"
    assert "ends in .safetensors" in fails(capsys, "convert", ink, tmp_path / "out", "--to", "kohya")
    (tmp_path / "x.safetensors").mkdir()
    assert "is a folder" in fails(capsys, "convert", ink, tmp_path / "x.safetensors")
    assert "name a --rank, or a format" in fails(
        capsys, "convert", ink, tmp_path / "y.safetensors", "--lora", "--base", base
    )
    assert "a whole model by its" in fails(capsys, "inspect", base / "unet" / "diffusion_pytorch_model.safetensors")
