"""A run as one of several processes, watched: `accelerate launch ... tests/e2e/two_processes.py YAML FOLDER`.

It writes FOLDER/rank-N.json: what each micro-batch held, the loss of each step, and how many collectives were begun
before and after each.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]


def launched(config: Path, folder: Path, *flags: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run this script in two processes on the CPU, by `accelerate launch`; stdout and stderr of both together."""
    plain = ("--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")
    start = ("-m", "accelerate.commands.launch", *plain, "--main_process_port=0", *(flags or ("--multi_gpu",)))
    known = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    known["PYTHONPATH"] = os.pathsep.join([str(ROOT), known.get("PYTHONPATH", "")])
    command = [sys.executable, *start, __file__, str(config), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=known, timeout=500, cwd=ROOT)


def nothing() -> dict[str, list[Any]]:
    """What is seen before the first step."""
    return {"steps": [], "batches": [], "drawn": [], "encoded": [], "said": [], "held": [], "norms": [], "measured": []}


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _collectives() -> int:
    from torch import distributed

    if not distributed.is_initialized():
        return 0
    return int(distributed.group.WORLD._get_sequence_number_for_group())


def _held(trainable: Any) -> int:
    """Bytes of the base's denoiser that this process keeps."""
    trained = {id(parameter) for parameter in trainable.parameters()}
    of_base = [parameter for parameter in trainable.denoiser.parameters() if id(parameter) not in trained]
    return sum((one.to_local() if hasattr(one, "to_local") else one).nbytes for one in of_base)


def watched(
    patched: pytest.MonkeyPatch,
    seen: dict[str, list[Any]],
    *,
    stop_at: int | None = None,
    by_launcher: bool = False,
) -> None:
    """Note what is seen, drawn and encoded.

    Args:
        patched: what does so.
        seen: what is noted.
        stop_at: before which step a SIGTERM comes.
        by_launcher: whether to the launcher, which passes it on, and not to this very process.
    """
    from dora_diffusion.layers.dora import DoRALayer
    from dora_diffusion.training.base.trainable import TrainablePipeline
    from dora_diffusion.training.data import conditioning
    from dora_diffusion.training.run import previews
    from dora_diffusion.training.step.training_step import TrainingStep

    take, loss, draw = TrainingStep.take, TrainingStep.loss, previews.generate
    encode, say = TrainablePipeline.encode_pictures, conditioning.encode_captions
    norm = DoRALayer._squared_norm

    def taken(self: TrainingStep, step: int) -> float:
        before = _collectives()
        if step == stop_at:
            os.kill(os.getppid() if by_launcher else os.getpid(), signal.SIGTERM)
            while by_launcher and not self.stop.asked:  # until it is passed on
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)  # as a launcher passes on what the terminal has sent already
        found = take(self, step)
        seen["steps"].append({"step": step, "loss": found, "before": before, "after": _collectives()})
        seen["held"].append(_held(self._trainable))
        return found

    def noted(self: TrainingStep, batch: Any, *, seed: int, **rest: Any) -> Tensor:
        if torch.is_grad_enabled():
            held = {**batch.conditioning, "latents": batch.latents, "frames": batch.frames}
            seen["batches"].append({"names": batch.names, "hash": _hash(held), "seed": seed})
        else:
            seen["measured"].append([batch.names[0], seed])
        return loss(self, batch, seed=seed, **rest)

    def drawn(pipe: Any, settings: Any) -> Any:
        seen["drawn"].append(settings.prompt)
        return draw(pipe, settings)

    def encoded(self: TrainablePipeline, pixels: Tensor) -> Tensor:
        seen["encoded"].append(len(pixels))
        return encode(self, pixels)

    def said(pipe: Any, family: Any, captions: list[str]) -> Any:
        seen["said"] += captions
        return say(pipe, family, captions)

    def normed(self: DoRALayer) -> Any:
        seen["norms"].append(len(seen["steps"]))
        return norm(self)

    patched.setattr(DoRALayer, "_squared_norm", normed)
    patched.setattr(TrainingStep, "take", taken)
    patched.setattr(TrainingStep, "loss", noted)
    patched.setattr(previews, "generate", drawn)
    patched.setattr(TrainablePipeline, "encode_pictures", encoded)
    patched.setattr(conditioning, "encode_captions", said)


def main() -> None:
    from dora_diffusion.training.config import TrainConfig
    from dora_diffusion.training.run.train import train

    seen = nothing()
    rank = int(os.environ["RANK"])
    who, _, when = os.environ.get("STOP", "").partition("@")
    is_here = who == str(rank) or (who == "launcher" and rank == 0)
    watched(pytest.MonkeyPatch(), seen, stop_at=int(when) if is_here else None, by_launcher=who == "launcher")
    ended = "done"
    try:
        train(TrainConfig.from_yaml(Path(sys.argv[1])), resume=os.environ.get("RESUME"))
    except KeyboardInterrupt:
        ended = "stopped"
    seen["encoded"] = [sum(seen["encoded"])]
    Path(sys.argv[2], f"rank-{rank}.json").write_text(json.dumps({**seen, "ended": ended}))


if __name__ == "__main__":
    main()
