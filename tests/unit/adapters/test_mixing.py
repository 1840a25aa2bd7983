"""A mix that is set and taken off: the same in any order, and strengths by whatever names a picture has them."""

import itertools

import pytest
import torch

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.adapters.mixing import Ingredient, by_own_names, clear_mix, set_mix, without_empty_blocks
from tests.pocket_random import random_adapter, random_pocket_pipeline
from tests.tolerances import assert_identical

PATHS = ("unet.mid_block.attentions.0.to_q", "text_encoder.layers.0.q_proj")
WEIGHTS = {"unet": 1.0, "unet.mid_block": 0.5, "unet.up_blocks": 0.25, "text_encoder_2": 0.0}


@pytest.mark.parametrize("blend", ["additive", "compose", "direction-magnitude", "lycoris"])
def test_the_order_of_a_mix_does_not_show_and_it_leaves_nothing(blend: str) -> None:
    pipe = random_pocket_pipeline()
    generator = torch.Generator().manual_seed(5)
    noisy, text = torch.randn(1, 8, 16, 16, generator=generator), torch.randn(1, 32, 256, generator=generator)

    @torch.no_grad()
    def predicted() -> torch.Tensor:
        return pipe.unet(noisy, 500, text).sample

    adapters = {name: random_adapter(pipe, seed) for seed, name in enumerate("abc")}
    bare, manager = predicted(), AdapterManager(pipe)
    for name, adapter in adapters.items():
        manager.load_adapter(adapter, name=name)
    parts = [Ingredient(name, strength) for name, strength in zip("abc", (0.8, -0.3, 0.45), strict=True)]
    answers = []
    for order in itertools.permutations(parts):
        set_mix(manager, order, blend=blend)
        answers.append(predicted())
        clear_mix(manager, "abc")
    for answer in answers[1:]:
        assert_identical(answer, answers[0])
    assert_identical(predicted(), bare)
    assert not torch.equal(answers[0], bare)


def test_a_mode_that_has_an_order_keeps_it() -> None:
    pipe = random_pocket_pipeline()
    adapters = {name: random_adapter(pipe, seed) for seed, name in enumerate("ab")}
    manager = AdapterManager(pipe)
    for name, adapter in adapters.items():
        manager.load_adapter(adapter, name=name)
    weights = []
    for order in ("ab", "ba"):
        set_mix(manager, [Ingredient(name, 1.0) for name in order], blend="a1111")
        weights.append(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.clone())
        clear_mix(manager, order)
    assert not torch.equal(*weights)


def test_blocks_without_layers_are_left_out_and_components_stay() -> None:
    assert without_empty_blocks(WEIGHTS, PATHS) == {"unet": 1.0, "unet.mid_block": 0.5, "text_encoder_2": 0.0}
    assert without_empty_blocks(WEIGHTS, PATHS, {"unet.down_blocks"}) == WEIGHTS
    assert without_empty_blocks(0.5, PATHS) == 0.5


@pytest.mark.parametrize(
    ("weight", "own"),
    [
        (0.5, 0.5),
        ({"denoiser": 1.0, "text_encoders": 0.2}, {"unet": 1.0, "text_encoder": 0.2}),
        ({"unet.mid_block": 1.0}, {"unet.mid_block": 1.0}),
    ],
)
def test_parts_by_the_base_s_own_names(weight: object, own: object) -> None:
    assert by_own_names(weight, random_pocket_pipeline()) == own
