"""How often a step waits for the device: each wait leaves it idle until the host has caught up."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dora_diffusion.generation.prompts import scaled_by_weights
from dora_diffusion.pretrain.scenes import background
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run import train as running
from dora_diffusion.training.run.callbacks import TrainingCallback
from tests.families.pipelines import PIPELINES
from tests.tolerances import assert_close

# What reads a tensor's values, or makes a tensor whose shape depends on them.
READS = {"tolist", "cpu", "numpy", "equal", "allclose"}
DEPENDS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "is_nonzero"}


class Waits:
    """Where the host would wait, were the tensors on a device of their own.

    What an optimiser does is left out: torch's keep their counts of steps on the CPU, where they are read.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self._is_optimisers = False

    def note(self, what: str) -> None:
        if not self._is_optimisers:
            ours = [frame for frame in traceback.extract_stack() if "dora_diffusion" in frame.filename]
            self.found.append(f"{what} in {ours[-1].name}" if ours else what)

    def optimiser(self, begins: bool) -> None:
        self._is_optimisers = begins

    @contextmanager
    def counted(self) -> Iterator[None]:
        hooks = [
            register_optimizer_step_pre_hook(lambda *_: self.optimiser(True)),
            register_optimizer_step_post_hook(lambda *_: self.optimiser(False)),
        ]
        try:
            with _Reads(self), _Depends(self):
                yield
        finally:
            for hook in hooks:
                hook.remove()


class _Reads(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS:
            self._waits.note(func.__name__)
        return func(*args, **(kwargs or {}))


class _Depends(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") in DEPENDS:
            self._waits.note(func._schema.name)
        return func(*args, **(kwargs or {}))


class Steps(TrainingCallback):
    """What was found in each step."""

    def __init__(self, waits: Waits) -> None:
        self._waits, self.found = waits, []

    def step(self, number: int, loss: float, rate: float) -> None:
        self.found.append(self._waits.found[:])
        self._waits.found.clear()


def with_scaler(**settings: Any) -> Accelerator:
    """As on a GPU under fp16."""
    accelerator = Accelerator(**settings)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    accelerator.unscale_gradients = lambda: accelerator.scaler.unscale_(accelerator._optimizers[0].optimizer)
    return accelerator


@pytest.mark.parametrize(
    ("family", "sections", "scaler"),
    [
        ("sd1", {}, False),
        ("sd1", {}, True),
        ("sd1", {"data": {"crop": "random", "flip": True, "mask_outside": 0.1}}, False),
        ("sd1", {"data": {"caption_dropout": 0.5}, "prior": {"mode": "adapter_off", "caption": "blank"}}, False),
        ("sdxl", {"adapter": {"rank": 2, "train_text_encoder": ["text_encoder"]}}, True),
        ("sdxl", {"words": {"starts": {"zqx": "cat"}}}, False),
        ("sd3", {"optim": {"max_weight_norm": 1.0, "ema_decay": 0.9, "gradient_accumulation": 2}}, False),
        ("flux-dev", {"loss": {"kind": "huber"}, "optim": {"max_grad_norm": 0}}, False),
        ("pixart-alpha", {"loss": {"noise_offset": 0.1, "weighting": "debiased"}}, False),
        ("hunyuan-dit-1.2", {}, False),
        ("qwen-image", {}, False),
        ("sana", {}, False),
        ("flux2-dev", {}, False),
        ("auraflow", {}, False),
    ],
)
def test_a_step_waits_twice_for_its_norms_and_for_what_it_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, sections: dict[str, Any], scaler: bool
) -> None:
    if scaler:
        monkeypatch.setattr(running, "Accelerator", with_scaler)
    tiny, photos = PIPELINES[family], tmp_path / "photos"
    photos.mkdir()
    for name in ("red", "blue"):
        background(name, 64).save(photos / f"{name}.png")
        (photos / f"{name}.txt").write_text("a (red:1.2) cat zqx" if tiny.family in ("sd1", "sdxl") else "a cat")
    config = TrainConfig.model_validate(
        {
            "output_dir": tmp_path / "run",
            "adapter": {"rank": 2},
            "validation": {"every": 0, "timesteps": 1, "pictures": 1},
            "logging": {"trackers": []},
            **sections,
            "data": {"instance_dir": photos, "resolution": tiny.side, **sections.get("data", {})},
            "optim": {"steps": 4, "batch_size": 2, **sections.get("optim", {})},
        }
    )
    waits = Waits()
    steps = Steps(waits)
    with waits.counted():
        running.train(config, pipeline=tiny.build(), callbacks=[steps])
    for found in steps.found[1:3]:  # the first keeps a good state, and the last is followed by the end
        assert found == ["tolist in rare_rows", "tolist in _update"]


def test_words_of_no_mean_weigh_what_they_weighed() -> None:
    weights = torch.tensor([1.0, -1.0])
    hidden = torch.tensor([[[1.0, 2.0], [1.0, 2.0]]], requires_grad=True)  # whose weighed mean is 0
    made = scaled_by_weights(hidden, weights)
    assert_close(made, hidden * weights[None, :, None])
    made.square().sum().backward()
    assert bool(hidden.grad.isfinite().all())
