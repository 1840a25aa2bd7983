"""What is imported, decided in fresh processes by the modules that are there and never by a clock."""

import subprocess
import sys
from pathlib import Path

import pytest

import dora_diffusion
from dora_diffusion.formats import save_adapter
from tests.pocket_random import random_adapter, random_pocket_pipeline

IMAGES = Path(__file__).parents[2] / "examples" / "subject-robot" / "images"
COMPILER = ("torch._dynamo", "torch._inductor", "sympy")
MODELS = ("diffusers", "transformers", "accelerate")
NEVER = ("gradio", "tensorboard", "matplotlib")


def loaded(code: str, *names: str) -> set[str]:
    """Those of some modules that a fresh process holds after running code."""
    report = f"\nimport sys; print('loaded:', *[name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def command(*arguments: object) -> str:
    return f"from dora_diffusion.cli import main; assert main({[str(argument) for argument in arguments]!r}) == 0"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(random_adapter(random_pocket_pipeline()), tmp_path_factory.mktemp("a") / "ink.safetensors")


def test_the_package_lists_its_names_and_imports_nothing() -> None:
    listing = "import dora_diffusion as dd; assert set(dir(dd)) >= {'AdapterManager', 'blend', 'train', '__version__'}"
    assert loaded(listing, "torch", "numpy", "PIL", "pydantic") == set()
    assert set(dir(dora_diffusion)) == {*dora_diffusion.__all__, "__version__"}
    assert set(dora_diffusion.__all__) == set(dora_diffusion._HOMES)
    assert all(getattr(dora_diffusion, name) is not None for name in dir(dora_diffusion))


def test_the_doctor_needs_no_torch() -> None:
    assert loaded(command("doctor", IMAGES), "torch", "safetensors", "pydantic", *MODELS, *NEVER) == set()


def test_files_need_neither_models_nor_the_compiler(adapter: Path, tmp_path: Path) -> None:
    kohya, lora = tmp_path / "kohya.safetensors", tmp_path / "lora.safetensors"
    for arguments in (
        ("inspect", adapter),
        ("inspect", adapter, "--json", "--model", "pocket"),
        ("convert", adapter, kohya, "--to", "kohya"),
        ("convert", adapter, lora, "--lora", "--rank", 4, "--base", "pocket"),
        ("resize", adapter, tmp_path / "small.safetensors", "--rank", 2),
        ("blend", tmp_path / "mix.safetensors", "--adapter", adapter, "--adapter", kohya),
    ):
        assert loaded(command(*arguments), *COMPILER, *MODELS, *NEVER) == set(), arguments


def test_layers_train_and_draw_without_the_compiler() -> None:
    code = (
        "import torch\nfrom dora_diffusion import DoRAConfig, inject\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "injection = inject(model, DoRAConfig(rank=2, target_modules=['0']))"
    )
    assert loaded(code, *COMPILER, *MODELS, *NEVER) == set()


def test_drawing_needs_no_trainer(adapter: Path, tmp_path: Path) -> None:
    draw = ("generate", "--prompt", "a castle", "--steps", 1, "--width", 64, "--height", 64, "--adapter", adapter)
    found = loaded(command(*draw, "--output", tmp_path / "out.png"), "dora_diffusion.training", "pydantic", *NEVER)
    assert found <= {"pydantic"}  # which diffusers' own imports may bring
