"""examples/recipes: planned on the published architectures, without weights; each value has its reason beside it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.full_size.models import pipeline_of
from benchmarks.full_size.published import PUBLISHED, Published
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run.dry_run import describe_plan
from tests.families.pipelines import PIPELINES
from tests.families.test_full_size import shallow

FOLDER = Path(__file__).parents[2] / "examples" / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
# Beginning of a recipe's name -> the published model, and the tiny pipeline with its scheduler.
MODELS = {
    "sd15": ("SD 1.5", "sd1"),
    "sdxl": ("SDXL base", "sdxl"),
    "sd35": ("SD 3.5 medium", "sd3.5-medium"),
    "flux1": ("FLUX.1 dev", "flux-dev"),
    "flux2-klein": ("FLUX.2 Klein 4B", "flux2-klein"),
    "qwen-image": ("Qwen-Image", "qwen-image"),
    "z-image": ("Z-Image", "z-image"),
}
ABOUT = re.compile(r"Memory: about ([\d.]+) GiB")


def published(name: str) -> Published:
    model, _ = MODELS[name.rpartition("-")[0]]
    return next(each for each in PUBLISHED if each.name == model)


def plan_of(name: str, model: Published, *, memory: float | None = None) -> str:
    """What `train --dry-run` says, on a GPU, with the base's weights out of reach."""
    config = TrainConfig.from_yaml(FOLDER / f"{name}.yaml")

    def skeleton(dtype: torch.dtype) -> Any:
        pipe: Any = pipeline_of(model, dtype)
        pipe.register_modules(scheduler=PIPELINES[MODELS[name.rpartition("-")[0]][1]].build().scheduler)
        return pipe

    return describe_plan(config, memory=memory, skeleton=skeleton)


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate is that of a GPU, where recipes are for; none is asked anything."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_there_is_a_subject_and_a_style_for_every_family() -> None:
    assert sorted(f"{family}-{kind}" for family in MODELS for kind in ("subject", "style")) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_be_planned(name: str) -> None:
    """A few blocks of every kind, at their real width, as tests/families/test_full_size.py has them."""
    lines = plan_of(name, shallow(published(name))).splitlines()
    assert lines[0].endswith(f"({published(name).family})")
    said = {line.split()[0] for line in lines if line[0] != " "}
    assert {"images", "sizes", "adapter", "file", "exports", "memory", "output"} <= said
    assert not any(line.startswith("warning") for line in lines)  # of a base that was distilled
    assert re.search(r"in all +[\d.]+ GiB  on cuda", "\n".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_needs_the_memory_that_it_says(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    estimate = re.search(r"in all +([\d.]+) GiB", plan_of(name, published(name)))
    assert float(ABOUT.search(text)[1]) == pytest.approx(float(estimate[1]), abs=0.5)


@pytest.mark.parametrize("name", RECIPES)
def test_every_value_has_its_reason(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    values = [number for number, line in enumerate(lines) if re.match(r" *[a-z_]+: \S", line)]
    bare = [lines[n] for n in values if " # " not in lines[n] and not lines[n - 1].lstrip().startswith("#")]
    assert bare == [] and len(values) > 15
    assert ABOUT.search("\n".join(lines))


@pytest.mark.parametrize("name", RECIPES)
def test_a_subject_keeps_its_class_and_a_style_trains_the_empty_caption(name: str) -> None:
    config = TrainConfig.from_yaml(FOLDER / f"{name}.yaml")
    is_style = name.endswith("style")
    assert bool(config.prior.prompts) != is_style
    assert config.data.captions.dropout == (0.1 if is_style else 0)
    assert config.optim.batch_size * config.optim.gradient_accumulation == 4
    assert (config.adapter.use_dora, config.adapter.alpha) == (True, config.adapter.rank)
