"""Nothing that the Train tab starts outlives the app, however it ends; and what was learnt until then goes on."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

pytest.importorskip("gradio", reason="gradio is not installed: pip install dora-diffusion[ui]")

from dora_diffusion.pretrain.scenes import background  # noqa: E402  (after the skip above)
from dora_diffusion.utils.atomic import valid_checkpoints  # noqa: E402
from tests.ui.scripted import PATIENCE, WAIT, Scripted, config_of_run, until  # noqa: E402
from ui.options import UiOptions  # noqa: E402
from ui.train import plan as train_plan  # noqa: E402
from ui.train.log import last_reason  # noqa: E402
from ui.train.plan import Planner  # noqa: E402
from ui.train.process import Trainer  # noqa: E402
from ui.train.runs import LOG, LossReader, list_checkpoints  # noqa: E402

pytestmark = pytest.mark.usefixtures("plain_signals")


@pytest.fixture
def options(adapters: Path, tmp_path: Path) -> UiOptions:
    """Folders of their own."""
    (tmp_path / "sets").mkdir()
    return UiOptions(model="random", adapters=adapters, datasets=(tmp_path / "sets",), runs=tmp_path / "runs")


def test_closing_ends_a_plan_and_removes_its_folder(
    options: UiOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    scripted = Scripted()
    scripted.script = WAIT
    monkeypatch.setattr(train_plan, "spawn", scripted)
    planner = Planner()
    failed: list[str] = []

    def plan() -> None:
        try:
            planner.plan(config_of_run(options, "robot"))
        except ValueError as error:
            failed.append(str(error))

    thread = threading.Thread(target=plan)
    thread.start()
    until(lambda: planner._process is not None)
    process = planner._process
    assert process is not None and process.poll() is None
    planner.close()
    assert process.poll() is not None and not list((tmp_path / "temporary").iterdir())
    thread.join(PATIENCE)
    with pytest.raises(ValueError, match="^plan: the app is closing"):
        planner.plan(config_of_run(options, "robot"))
    assert failed == ["plan: the app is closing; start it again"]
    assert planner._process is not None and planner._process.poll() is not None


CLOSING = """
import sys, threading, time
from pathlib import Path
from types import SimpleNamespace
from dora_diffusion.training.config import TrainConfig
from ui.server.health import on_shutdown
from ui.train.plan import Planner
from ui.train.process import Trainer
config, planner, trainer = TrainConfig.from_yaml(Path(sys.argv[1])), Planner(), Trainer()
threading.Thread(target=lambda: planner.plan(config), daemon=True).start()
trainer.start(config)
while planner._process is None:
    time.sleep(0.01)
class Demo:
    server, was_told = None, False
    @property
    def is_running(self):  # asked first when the signals have their handlers
        if not self.was_told:
            print(planner._process.pid, trainer._last.process.pid, flush=True)
        self.was_told = True
        return True
    def close(self, verbose):
        pass
on_shutdown(Demo(), SimpleNamespace(stop_all=lambda: None, close=lambda: None), [planner.close, trainer.close])
"""


def test_a_signal_ends_planning_and_training_with_the_app(options: UiOptions, tmp_path: Path) -> None:
    (tmp_path / "robot.yaml").write_text(config_of_run(options, "robot").to_yaml())
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", CLOSING, str(tmp_path / "robot.yaml")],
        stdout=subprocess.PIPE, text=True, env=dict(os.environ) | {"TMPDIR": str(temporary)},
    ) as app:  # fmt: skip
        try:
            assert app.stdout is not None
            children = [int(child) for child in app.stdout.readline().split()]
            assert len(children) == 2 and all(map(_is_there, children))
            assert [path.name[:10] for path in temporary.iterdir()] == ["dora-plan-"]
            app.terminate()
            assert app.wait(PATIENCE) == 0
        finally:
            app.kill()
    assert not any(map(_is_there, children)) and not list(temporary.iterdir())


APP = """
import sys, time
from pathlib import Path
from dora_diffusion.training.config import TrainConfig
from ui.train.process import Trainer
trainer = Trainer()
trainer.start(TrainConfig.from_yaml(Path(sys.argv[1])))
print(trainer._last.process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_an_app_that_is_killed_leaves_no_trainer_and_a_run_that_goes_on(
    pipe: StableDiffusionPipeline, options: UiOptions, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path / "base")
    background("red", 64).save(options.datasets[0] / "red.png")
    config = config_of_run(options, "robot", steps=100_000).model_copy(update={"model": str(tmp_path / "base")})
    (tmp_path / "robot.yaml").write_text(config.to_yaml())
    run = options.runs / "robot"
    with subprocess.Popen(
        [sys.executable, "-c", APP, str(tmp_path / "robot.yaml")], stdout=subprocess.PIPE, text=True
    ) as app:
        try:
            assert app.stdout is not None
            child = int(app.stdout.readline())
            until(lambda: len(list_checkpoints(run)) > 1)
            os.kill(child, 0)
        finally:
            app.kill()
    try:
        until(lambda: not _is_there(child))
    finally:
        _end(child)
    assert last_reason(run / LOG) == "stopped"  # by itself: it was not cut off after SECONDS_TO_END
    whole = [int(path.name[5:]) for path in valid_checkpoints(run / "checkpoints")]
    assert whole == list(list_checkpoints(run)) and max(LossReader(run).losses().train) == whole[-1]
    trainer = Trainer()
    try:
        trainer.resume(run)
        until(lambda: max(list_checkpoints(run)) > whole[-1] or not trainer.running)
        assert f"resuming from step-{whole[-1]:08d}" in (run / LOG).read_text()
        assert max(list_checkpoints(run)) > whole[-1], (run / LOG).read_text()
    finally:
        trainer.close()


def _is_there(process: int) -> bool:
    """Whether it runs; one that has ended and waits for somebody to ask for its status does not."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        if not Path("/proc/self/stat").exists():
            return subprocess.run(["ps", "-p", str(process)], capture_output=True, check=False).returncode == 0
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def _end(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
