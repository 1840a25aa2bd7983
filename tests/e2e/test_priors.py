"""Runs with prior preservation: resumed bit for bit, and drawn by two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run.train import train
from tests.tolerances import assert_identical


def config(base: Path, images: Path, output: Path, prior: dict, **optim) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": str(base),
            "output_dir": output,
            "data": {"instance_dir": images, "instance_prompt": "a <zqx> cat", "resolution": 32, "crop": "random"},
            "prior": prior,
            "adapter": {"rank": 2, "dropout": 0.1, "train_text_encoder": True},
            "words": {"starts": {"<zqx>": "cat"}, "share": 0.5},
            "optim": {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, **optim},
            "preview": {"steps": 1},
            "validation": {"every": 0, "repeats": 1},
            "checkpoint": {"every": 2, "keep": 5},
        }
    )


def test_a_resumed_run_with_the_adapter_off_equals_the_uninterrupted_one(base, images, tmp_path) -> None:
    prior = {"mode": "adapter_off", "class_prompts": ["a dog", "a cow"], "weight": 2.0}
    settings = config(base, images, tmp_path / "run", prior, gradient_accumulation=1)
    whole = load_file(train(settings).adapter)
    for late in (tmp_path / "run" / "checkpoints").glob("step-*4"):
        (late / "parameters.safetensors").write_bytes(b"cut short")
    assert_identical(load_file(train(settings, resume="latest").adapter), whole)
    assert not (tmp_path / "run" / "class").exists()  # nothing was drawn


def test_two_processes_draw_half_of_the_class_pictures_each(base, images, tmp_path) -> None:
    settings = config(
        base, images, tmp_path / "two", {"class_prompts": ["a dog", "a cow", "a hen"], "class_images": 5}, steps=1
    )
    (tmp_path / "two.yaml").write_text(settings.to_yaml())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = ["train_scripts/train_dreambooth_dora.py", "--config", str(tmp_path / "two.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launch, *script], capture_output=True, text=True, env=environment, timeout=1000)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "two" / "class"
    listed = json.loads((folder / "class.json").read_text())
    assert (
        sorted(path.name for path in folder.glob("*.png")) == sorted(listed) == [f"class-{n:04d}.png" for n in range(5)]
    )
    assert [entry["prompt"] for entry in listed.values()] == ["a dog", "a cow", "a hen", "a dog", "a cow"]
    assert list(folder.glob(".*")) == []
    # three and two: each drew its own, and nobody the whole
    assert "3/3" in done.stderr and "2/2" in done.stderr and "5/5" not in done.stderr
