"""What the documents promise is there: pictures, filled cards, examples that parse, the demo's short form."""

import importlib.util
import re
from pathlib import Path

import pytest

from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.concepts import checked_examples

ROOT = Path(__file__).parents[2]
# recipes are for models that are not here: tests/repository/test_training_recipes.py
EXAMPLES = sorted(
    str(path.relative_to(ROOT / "examples"))
    for path in (ROOT / "examples").glob("*/*.yaml")
    if path.parent.name != "recipes"
)
DOCUMENTS = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "build"} & set(path.parts))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_local_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", document.read_text())
    local = [link for link in links if not link.startswith(("http:", "https:"))]
    assert [link for link in local if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("base", ["pocket", "pocket-dit"])
def test_model_card_is_filled_in(base: str) -> None:
    assert not re.search(r"@[A-Z]+@", (ROOT / "dora_diffusion/assets" / base / "README.md").read_text())


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_ready_to_train(name: str) -> None:
    config = TrainConfig.from_yaml(ROOT / "examples" / name)
    assert len(checked_examples(config.data, seed=config.optim.seed).train) >= 6
    assert config.evaluation.truth_dir is not None


@pytest.mark.parametrize("model", ["pocket", "pocket-dit"])
def test_the_demos_short_form_is_a_valid_config(model: str) -> None:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    config = TrainConfig.from_yaml(ROOT / "examples/subject-robot" / demo.CONFIGS[model], demo.QUICK)
    assert config.model == model
    assert config.optim.steps == 12
