"""Where components are in a run: on the device while they are used. The device here is one of the tests' own."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dora_diffusion.families import family_of_pipeline
from dora_diffusion.generation.generate import GenerationSettings, generate
from dora_diffusion.training.base import placement as module
from dora_diffusion.training.base.placement import Placement
from dora_diffusion.training.base.swap import BlockSwap
from dora_diffusion.training.base.trainable import prepare_trainable
from dora_diffusion.training.data.conditioning import ConditioningSource
from dora_diffusion.training.run.previews import draw_previews
from tests.families.pipelines import PIPELINES
from tests.unit.training.test_memory import config_of

GPU = torch.device("xpu")  # what is moved there is noted, and stays where it is
CPU = torch.device("cpu")


class Places:
    """What has been moved where."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.there: set[int] = set()
        self.moves: list[tuple[str, str]] = []
        self.most: set[frozenset[str]] = set()
        self.names: dict[int, str] = {}
        monkeypatch.setattr(module, "_is_on", lambda model, device: (id(model) in self.there) == (device == GPU))
        monkeypatch.setattr(module, "_move", self.move)
        monkeypatch.setattr(module, "send_to_device", lambda values, device: values)

    def watch(self, pipe: Any) -> None:
        parts = pipe.components.items()
        self.names = {id(part): name for name, part in parts if isinstance(part, nn.Module)}

    def move(self, model: nn.Module, device: torch.device) -> None:
        (self.there.add if device == GPU else self.there.discard)(id(model))
        self.moves.append((self.names[id(model)], device.type))
        self.most.add(self.on_device())

    def on_device(self) -> frozenset[str]:
        return frozenset(self.names[each] for each in self.there)


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Places:
    return Places(monkeypatch)


def test_what_is_brought_takes_the_place_of_what_is_there(places) -> None:
    pipe = PIPELINES["sd3"].build()
    places.watch(pipe)
    placement = Placement(pipe, GPU, together={"transformer", "text_encoder"})
    placement.bring("text_encoder", "text_encoder_2")
    assert places.on_device() == {"text_encoder", "text_encoder_2"}
    placement.bring_together()
    assert places.on_device() == {"transformer", "text_encoder"}
    placement.bring("transformer")
    assert places.on_device() == {"transformer", "text_encoder"}  # which go together
    placement.bring("vae")
    assert places.on_device() == {"vae"}
    before = list(places.moves)
    placement.bring("vae")
    assert places.moves == before


def test_nothing_is_moved_where_everything_is_in_main_memory(places) -> None:
    pipe = PIPELINES["sd1"].build()
    for device in (CPU, torch.device("meta")):
        placement = Placement(pipe, device, together={"unet"})
        placement.bring("vae")
        placement.bring_together()
        with placement.drawing():
            pass
    assert places.moves == []


def test_what_is_fixed_stays(places) -> None:
    pipe = PIPELINES["sd1"].build()
    places.watch(pipe)
    placement = Placement(pipe, GPU, fixed={"unet"})
    places.there.add(id(pipe.unet))
    placement.bring("vae")
    assert places.on_device() == {"unet", "vae"}
    placement.bring("text_encoder")
    assert places.on_device() == {"unet", "text_encoder"}


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux-dev", "qwen-image", "sana"])
def test_one_component_at_a_time_draws_the_same_picture(places, name: str) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    places.watch(pipe)
    side = max(64, tiny.side)
    settings = GenerationSettings("a cat", steps=2, guidance_scale=2.0, width=side, height=side)
    expected = np.asarray(generate(pipe, settings))
    denoiser = family_of_pipeline(pipe).denoiser.name
    models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    before = [set(vars(model)) for model in models]
    with Placement(pipe, GPU).drawing():
        assert pipe._execution_device == GPU
        drawn = _on_cpu(pipe, settings)
    assert np.array_equal(drawn, expected)
    assert max(map(len, places.most)) == 1 and {frozenset({denoiser}), frozenset({"vae"})} <= places.most
    assert [set(vars(model)) for model in models] == before and "_hf_hook" not in set().union(*before)


def _on_cpu(pipe: Any, settings: GenerationSettings) -> np.ndarray:
    """Drawn with what computes on the CPU in truth."""
    for part in pipe.components.values():
        hook = getattr(part, "_hf_hook", None)
        if hook is not None:
            hook.execution_device = CPU
    return np.asarray(generate(pipe, settings))


def test_captions_pictures_steps_and_previews_of_a_run_each_have_their_own(places, tmp_path, monkeypatch) -> None:
    config = config_of(tmp_path, preview__prompts=["a cat"], preview__steps=1)
    pipe = PIPELINES["sd3"].build()
    places.watch(pipe)
    trainable = prepare_trainable(pipe, config, device=GPU)
    monkeypatch.setattr(torch.Tensor, "to", _stays(torch.Tensor.to))
    assert places.on_device() == set()
    ConditioningSource(trainable, config.data).keep(["a cat"])
    assert places.on_device() == {"text_encoder", "text_encoder_2", "text_encoder_3"}
    trainable.encode_pictures(torch.zeros(1, 3, 32, 32))
    assert places.on_device() == {"vae"}
    with trainable.drawing():
        assert places.on_device() == {"transformer"}
    monkeypatch.setattr(module, "_Comes", _Computing)
    draw_previews(trainable, config.preview)
    assert places.on_device() == {"vae"}
    trainable.bring_denoiser()
    assert places.on_device() == {"transformer"}


class _Computing(module._Comes):
    """Computes on the CPU in truth."""

    def __init__(self, placement: Placement, name: str) -> None:
        super().__init__(placement, name)
        self.execution_device = CPU


def _stays(to: Any) -> Any:
    def moved(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return tensor if GPU in args else to(tensor, *args, **kwargs)

    return moved


def test_swapped_blocks_stay_home_when_the_rest_moves() -> None:
    pipe = PIPELINES["flux-dev"].build()
    swap = BlockSwap(pipe.transformer, 2, CPU)
    block = pipe.transformer.transformer_blocks[0]
    homes = [module.home_of(tensor) for tensor in block.parameters()]
    assert all(home is not None for home in homes)
    module._move(pipe.transformer, torch.device("meta"))  # the rest
    assert not any(tensor.is_meta for tensor in block.parameters())
    assert pipe.transformer.x_embedder.weight.is_meta
    swap.remove()
    for tensor, home in zip(block.parameters(), homes, strict=True):
        assert torch.equal(tensor, home)
