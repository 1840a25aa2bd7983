"""Run folders without a training, and processes that stand in for the trainer."""

import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from dora_diffusion.training.config import TrainConfig
from ui.options import UiOptions

WAIT = "import time; time.sleep(600)"
PATIENCE = 300.0  # seconds, for machines that do other things as well: what comes is not waited for any longer


class Scripted:
    """Stands in for `spawn`: runs `script` instead of the trainer."""

    def __init__(self) -> None:
        self.script = ""

    def __call__(self, config: Path, *flags: str, stdout: IO[bytes], stderr: IO[bytes] | int) -> Any:
        return subprocess.Popen(
            [sys.executable, "-c", self.script],
            stdin=subprocess.PIPE, bufsize=0, stdout=stdout, stderr=stderr, start_new_session=True,
        )  # fmt: skip


def until(true: Callable[[], object]) -> None:
    """Wait for it."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def config_of_run(options: UiOptions, name: str, steps: int = 3) -> TrainConfig:
    """A run of few steps, each with a checkpoint."""
    return TrainConfig.model_validate(
        {
            "output_dir": options.runs / name,
            "data": {"instance_dir": options.datasets[0], "instance_prompt": "a wall", "resolution": 32},
            "adapter": {"rank": 2},
            "optim": {"steps": steps, "batch_size": 1},
            "checkpoint": {"every": 1},
        }
    )


def make_run(options: UiOptions, name: str, checkpoints: int = 0) -> Path:
    """A run folder that this app has not started."""
    run = options.runs / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(config_of_run(options, name).to_yaml())
    for step in range(1, checkpoints + 1):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        for file in ("adapter.safetensors", "manifest.json"):
            (folder / file).touch()
    return run


def write_losses(run: Path, steps: int, *, at: float) -> None:
    """As TensorBoard would, at a time."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    (run / "logs").mkdir(exist_ok=True)
    with open(run / "logs" / f"events.out.tfevents.{at:.0f}.a", "wb") as file:
        for step in range(1, steps + 1):
            summary = Summary(value=[Summary.Value(tag="loss/train", simple_value=0.5)])
            record = Event(step=step, wall_time=at, summary=summary).SerializeToString()
            file.write(struct.pack("<QI", len(record), 0) + record + struct.pack("<I", 0))
