"""A run's phases on a device that counts: models of published widths, a few blocks deep, keep to the estimate.

The device is one of the tests' own: components that are moved there, and swapped blocks that are brought, count as long
as they are there; so does everything that is computed, while it lives.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward

from benchmarks.full_size.models import config_of, pipeline_of
from benchmarks.full_size.published import PUBLISHED, Published
from dora_diffusion.training.base import memory, placement, swap
from dora_diffusion.training.base.memory import Watch, estimate_memory
from dora_diffusion.training.base.trainable import TrainablePipeline, encoders_of, prepare_trainable
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.batches import Batch
from dora_diffusion.training.step.guard import Guard
from dora_diffusion.training.step.objective import Objectives
from dora_diffusion.training.step.optimisers import build_optimizer
from dora_diffusion.training.step.training_step import TrainingStep
from tests.families.pipelines import PIPELINES
from tests.families.test_full_size import shallow

GPU = torch.device("xpu")
MODELS = {"SDXL base": "sdxl", "SD 3.5 medium": "sd3.5-medium", "FLUX.1 dev": "flux-dev", "Qwen-Image": "qwen-image"}


class CountingDevice(Watch):
    """Adds up what is on the device, and remembers the most of each phase, by component.

    Attributes:
        most: phase -> the most bytes at once.
        there: phase -> components that were there, with their bytes, when it was the most.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        tensors = [tensor for model in models.values() for tensor in (*model.parameters(), *model.buffers())]
        super().__init__(tensors)
        self.models, self.on_device = models, set[str]()
        self.most: dict[str, int] = {}
        self.there: dict[str, dict[str, int]] = {}
        self.phase = "loading"
        self._sizes: dict[str, int] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and look at what there is after it."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.look()
        return result

    def look(self) -> None:
        """Note what there is now."""
        if self._sizes is None:
            self._sizes = {name: self._size(self.models[name]) for name in self.on_device}
        total = self.live + sum(self._sizes.values())
        if total > self.most.get(self.phase, -1):
            self.most[self.phase], self.there[self.phase] = total, dict(self._sizes)

    def changed(self) -> None:
        """Something has been moved."""
        self._sizes = None
        self.look()

    def move(self, model: nn.Module, device: torch.device) -> None:
        """As the placement asks."""
        name = next(name for name, each in self.models.items() if each is model)
        (self.on_device.add if device == GPU else self.on_device.discard)(name)
        self.changed()

    def is_on(self, model: nn.Module, device: torch.device) -> bool:
        """As the placement asks."""
        return any(each is model for each in map(self.models.get, self.on_device)) == (device == GPU)

    def _size(self, model: nn.Module) -> int:
        storages = {id(s): s for s in (t.untyped_storage() for t in (*model.parameters(), *model.buffers()))}
        return sum(storage.nbytes() for storage in storages.values())


@contextmanager
def counting(models: Mapping[str, nn.Module], monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingDevice]:
    device = CountingDevice(models)
    monkeypatch.setattr(placement, "_move", device.move)
    monkeypatch.setattr(placement, "_is_on", device.is_on)

    def told(method: Callable[[Any], None]) -> Callable[[Any], None]:
        def tell(block: Any) -> None:
            method(block)
            device.changed()

        return tell

    for name in ("come", "leave"):
        monkeypatch.setattr(swap._Block, name, told(getattr(swap._Block, name)))
    with device:
        yield device


def stays(to: Any) -> Any:
    """`Tensor.to`, for which the device is where tensors are."""

    def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor if args and args[0] == GPU else to(tensor, *args, **kwargs)

    return moved


def run_phases(pipe: Any, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> CountingDevice:
    """Captions, a picture, two steps, validation and a preview, as a run goes through them."""
    trainable = prepare_trainable(pipe, config)
    models = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    with ExitStack() as stack:
        stack.enter_context(memory._shapes_only(models.values()))
        monkeypatch.setattr(nn.Module, "to", lambda module, *args, **kwargs: module)  # as good as there
        swapped = swap.BlockSwap(trainable.denoiser, config.base.swap_blocks, torch.device("cpu"))
        together = trainable.placement.together
        trainable = replace(trainable, placement=placement.Placement(pipe, GPU, together=together, swap=swapped))
        stack.enter_context(memory._CastsOfCuda())
        device = stack.enter_context(counting(models, monkeypatch))
        monkeypatch.setattr(Tensor, "to", stays(Tensor.to))
        _phases(trainable, config, device, monkeypatch)
    return device


def _phases(
    trainable: TrainablePipeline, config: TrainConfig, device: CountingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, family = trainable.pipe, trainable.family
    longest = memory._longest(family.blank(memory._settings_of(trainable)))
    device.phase = "captions"
    trainable.bring_encoders()
    with torch.no_grad():
        for name in encoders_of(pipe, family):
            memory._read(getattr(pipe, name), 1, longest)
    device.phase = "pictures"
    side = memory._largest_side(trainable, config)
    latents = trainable.encode_pictures(torch.zeros(1, 3, side, side))
    conditioning = memory._blank(trainable, 1, torch.bfloat16, torch.zeros(()))
    batch = Batch(latents, conditioning, torch.zeros(1, 6), torch.ones(1), ("a",), (side, side))
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    monkeypatch.setattr(accelerator, "backward", _backward)
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_get_value", lambda step: 1)  # the first: 0 divides
    optimizer = build_optimizer(trainable, config.optim, config.words)
    step = TrainingStep(
        config.optim,
        accelerator,
        trainable,
        Objectives(pipe, config.optim, config.flow, config.loss).of,
        batches_at=lambda index: [batch],
        optimizer=optimizer,
        guard=Guard(config.guard.model_copy(update={"restores": 0}), {}, optimizer),  # its copies are in main memory
    )
    for number in range(2):
        device.phase = f"step {number}"
        step.take(number)
    device.phase = "validation"
    with trainable.drawing():
        step.loss(batch, seed=0)
    device.phase = "preview"
    with trainable.drawing():
        memory._drawn(trainable, config, latents)
        trainable.placement.bring("vae")
        family.codec.decode(pipe, latents)


def _backward(loss: Tensor) -> None:
    """As `estimate_memory` does it, so that what checkpointing computes again is cast as the first time."""
    _engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def built(model: Published) -> Any:
    pipe = pipeline_of(model, torch.bfloat16)
    pipe.register_modules(scheduler=PIPELINES[MODELS[model.name]].build().scheduler)
    return pipe


@pytest.mark.parametrize("swaps", [False, True], ids=["plain", "swapped"])
@pytest.mark.parametrize("name", MODELS)
def test_every_phase_stays_under_the_estimate(monkeypatch, name: str, swaps: bool) -> None:
    published = next(each for each in PUBLISHED if each.name == name)
    model = shallow(published)
    settings = {"optim": {"gradient_checkpointing": True}, "preview": {"prompts": ["a cat"]}}
    config = config_of(**settings)
    trainable = prepare_trainable(built(model), config)
    blocks = len(swap.repeated_blocks(trainable.denoiser))
    config = config_of(**settings, base={"swap_blocks": blocks if swaps else 0})
    expected = estimate_memory(trainable, config, device="cuda")
    device = run_phases(built(model), config, monkeypatch)
    told = {phase: f"{size / 2**30:.2f} GiB" for phase, size in device.most.items()}
    assert max(device.most.values()) <= expected.total, told
    assert max(device.most.values()) >= 0.8 * expected.total, told
