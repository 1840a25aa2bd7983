"""Trackers: what they are sent, those that are not there, and that none but TensorBoard is begun by itself."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import accelerate.tracking
import pytest
from accelerate.tracking import GeneralTracker, register_tracker_class
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dora_diffusion.pretrain.scenes import background
from dora_diffusion.training.config import LoggingConfig, TrainConfig
from dora_diffusion.training.run.dry_run import describe_plan
from dora_diffusion.training.run.trackers import check_trackers, flat
from dora_diffusion.training.run.train import train
from tests.pocket_random import random_pocket_pipeline


class Ledger(GeneralTracker):
    """Keeps what it is sent."""

    name = "ledger"
    requires_logging_directory = False
    begun: list["Ledger"] = []

    def __init__(self, project: str) -> None:
        super().__init__()
        self.project, self.settings, self.ended = project, {}, False
        self.logged: list[tuple[int, dict[str, float]]] = []
        Ledger.begun.append(self)

    @property
    def tracker(self) -> "Ledger":
        return self

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict[str, object]) -> None:
        self.settings = values

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.logged.append((step, values))

    def finish(self) -> None:
        self.ended = True


@pytest.fixture
def ledger() -> Iterator[type[Ledger]]:
    register_tracker_class(Ledger)
    Ledger.begun = []
    yield Ledger
    del accelerate.tracking.LOGGER_TYPE_TO_CLASS["ledger"]


def config(folder: Path, **sections: object) -> TrainConfig:
    """Two steps over a small base."""
    (folder / "images").mkdir()
    random_pocket_pipeline().save_pretrained(folder / "base")
    for name in ("red", "blue", "meadow"):
        background(name, 64).save(folder / "images" / f"{name}.png")
    return TrainConfig.model_validate(
        {
            "model": str(folder / "base"),
            "output_dir": folder / "run",
            "data": {"instance_dir": folder / "images", "instance_prompt": "a cat", "resolution": 32},
            "adapter": {"rank": 2, "train_text_encoder": True},
            "optim": {"steps": 2, "learning_rate": 1e-2},
            "validation": {"every": 1, "timesteps": 1, "pictures": 1},
            **sections,
        }
    )


def scalars(run: Path, folder: str) -> dict[str, dict[int, float]]:
    """What TensorBoard's own reader finds."""
    events = EventAccumulator(str(run / "logs" / folder))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_alone_by_default_with_losses_and_the_movement_of_each_block(tmp_path) -> None:
    settings = config(tmp_path)
    train(settings)
    found = scalars(tmp_path / "run", "run")
    assert set(found["loss/train"]) == {1, 2} and set(found["loss/fit"]) == {0, 1, 2}
    moved = {tag: values for tag, values in found.items() if tag.startswith(("direction/", "magnitude/"))}
    blocks = {tag.partition("/")[2] for tag in moved}
    assert {block.partition(".")[0] for block in blocks} == {"unet", "text_encoder"} and len(moved) == 2 * len(blocks)
    assert all(values[0] == 0 and 0 < values[2] < 90 for values in moved.values())
    assert [path.name for path in (tmp_path / "run" / "logs").iterdir()] == ["run"]


def test_the_project_has_a_name_and_movement_a_spacing_of_its_own(tmp_path) -> None:
    train(config(tmp_path, logging={"project": "cats", "changes_every": 0}))
    found = scalars(tmp_path / "run", "cats")
    assert set(found["loss/fit"]) == {0, 1, 2}
    assert {tuple(values) for tag, values in found.items() if tag.startswith("direction/")} == {(2,)}


def test_another_tracker_is_sent_numbers_and_settings_without_places(tmp_path, ledger) -> None:
    data = {"instance_dir": tmp_path / "images", "instance_prompt": "a cat", "resolution": 32, "validation_share": 0.4}
    train(config(tmp_path, logging={"trackers": ["ledger", "ledger"], "project": "cats"}, data=data))
    (one,) = ledger.begun
    assert one.project == "cats" and one.ended
    assert {name for step, values in one.logged for name in values if "/" in name and name.startswith("loss")} == {
        "loss/train",
        "loss/validation",
    }
    assert all(isinstance(value, float) for _, values in one.logged for value in values.values())
    assert [step for step, _ in one.logged] == sorted(step for step, _ in one.logged)
    assert one.settings["model"] == "base" and one.settings["optim.learning_rate"] == 1e-2
    assert not [value for value in one.settings.values() if str(tmp_path) in str(value)]
    assert not list((tmp_path / "run" / "logs").glob("**/events*"))


def test_no_tracker_is_none(tmp_path) -> None:
    train(config(tmp_path, logging={"trackers": []}))
    assert not list((tmp_path / "run").glob("logs/**/*"))


def test_one_that_is_not_known_or_not_installed_is_a_line_before_anything_is_loaded(tmp_path) -> None:
    unknown = config(tmp_path, logging={"trackers": ["tensorbord"]})
    for start in (train, describe_plan):
        with pytest.raises(ValueError, match=r"logging\.trackers: got 'tensorbord', expected some of aim, clearml, "):
            start(unknown)
    absent = unknown.model_copy(update={"logging": LoggingConfig(trackers=["tensorboard", "comet_ml"])})
    assert importlib.util.find_spec("comet_ml") is None
    for start in (train, describe_plan):
        with pytest.raises(ValueError, match=r"logging\.trackers: comet_ml is not installed: pip install comet-ml, or"):
            start(absent)
    assert not (tmp_path / "run").exists()


def test_each_name_once() -> None:
    assert check_trackers(LoggingConfig(trackers=["tensorboard", "tensorboard"])) == ["tensorboard"]


def test_settings_are_flat_and_lists_are_text() -> None:
    nested = {"optim": {"steps": 2, "rate": None}, "adapter": {"use_dora": True, "targets": ["to_q", "to_k"]}}
    assert flat(nested) == {"optim.steps": 2, "adapter.use_dora": True, "adapter.targets": "['to_q', 'to_k']"}


@pytest.mark.filterwarnings("ignore")  # of a library that is not ours
def test_wandb_offline_keeps_everything_in_the_run_s_folder(tmp_path, monkeypatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    preview = {"prompts": ["a cat"], "steps": 1}
    train(config(tmp_path, logging={"trackers": ["wandb"], "project": "cats"}, preview=preview))
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb"))
    assert len(list(offline.glob("files/media/images/previews_*.png"))) == 2  # the base, and the end
    assert {path.name for path in tmp_path.iterdir()} == {"base", "images", "run"}


@pytest.mark.filterwarnings("ignore")
def test_mlflow_on_disk(tmp_path, monkeypatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    train(config(tmp_path, logging={"trackers": ["mlflow"], "project": "cats"}))
    (run,) = mlflow.search_runs(experiment_names=["cats"], output_format="list")
    assert run.data.params["optim.learning_rate"] == "0.01" and "loss/train" in run.data.metrics
