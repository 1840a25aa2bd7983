"""Where a run's numbers go: the trackers that accelerate knows, by their names; each is sent what it takes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL import Image

from dora_diffusion.training.config import LoggingConfig, TrainConfig
from dora_diffusion.training.run.checkpoint import resumable_part

# The others are called as their libraries are.
_PACKAGES = {"comet_ml": "comet-ml"}
# TensorBoard's files stay small: the app reads them while they grow. Pictures lie beside them.
_TAKE_PICTURES = ("wandb", "swanlab")


def check_trackers(logging: LoggingConfig) -> list[str]:
    """The names of the trackers, each once.

    Raises:
        ValueError: one is not known, or its library is not installed; one line with the command that does it.
    """
    wanted, known = list(dict.fromkeys(logging.trackers)), {str(name) for name in LOGGER_TYPE_TO_CLASS}
    own = known - set(_by_accelerate())  # classes that a program has registered
    for name in wanted:
        if name not in known:
            raise ValueError(f"logging.trackers: got {name!r}, expected some of {', '.join(sorted(known))}")
        if name not in own and name not in {str(one) for one in get_available_trackers()}:
            raise ValueError(
                f"logging.trackers: {name} is not installed: pip install {_PACKAGES.get(name, name)}, or take it out"
            )
    return wanted


def _by_accelerate() -> list[str]:
    from accelerate.utils import LoggerType

    return [str(one.value) for one in LoggerType]


def start_trackers(accelerator: Accelerator, config: TrainConfig) -> None:
    """Begin to log; what holds settings gets those that say what is trained, but not where anything lies."""
    folder = config.output_dir
    own: dict[str, dict[str, Any]] = {
        "wandb": {"name": folder.name, "dir": str(folder)},  # in which it makes `wandb`
        "trackio": {"name": folder.name},
        "mlflow": {"run_name": folder.name},
        "swanlab": {"experiment_name": folder.name, "logdir": str(folder / "logs" / "swanlab")},
        "dvclive": {"dir": str(folder / "logs" / "dvclive")},
    }
    accelerator.init_trackers(config.logging.project, init_kwargs=own)
    settings = resumable_part(config) | {"model": Path(config.model).name}
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":  # whose file would be another beside its own
            tracker.store_init_configuration(flat(settings))


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """Dotted key -> number, text or flag; a list is text, and what is not set is left out."""
    found: dict[str, int | float | str | bool] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return found


def log_pictures(accelerator: Accelerator, pictures: Sequence[Image.Image], step: int) -> None:
    """Send previews to the trackers that show lists of pictures."""
    for tracker in accelerator.trackers:
        if tracker.name in _TAKE_PICTURES:
            tracker.log_images({"previews": list(pictures)}, step=step)
