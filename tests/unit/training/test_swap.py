"""Swapped blocks: the same numbers to the bit, with most of the weights away most of the time."""

from typing import Any

import pytest
import torch
from torch import nn

from dora_diffusion.families import family_of_pipeline
from dora_diffusion.functional.objectives import weighted_squared_error
from dora_diffusion.layers.base_layers import dense_weight
from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.dora import DoRALayer
from dora_diffusion.layers.injection import Injection, inject
from dora_diffusion.layers.offloaded import is_away
from dora_diffusion.training.base.blocks import compile_blocks, release_blocks, repeated_blocks
from dora_diffusion.training.base.swap import BlockSwap, swapped_bytes
from tests.families.pipelines import PIPELINES
from tests.families.test_families import some_latents
from tests.tolerances import assert_identical

CPU = torch.device("cpu")


class Case:
    """A tiny denoiser with an adapter, and steps of its training."""

    def __init__(self, name: str, *, norm_grad: str = "detached", init: str = "default", dropout: float = 0.0) -> None:
        tiny = PIPELINES[name]
        self.pipe = tiny.build()
        self.family = family_of_pipeline(self.pipe)
        self.model: Any = getattr(self.pipe, self.family.denoiser.name)
        self.injection: Injection = inject(
            self.model, DoRAConfig(rank=2, norm_grad=norm_grad, init=init, dropout=dropout)
        )
        self.model.train()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for up in self.injection.ups():
                up.add_(torch.randn(up.shape, generator=generator) * 0.1)
        self.latents, self.timesteps, self.frames = some_latents(self.pipe, tiny, 1)
        with torch.no_grad():
            self.conditioning = self.family.encode(self.pipe, ["a cat"])
        self.optimizer = torch.optim.AdamW(self.injection.parameters(), lr=1e-2)

    def predict(self) -> torch.Tensor:
        return self.family.predict(self.model, self.latents, self.timesteps, self.conditioning, self.frames)

    def steps(self, count: int) -> list[torch.Tensor]:
        """The gradients of each step, and its prediction."""
        found = []
        for step in range(count):
            torch.manual_seed(step)
            self.injection.refresh_norms()
            predicted = self.predict()
            weighted_squared_error(predicted, self.latents, torch.ones(1)).backward()
            found += [predicted.detach(), *(p.grad.clone() for p in self.injection.parameters() if p.grad is not None)]
            self.optimizer.step()
            self.optimizer.zero_grad()
        return found


def is_empty(block: nn.Module) -> bool:
    return any(map(is_away, block.parameters()))


def away(model: nn.Module) -> int:
    return sum(map(is_empty, repeated_blocks(model).values()))


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux-dev", "hunyuan-dit-1.2"])  # all: tests/families
def test_steps_are_those_without_swapping_to_the_bit(name: str, checkpoints: bool) -> None:
    plain, case = Case(name), Case(name)
    blocks = len(repeated_blocks(case.model))
    if checkpoints and not case.model._supports_gradient_checkpointing:
        pytest.skip("no gradient checkpointing in diffusers")
    swap = BlockSwap(case.model, blocks, CPU)
    assert away(case.model) == blocks
    if checkpoints:
        for one in (plain, case):
            one.model.enable_gradient_checkpointing()
    assert_identical(case.steps(2), plain.steps(2))
    assert away(case.model) >= blocks - 1
    with torch.no_grad():
        assert_identical(case.predict(), plain.predict())
    swap.remove()
    assert away(case.model) == 0
    case.injection.eject()
    plain.injection.eject()
    assert_identical(case.model.state_dict(), plain.model.state_dict())
    assert_identical(case.predict(), plain.predict())


@pytest.mark.parametrize(
    "settings", [{"norm_grad": "exact"}, {"init": "pissa"}, {"dropout": 0.3}], ids=lambda one: next(iter(one))
)
@pytest.mark.parametrize("count", [1, 2])
def test_every_kind_of_adapter_trains_beside_swapped_blocks(count: int, settings: dict[str, Any]) -> None:
    plain, case = Case("flux-dev", **settings), Case("flux-dev", **settings)
    BlockSwap(case.model, count, CPU)
    assert_identical(case.steps(3), plain.steps(3))


def test_row_changes_and_norms_are_taken_while_blocks_are_away() -> None:
    plain, case = Case("flux-dev"), Case("flux-dev")
    BlockSwap(case.model, 2, CPU)
    assert away(case.model) == 2
    expected = plain.injection.row_changes()
    for path, changes in case.injection.row_changes().items():
        assert_identical(vars(changes), vars(expected.pop(path)))
    assert not expected
    assert away(case.model) == 2


def test_the_weight_of_a_layer_that_is_away_is_read_at_home() -> None:
    case = Case("flux-dev")
    layers = [layer for layer in case.model.modules() if isinstance(layer, DoRALayer)]
    before = [dense_weight(layer.base).clone() for layer in layers]
    BlockSwap(case.model, 2, CPU)
    assert sum(is_away(layer.base.weight) for layer in layers) >= len(layers) / 2
    assert_identical([dense_weight(layer.base) for layer in layers], before)


def test_a_weight_that_a_library_packs_anew_goes_home_as_it_is_then() -> None:
    case = Case("flux-dev")
    BlockSwap(case.model, 2, CPU)
    with torch.no_grad():
        expected = case.predict()
        block = next(block for block in repeated_blocks(case.model).values() if not is_empty(block))
        weight = next(layer.weight for layer in block.modules() if type(layer) is nn.Linear)
        weight.data = 2 * weight.data.T.contiguous().T  # strides and numbers
        twice = case.predict()
        assert not torch.equal(twice, expected)
        assert_identical(case.predict(), twice)


def test_adapted_parameters_and_shared_tensors_stay() -> None:
    case = Case("flux-dev", init="pissa")
    blocks = list(repeated_blocks(case.model).values())
    blocks[1].shared = blocks[0].ff.net[2]
    BlockSwap(case.model, len(blocks), CPU)
    assert not any(is_away(tensor) for tensor in case.injection.named_tensors().values())
    assert not is_away(blocks[0].ff.net[2].weight)


def test_more_blocks_than_there_are_is_refused() -> None:
    case = Case("flux-dev")
    count = len(repeated_blocks(case.model))
    with pytest.raises(ValueError, match=rf"base.swap_blocks: got {count + 1}, .* expected at most {count}"):
        BlockSwap(case.model, count + 1, CPU)


def test_bytes_that_are_spared_are_those_that_are_away() -> None:
    case = Case("flux-dev")
    blocks = len(repeated_blocks(case.model))
    frozen = {
        path: sum(p.nbytes for name, p in block.named_parameters() if "adapter" not in name)
        for path, block in repeated_blocks(case.model).items()
    }
    assert swapped_bytes(case.model, blocks) == sum(sorted(frozen.values())[:-2]) > 0
    assert swapped_bytes(case.model, 0) == 0


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
@pytest.mark.parametrize("checkpoints", [False, True])
def test_compiled_blocks_are_swapped_too_without_a_break_of_their_graphs(checkpoints: bool) -> None:
    torch._dynamo.reset()
    plain, case = Case("flux-dev"), Case("flux-dev")
    for one in (plain, case):
        if checkpoints:
            one.model.enable_gradient_checkpointing()
    compile_blocks(case.model, backend="eager", fullgraph=True)
    BlockSwap(case.model, 2, CPU)
    assert_identical(case.steps(3), plain.steps(3))
    release_blocks(case.model)
    assert not any("forward" in vars(block) for block in repeated_blocks(case.model).values())
