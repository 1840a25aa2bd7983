"""The guard beside fp16's scaler, and between processes that must agree."""

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from dora_diffusion.training.config import GuardConfig, OptimConfig
from dora_diffusion.training.step.guard import Guard, TrainingDiverged
from dora_diffusion.training.step.training_step import TrainingStep

GOOD, BAD = 1.0, math.inf


class Scaled(TrainingStep):
    """A step on one number, whose loss and whose gradient are given."""

    def loss(self, batch, *, seed):
        return batch.loss + 0 * self._trainable.parameters()[0].sum()

    def _backward(self, index, taken):
        super()._backward(index, taken)
        for batch in self._batches_at(index):
            for parameter in self._trainable.parameters():
                parameter.grad = torch.full_like(parameter, batch.gradient * 4096)


def step_of(steps, scale: float, **guard):
    """A step under a scaler of this scale: (losses and gradients by step) -> the step, its number, scaler, guard."""
    accelerator = Accelerator(cpu=True, project_dir="run/logs")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    accelerator.unscale_gradients = lambda: accelerator.scaler.unscale_(optimizer)
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    trainable = SimpleNamespace(parameters=lambda: [parameter], refresh_norms=lambda: None, bring_denoiser=lambda: None)
    judge = Guard(GuardConfig(**guard), {"it": parameter}, optimizer)
    batches = [
        [SimpleNamespace(share=1.0, loss=torch.tensor(loss), gradient=gradient, names=("a.png",))]
        for loss, gradient in steps
    ]
    made = Scaled(
        OptimConfig(),
        accelerator,
        trainable,
        objective_of=None,
        batches_at=batches.__getitem__,
        optimizer=optimizer,
        guard=judge,
    )
    return made, parameter, accelerator.scaler, judge


def test_a_gradient_beyond_fp16_is_the_scalers_affair(capsys) -> None:
    step, parameter, scaler, guard = step_of([(1.0, GOOD), (1.0, BAD), (1.0, GOOD)], 4096.0)
    moved = []
    for number in range(3):
        step.take(number)
        moved.append(parameter.tolist())
    assert moved[0] == moved[1] != moved[2]
    assert scaler.get_scale() == 2048 and guard.counts == {"guard/skipped": 0, "guard/restored": 0}
    assert capsys.readouterr().out == ""


def test_once_its_scale_is_one_the_guard_takes_over() -> None:
    step, parameter, _, guard = step_of([(1.0, GOOD), (1.0, BAD), (1.0, BAD)], 1.0, skips=2, restores=0)
    step.take(0)
    before = parameter.tolist()
    step.take(1)
    assert parameter.tolist() == before and guard.counts["guard/skipped"] == 1
    with pytest.raises(TrainingDiverged, match="step 3: the gradient is inf on a.png; 2 steps in a row"):
        step.take(2)


@pytest.mark.parametrize("wrong", [(math.nan, GOOD), (1.0, 1e6)])
def test_what_the_guard_skips_leaves_the_scaler_ready_for_the_next_step(wrong) -> None:
    step, parameter, _, guard = step_of([(1.0, GOOD)] * 4 + [wrong, (1.0, GOOD)], 4096.0, window=4)
    moved = []
    for number in range(6):
        step.take(number)
        moved.append(parameter.tolist())
    assert moved[3] == moved[4] != moved[5] and guard.counts["guard/skipped"] == 1


SCRIPT = """
import math, sys
import torch
from pathlib import Path
from accelerate import Accelerator
from tests.unit.training.test_guard import step_of, GOOD
rank = Accelerator(cpu=True).process_index
wrong = {2: (math.nan, GOOD), 4: (1.0, 1e9), 5: None}  # on the second process alone
steps = [wrong.get(number // 2, (1.0, GOOD)) if number % 2 else (1.0, GOOD) for number in range(14)]
step, parameter, _, guard = step_of([each or (1.0, GOOD) for each in steps], 1.0, window=4)
whole = step._batches_at
step._batches_at = lambda index: [] if steps[index] is None else whole(index)
moved, losses = [], []
for number in range(7):
    losses.append(step.take(number))
    moved.append(parameter.tolist())
still = [number for number in range(1, 7) if moved[number] == moved[number - 1]]
assert losses[5] == 1.0, losses  # of the samples that there are, not half of it
said = f"still {still} skipped {guard.counts['guard/skipped']} at {moved[-1]}"
Path(sys.argv[1], f"rank-{rank}").write_text(said)
torch.distributed.destroy_process_group()
"""


def test_processes_agree_on_what_only_one_of_them_saw(tmp_path) -> None:
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        str(tmp_path),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), environment.get("PYTHONPATH", "")])
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)]
    assert first == second and first.startswith("still [2, 4] skipped 2 at ")
    (loss, gradient) = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert loss.startswith("step 3: the loss is nan on a.png: ") and gradient.startswith("step 5: the gradient is ")
