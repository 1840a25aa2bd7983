"""From a recipe and the fields of the tab to a checked configuration of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dora_diffusion.training.config import TrainConfig
from ui.backend.checks import MAX_PROMPT, MAX_SEED, check_name, check_number, check_text, check_whole
from ui.train.data import find_dataset

PLAIN = "plain"
MAX_RUN_STEPS = 1_000_000
MAX_RANK = 1024
MAX_RESOLUTION = 2048
MAX_SAMPLES = 8
KEPT_CHECKPOINTS = 50

# What any small set of pictures can start from, on any base.
_PLAIN_SETTINGS: dict[str, Any] = {
    "data": {"caption_dropout": 0.05},
    "adapter": {"rank": 8, "alpha": 8.0, "target_modules": "all-linear", "train_text_encoder": False},
    "optim": {
        "steps": 400,
        "batch_size": 4,
        "learning_rate": 5e-4,
        "warmup_steps": 20,
        "min_snr_gamma": None,  # it would not train the noisiest step of a schedule that ends in pure noise
    },
    "validation": {"every": 50, "repeats": 1},
}


@dataclass(frozen=True)
class Fields:
    """The tab's fields as they came from the browser, unchecked.

    Attributes:
        name: of the run, and of its folder.
        dataset, recipe: as listed.
        instance_prompt: caption of pictures without one.
        rank, steps, learning_rate, resolution, batch_size, seed: numbers; resolution 0 is the base's own.
        text_encoder, dora: whether text encoders are trained, whether magnitudes are.
        samples: prompts drawn on the way, one a line.
        every: steps between samples and checkpoints.
    """

    name: object
    dataset: object
    recipe: object
    instance_prompt: object
    rank: object
    steps: object
    learning_rate: object
    resolution: object
    batch_size: object
    seed: object
    text_encoder: object
    dora: object
    samples: object
    every: object


def list_recipes(roots: Sequence[Path]) -> dict[str, Path]:
    """The YAML files of the roots' subfolders that train an adapter: what is shown -> the file."""
    found = {
        f"{file.parent.name}/{file.stem}": file
        for root in roots
        for file in sorted(root.glob("*/*.yaml"))
        if not file.parent.name.startswith(".") and _trains_adapter(file)
    }
    return dict(sorted(found.items()))


def _trains_adapter(file: Path) -> bool:
    try:
        return TrainConfig.from_yaml(file).adapter.train_unet
    except ValueError:
        return False


def recipe_settings(name: object, roots: Sequence[Path]) -> dict[str, Any]:
    """A recipe as nested settings, its base and folders left out.

    Raises:
        ValueError: no such recipe.
    """
    if name == PLAIN:
        return {section: dict(values) for section, values in _PLAIN_SETTINGS.items()}
    file = list_recipes(roots).get(name) if isinstance(name, str) else None
    if file is None:
        raise ValueError(f"recipe: got {repr(name)[:60]}, expected one of the list; pick one")
    config = TrainConfig.from_yaml(file)
    settings = config.model_dump(mode="json")
    settings["optim"]["learning_rate"] = config.optim.rate
    for section, key in (("data", "validation_dir"), ("prior", "class_dir"), ("evaluation", "truth_dir")):
        settings[section][key] = None
    return settings


