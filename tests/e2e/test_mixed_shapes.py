"""A run of pictures of many shapes with everything that may be done to them, resumed bit for bit."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from dora_diffusion.families import family_of_pipeline
from dora_diffusion.training.config import FlowConfig, OptimConfig, TrainConfig
from dora_diffusion.training.run.finish import TrainResult
from dora_diffusion.training.run.train import train
from dora_diffusion.training.step.objective import Objectives
from tests.families.pipelines import PIPELINES
from tests.pocket_random import random_pocket_pipeline
from tests.tolerances import assert_identical

SHAPES = {"wide": (96, 48), "tall": (40, 80), "square": (64, 64), "small": (24, 24)}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    random_pocket_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Pictures of four shapes; one has a mask, one an alpha channel."""
    folder = tmp_path_factory.mktemp("photos")
    for index, (name, (width, height)) in enumerate(SHAPES.items()):
        values = np.random.default_rng(index).integers(0, 256, (height, width, 4), dtype=np.uint8)
        values[..., 3] = 255
        if name == "tall":
            values[: height // 2, :, 3] = 0
        Image.fromarray(values).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name} cat, one, two")
    mask = np.zeros((48, 96), np.uint8)
    mask[:, 20:60] = 255
    Image.fromarray(mask).save(folder / "wide_mask.png")
    return folder


PRIORS = {
    "adapter_off": {"mode": "adapter_off", "class_prompt": "a cat"},
    "generated": {"class_prompt": "a cat", "class_images": 2},
}


def config_of(base: Path, photos: Path, output: Path, prior: str) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": str(base),
            "output_dir": output,
            "data": {
                "instance_dir": photos,
                "resolution": [32, 48],
                "crop": "random",
                "flip": True,
                "mask_outside": 0.1,
                "cache_variants": 3,
                "cache_dir": output.parent / "cache",
                "captions": {"shuffle": True, "keep_tokens": 1, "dropout": 0.1},
            },
            "prior": PRIORS[prior],
            "adapter": {"rank": 2, "dropout": 0.1},
            "optim": {"steps": 6, "batch_size": 2, "gradient_accumulation": 2, "learning_rate": 1e-3},
            "preview": {"steps": 1},
            "validation": {"every": 3, "repeats": 1},
            "checkpoint": {"every": 3, "keep": 5},
        }
    )


@pytest.mark.parametrize("prior", list(PRIORS))
def test_a_run_of_mixed_shapes_resumes_bit_for_bit(base, photos, tmp_path, prior: str) -> None:
    whole = train(config_of(base, photos, tmp_path / "whole", prior))
    stopped = config_of(base, photos, tmp_path / "stopped", prior)
    train(stopped)
    for late in (tmp_path / "stopped" / "checkpoints").glob("step-*6"):
        (late / "parameters.safetensors").write_bytes(b"cut short")
    resumed = train(stopped, resume="latest")
    assert_identical(load_file(resumed.adapter), load_file(whole.adapter))
    assert resumed.validation == whole.validation
    assert moved(whole, tmp_path / "whole")


def moved(result: TrainResult, folder: Path) -> bool:
    """Whether what is learnt changed between the first checkpoint and the last."""
    first = load_file(folder / "checkpoints" / "step-00000003" / "parameters.safetensors")
    last = load_file(folder / "checkpoints" / "step-00000006" / "parameters.safetensors")
    return all(not first[name].equal(last[name]) for name in first if first[name].is_floating_point())


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "qwen-image"])
def test_a_flows_shift_follows_the_tokens_of_each_size(name: str) -> None:
    pipe = PIPELINES[name].build()
    objectives = Objectives(pipe, OptimConfig(), FlowConfig())
    family, sizes = family_of_pipeline(pipe), [(64, 64), (128, 64), (128, 128)]
    multiple = objectives._sizes.multiple
    shifts = [objectives.of(size).shift for size in sizes]
    assert shifts == [family.shift(pipe.scheduler, w * h // multiple**2) for w, h in sizes]
    assert (len(set(shifts)) == 3) == bool(pipe.scheduler.config.use_dynamic_shifting)
    assert objectives.of((64, 128)) is objectives.of((128, 64))
