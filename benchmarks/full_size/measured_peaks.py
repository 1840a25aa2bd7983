"""The memory of a true step beside its estimate: `python -m benchmarks.full_size.measured_peaks CASE` prints JSON.

To be run in a process of its own, so that the peak of resident memory is that of one step. glibc is told to give every
freed block of 64 kB or more back at once, else the peak would be that of its free lists.
"""

import ctypes
import gc
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.full_size.models import config_of, estimate, pipeline_of
from benchmarks.full_size.published import PUBLISHED, Published
from dora_diffusion.families import family_of_pipeline
from dora_diffusion.functional.objectives import weighted_squared_error
from dora_diffusion.training.base.memory import MemoryEstimate, estimate_memory
from dora_diffusion.training.base.meta import load_skeleton
from dora_diffusion.training.base.trainable import PRECISIONS, TrainablePipeline, prepare_trainable
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.step.optimisers import build_optimizer

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_AT_ONCE = 1 << 16
_POCKET = Path("examples/subject-robot/subject.yaml")


@dataclass(frozen=True)
class Case:
    """A published model's denoiser and VAE with random weights, and a step on one picture."""

    model: str
    side: int
    precision: str
    checkpointing: bool = False

    @property
    def config(self) -> TrainConfig:
        """Rank 16 on attention layers."""
        optim = {"mixed_precision": self.precision, "gradient_checkpointing": self.checkpointing}
        return config_of(data={"resolution": self.side}, optim=optim)

    @property
    def published(self) -> Published:
        """The model without its text encoders: they stand by, and would only fill this machine."""
        model = next(model for model in PUBLISHED if model.name == self.model)
        return replace(model, parts={name: model.parts[name] for name in (model.denoiser, "vae")})


CASES: dict[str, Case | None] = {
    "pocket: `train` itself, batch 4 + 4, 128 px, fp32": None,
    "SD 1.5, 256 px, fp32": Case("SD 1.5", 256, "no"),
    "SD 1.5, 512 px, fp32": Case("SD 1.5", 512, "no"),
    "SD 1.5, 512 px, fp32, checkpointing": Case("SD 1.5", 512, "no", checkpointing=True),
    "SD 1.5, 256 px, bf16": Case("SD 1.5", 256, "bf16"),
    "PixArt-Sigma, 512 px, fp32": Case("PixArt-Sigma 1024", 512, "no"),
    "SD 3 medium, 256 px, bf16": Case("SD 3 medium", 256, "bf16"),
    "SDXL, 256 px, bf16": Case("SDXL base", 256, "bf16"),
}


def measure(case: Case | None) -> dict[str, Any]:
    """The estimate and the measured peak of a case, in bytes, and how long the step took."""
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _AT_ONCE)
    ctypes.CDLL(None).mallopt(_TRIM_THRESHOLD, _AT_ONCE)
    expected, peak, seconds = _pocket() if case is None else _published(case)
    facts = {"estimate": expected.total, "activations": expected.activations, "measured": peak}
    return {**facts, "seconds": round(seconds, 1)}


def _published(case: Case) -> tuple[MemoryEstimate, int, float]:
    config = case.config
    expected = estimate(case.published, config, device="cpu")
    before = _resident("VmRSS")
    trainable = prepare_trainable(_with_random_weights(pipeline_of(case.published, PRECISIONS[case.precision])), config)
    optimizer = build_optimizer(trainable, config.optim, config.words)
    for injection in trainable.injections.values():
        injection.keep_norms()
    for parameter in trainable.parameters():  # a step on nothing, for AdamW makes its moments at the first
        parameter.grad = torch.zeros_like(parameter)
    _update(optimizer)
    peak, seconds = _peak_of(lambda: (_step(trainable, case), _update(optimizer)))
    return expected, peak - before, seconds


def _with_random_weights(pipe: Any) -> Any:
    """Small random numbers: layers that are neither dead nor infinite."""
    for name in ("vae", family_of_pipeline(pipe).denoiser.name):
        model = getattr(pipe, name).to_empty(device="cpu")
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                torch.nn.init.uniform_(tensor, -0.02, 0.02)
    return pipe


def _step(trainable: TrainablePipeline, case: Case) -> None:
    """What `training.loop` does in a step, from pixels to gradients."""
    family, dtype = trainable.family, PRECISIONS[case.precision]
    latents = family.codec.encode(trainable.pipe, torch.zeros(1, 3, case.side, case.side)).float()
    noise = torch.randn_like(latents)
    conditioning = {name: _zeros(shape, dtype) for name, shape in family.blank(trainable.denoiser.config).items()}
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        predicted = family.predict(
            trainable.denoiser, (latents + noise).to(dtype), torch.full((1,), 500.0), conditioning, torch.zeros(1, 6)
        )
    weighted_squared_error(predicted, noise - latents, torch.ones(1)).backward()


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(like.shape, dtype=dtype if like.is_floating_point() else like.dtype)


def _update(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


def _pocket() -> tuple[MemoryEstimate, int, float]:
    """Two steps of a run on the embedded base; a run before it loads whatever a run loads once."""
    from dora_diffusion.training.run.train import train

    changes = {
        "optim.steps": "2",
        "optim.warmup_steps": "0",
        "prior.class_images": "8",
        "preview.prompts": "[]",
        "validation.repeats": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        first, second = (
            TrainConfig.from_yaml(_POCKET, {**changes, "output_dir": f"{folder}/{name}"})
            for name in ("first", "second")
        )
        expected = estimate_memory(
            prepare_trainable(load_skeleton(first.model, dtype=torch.float32), first), first, device="cpu"
        )
        train(first)
        gc.collect()
        before = _resident("VmRSS")
        peak, seconds = _peak_of(lambda: train(second))
    return expected, peak - before, seconds


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, field
    return int(found[1]) * 1024


def _peak_of(call: Callable[[], object]) -> tuple[int, float]:
    """The most resident memory during a call, in bytes, and its seconds."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    start = time.perf_counter()
    call()
    return _resident("VmHWM"), time.perf_counter() - start


if __name__ == "__main__":
    print(json.dumps(measure(CASES[sys.argv[1]])))