def build_config(
    fields: Fields,
    *,
    model: str,
    roots: Sequence[Path],
    runs: Path,
    files: Mapping[str, Path] | None = None,
) -> TrainConfig:
    """The recipe with the fields put in, checked whole.

    Args:
        fields: from the browser.
        model: the base of the app, which is what is trained on.
        roots: where data sets and recipes lie.
        runs: where run folders go.
        files: components of that base which come from files of their own.

    Raises:
        ValueError: one line that names the field.
    """
    settings = recipe_settings(fields.recipe, roots)
    settings |= {"model": model, "base": dict(files or {})}
    settings["output_dir"] = str(runs / check_name("run name", fields.name))
    settings["data"] |= {
        "instance_dir": str(find_dataset(fields.dataset, roots)),
        "instance_prompt": check_text("instance prompt", fields.instance_prompt) or None,
        "resolution": check_whole("resolution", fields.resolution, low=0, high=MAX_RESOLUTION) or None,
    }
    _put_adapter(settings["adapter"], fields)
    _put_optimiser(settings["optim"], fields, text_encoder=settings["adapter"]["train_text_encoder"])
    every = check_whole("samples every", fields.every, low=0, high=MAX_RUN_STEPS)
    preview = settings.get("preview", {})
    own = {prompt_of(one): one for one in preview.get("prompts", ())}  # with sizes, seeds ... of their own
    prompts = [own.get(line, line) for line in check_samples(fields.samples)]
    settings["preview"] = preview | {"prompts": prompts, "every": every}
    settings["checkpoint"] = {"every": every, "keep": KEPT_CHECKPOINTS}
    try:
        return TrainConfig.model_validate(settings)
    except ValidationError as error:
        raise ValueError(_one_line(error)) from None


def _put_adapter(adapter: dict[str, Any], fields: Fields) -> None:
    """Another rank keeps the update's scale alpha / rank."""
    rank = check_whole("rank", fields.rank, low=1, high=MAX_RANK)
    adapter["alpha"] = adapter["alpha"] / adapter["rank"] * rank
    adapter["rank"] = rank
    adapter["use_dora"] = check_flag("DoRA", fields.dora)
    adapter["train_text_encoder"] = check_flag("text encoder", fields.text_encoder)
    if not adapter["train_text_encoder"]:
        adapter["text_encoder_rank"] = None


def _put_optimiser(optim: dict[str, Any], fields: Fields, *, text_encoder: bool) -> None:
    """The text encoders' rate keeps its ratio to the denoiser's; the warm-up is at most a tenth of the run."""
    rate = check_number("learning rate", fields.learning_rate, low=1e-8, high=1.0)
    text_rate = optim.get("text_encoder_learning_rate")
    if isinstance(text_rate, float):
        text_rate = text_rate / optim["learning_rate"] * rate
    steps = check_whole("steps", fields.steps, low=1, high=MAX_RUN_STEPS)
    optim |= {
        "steps": steps,
        "learning_rate": rate,
        "text_encoder_learning_rate": text_rate if text_encoder else None,
        "batch_size": check_whole("batch size", fields.batch_size, low=1, high=256),
        "seed": check_whole("training seed", fields.seed, low=0, high=MAX_SEED),
        "warmup_steps": min(optim.get("warmup_steps", 0), steps // 10),
    }


def check_flag(name: str, value: object) -> bool:
    """A tick; a `ValueError` when it is anything else."""
    if isinstance(value, bool):
        return value
    raise ValueError(f"{name}: got {repr(value)[:40]}, expected on or off")


def prompt_of(entry: str | Mapping[str, Any]) -> str:
    """The text of an entry of `preview.prompts`."""
    return entry if isinstance(entry, str) else str(entry["prompt"])


def check_samples(value: object) -> list[str]:
    """The lines of a field as prompts.

    Raises:
        ValueError: no text, or too much of it.
    """
    if isinstance(value, str) and len(value) > MAX_SAMPLES * MAX_PROMPT:
        raise ValueError(f"sample prompts: got {len(value)} characters, expected at most {MAX_SAMPLES * MAX_PROMPT}")
    lines = value.splitlines() if isinstance(value, str) else [value] if value is not None else []
    prompts = [text for line in lines if (text := check_text("sample prompts", line))]
    if len(prompts) > MAX_SAMPLES:
        raise ValueError(f"sample prompts: got {len(prompts)} lines, expected at most {MAX_SAMPLES}")
    return prompts


def _one_line(error: ValidationError) -> str:
    """The first fault of a configuration; the checks above leave only those between two fields."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where and not message.startswith(where) else message
