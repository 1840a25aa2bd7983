"""The command line as a person meets it: help is quick, errors are one line with status 2, outputs are there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dora_diffusion.cli import COMMANDS, main, split_adapter
from dora_diffusion.formats import save_adapter
from dora_diffusion.pretrain.scenes import background
from tests.pocket_random import random_adapter, random_pocket_pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    random_pocket_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return save_adapter(random_adapter(random_pocket_pipeline()), tmp_path_factory.mktemp("a") / "ink.safetensors")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys; from dora_diffusion.cli import main\n"
        f"try: main({[*command, '--help']!r})\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'gradio', 'numpy'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: dora-diffusion" in done.stdout


MISTYPED = [
    ((), "dora-diffusion: error: the following arguments are required: COMMAND; see dora-diffusion --help"),
    (("convert",), "dora-diffusion convert: error: the following arguments are required: IN, OUT; see "),
    (("convert", "a", "b", "--to", "zip"), "dora-diffusion convert: error: argument --to: 'zip' is no format"),
    (("convert", "a", "b", "--axis", "in"), "dora-diffusion convert: error: argument --axis: invalid choice: 'in'"),
    (("inspect", "a", "--jso\nn"), "dora-diffusion inspect: error: unrecognized arguments: --jso"),
    (("generate", "--steps", "many"), "dora-diffusion generate: error: argument --steps: invalid int value: 'many'"),
    (("draw",), "dora-diffusion: error: argument COMMAND: invalid choice: 'draw'"),
    *(((name, "--count"), f"dora-diffusion {name}: error: ") for name in sorted({*COMMANDS} - {"train", "evaluate"})),
    *(((name,), f"dora-diffusion {name}: error: the following arguments are requ") for name in ("train", "evaluate")),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), MISTYPED)
def test_what_is_mistyped_is_one_line_that_tells_where_help_is(capsys, arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    out, error = capsys.readouterr()
    command = " ".join(said.split(": ")[0].split())
    assert out == "" and error.startswith(said) and error.endswith(f"; see {command} --help\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize("script", ["-m ui", "train_scripts/score_pocket.py", "train_scripts/pretrain_pocket.py"])
def test_the_other_programs_say_so_as_well(script: str) -> None:
    command = [sys.executable, *script.split(), "--nothing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "error: " in last and last.endswith(" --help")
    assert "usage:" not in done.stderr


def fails(capsys, *arguments: str) -> str:
    """Run a command that must fail; returns its single line on stderr."""
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("dora-diffusion: ")
    assert "\n" not in error
    return error


def test_mistakes_are_one_line(capsys, tmp_path, adapter, base) -> None:
    assert "nowhere.yaml" in fails(capsys, "train", str(tmp_path / "nowhere.yaml"))
    (tmp_path / "bad.yaml").write_text(f"output_dir: x\ndata:\n  instance_dir: {tmp_path}\noptim:\n  step: 3\n")
    assert "optim.step" in fails(capsys, "train", str(tmp_path / "bad.yaml"))
    draw = ("generate", "--prompt", "a cat", "--model", str(base), "--output", str(tmp_path / "x.png"))
    assert "ink.safetensors:much" in fails(capsys, *draw, "--adapter", "ink.safetensors:much")
    assert "no such file" in fails(capsys, *draw, "--adapter", str(tmp_path / "nowhere.safetensors"))
    assert "ends in .png" in fails(capsys, *draw[:-1], "out.jpg")
    assert "no such folder" in fails(capsys, "generate", "--prompt", "x", "--model", "./nowhere")
    assert "steps must lie" in fails(capsys, *draw, "--steps", "0")
    (tmp_path / "text.safetensors").write_text("hello")
    assert "text.safetensors" in fails(capsys, "inspect", str(tmp_path / "text.safetensors"))
    assert "nowhere" in fails(capsys, "doctor", str(tmp_path / "nowhere"))


def test_generate_writes_a_picture_with_its_metadata(capsys, tmp_path, adapter, base) -> None:
    output = tmp_path / "out.png"
    arguments = ("--prompt", "a cat", "--model", str(base), "--steps", "2", "--output", str(output))
    assert main(["generate", *arguments, "--adapter", f"{adapter}:0.5", "--adapter", f"{adapter}:-0.25"]) == 0
    with Image.open(output) as picture:
        picture.load()
    record = json.loads(picture.text["dora_diffusion"])
    assert [(use["name"], use["weight"]) for use in record["adapters"]] == [("ink", 0.5), ("ink-2", -0.25)]
    assert all(len(use["sha256"]) == 64 for use in record["adapters"])
    assert record["settings"]["prompt"] == "a cat"
    assert picture.text["parameters"].startswith("a cat <lora:ink:0.5> <lora:ink-2:-0.25>\n")
    assert picture.size == (128, 128)
    assert "ink: DoRA rank 4" in capsys.readouterr().out


def test_generate_mixes_as_another_tool_does_and_by_part(capsys, tmp_path, adapter, base) -> None:
    pictures = {}
    for mode in ("additive", "comfyui"):
        output = tmp_path / f"{mode}.png"
        arguments = ("--prompt", "a cat", "--model", str(base), "--steps", "2", "--output", str(output))
        mix = ("--adapter", f"{adapter}:0.8", "--adapter", f"{adapter}:0.5", "--part", "ink:text_encoder=0")
        assert main(["generate", *arguments, *mix, "--blend", mode]) == 0
        with Image.open(output) as picture:
            pictures[mode] = picture.tobytes()
        uses = json.loads(picture.text["dora_diffusion"])["adapters"]
        assert [use["mode"] for use in uses] == [mode, mode]
        assert uses[0]["weight"] == {"unet": 0.8, "text_encoder": 0.0}
    assert pictures["additive"] != pictures["comfyui"]
    capsys.readouterr()  # progress bars
    assert "no adapter named 'x'" in fails(capsys, "generate", *arguments, *mix, "--part", "x:unet=1")


def test_inspect_says_what_a_file_holds(capsys, adapter, base) -> None:
    assert main(["inspect", str(adapter), "--json", "--model", str(base)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["format"], facts["ranks"], facts["magnitude_axis"]) == (
        "DoRA",
        "diffusers",
        [4],
        "out",
    )
    total = sum(facts["layers"].values())
    assert facts["matched"] == f"{total} of {total} layers"
    assert main(["inspect", str(adapter)]) == 0
    assert f"{facts['layers']['unet']} layers" in capsys.readouterr().out


def test_doctor_says_what_would_be_lost(capsys, tmp_path) -> None:
    background("blue", 96).save(tmp_path / "good.png")
    assert main(["doctor", str(tmp_path), "--instance-prompt", "a cat"]) == 0
    assert main(["doctor", str(tmp_path)]) == 1
    assert "good.png" in capsys.readouterr().out
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    assert main(["doctor", str(tmp_path), "--instance-prompt", "a cat"]) == 1
    assert "broken.png" in capsys.readouterr().out


def test_train_dry_run_and_train_through_the_script(capsys, tmp_path, base) -> None:
    images = tmp_path / "images"
    images.mkdir()
    background("beach", 64).save(images / "one.png")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {base}\noutput_dir: {tmp_path / 'run'}\n"
        "data: {instance_dir: images, instance_prompt: a cat, resolution: 32}\n"
        "adapter: {rank: 2}\noptim: {steps: 2}\nvalidation: {repeats: 1}\nevaluation: {truth_dir: images, seeds: 1}\n"
    )
    assert main(["train", str(config), "--dry-run", "--adapter.rank", "3"]) == 0
    plan = capsys.readouterr().out
    assert "unet" in plan
    assert not (tmp_path / "run").exists()
    script = [sys.executable, "train_scripts/train_dreambooth_dora.py", "--config", str(config)]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter.safetensors").is_file()
    assert main(["evaluate", str(config)]) == 0
    report = json.loads((tmp_path / "run" / "evaluation" / "report.json").read_text())
    assert set(report["scores"]) == {"before", "after", "ceiling", "floor", "count"}
    with Image.open(tmp_path / "run" / "evaluation" / "grid.png") as grid:
        assert grid.size == (64, 3 * 64)


@pytest.mark.parametrize(
    "text, path, strength",
    [
        ("ink.safetensors", "ink.safetensors", 1.0),
        ("ink.safetensors:0.8", "ink.safetensors", 0.8),
        ("a:b.safetensors:-2", "a:b.safetensors", -2.0),
        ("c:/ink.safetensors", "c:/ink.safetensors", 1.0),
    ],
)
def test_adapter_option(text: str, path: str, strength: float) -> None:
    assert tuple(map(str, split_adapter(text))) == (path, str(strength))


def test_a_file_of_another_trainer_becomes_a_run_of_ours(tmp_path: Path, capsys) -> None:
    """Imported, planned, and never written over unasked."""
    (tmp_path / "img" / "3_zqx robot").mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (64, 64), "teal").save(tmp_path / "img" / "3_zqx robot" / f"{number}.png")
    source = tmp_path / "robot.toml"
    source.write_text(
        'pretrained_model_name_or_path = "pocket"\ntrain_data_dir = "img"\noutput_dir = "runs"\noutput_name = "robot"\n'
        'network_module = "networks.lora"\nnetwork_dim = 4\nnetwork_alpha = 4\nnetwork_train_unet_only = true\n'
        "resolution = 64\nmax_train_epochs = 2\ntrain_batch_size = 2\nlearning_rate = 1e-4\ntorch_compile = true\n"
    )
    assert main(["import-config", str(source)]) == 0
    said = capsys.readouterr().out
    assert "network_dim: 4 -> adapter.rank: 4" in said and "torch_compile: true -> no counterpart yet" in said
    assert f"wrote {tmp_path / 'robot-dora.yaml'}" in said
    assert main(["train", str(tmp_path / "robot-dora.yaml"), "--dry-run"]) == 0
    assert "steps      12 of 2 x 1" in capsys.readouterr().out
    assert "is there already" in fails(capsys, "import-config", str(source))
    assert "the file that is read" in fails(capsys, "import-config", str(source), "--output", str(source))
    assert main(["import-config", str(source), "--output", str(tmp_path / "robot-dora.yaml")]) == 0


def test_a_file_of_no_trainer_is_one_line_and_nothing_is_written(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.json").write_text("[]")
    assert "a.json: got a list, expected" in fails(capsys, "import-config", str(tmp_path / "a.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
