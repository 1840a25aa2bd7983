"""Strength over the run and over the picture."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.functional.masks import mask_of
from dora_diffusion.functional.schedules import Schedule, progress_of, schedule_of
from tests.pocket_random import random_adapter, random_pocket_pipeline
from tests.tolerances import assert_close, assert_identical

FADE_IN = [(0.0, 0.0), (0.3, 1.0)]
ALWAYS = 2  # hooks that stand while any adapter is loaded: for the scale of a call


@pytest.fixture(scope="module")
def pipe():
    return random_pocket_pipeline()


@pytest.fixture
def manager(pipe):
    adapters = {"ink": random_adapter(pipe, 0), "lego": random_adapter(pipe, 1)}
    manager = AdapterManager(pipe)
    for name, adapter in adapters.items():
        manager.load_adapter(adapter, name=name)
    pipe.scheduler.set_timesteps(11)
    yield manager
    manager.unload()


def predict(pipe, step: int = 0, *, count: int = 1, as_tuple: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    noisy = torch.randn(count, 8, 16, 16, generator=generator)
    text = torch.randn(count, 32, 256, generator=generator)
    timestep = pipe.scheduler.timesteps[step]
    with torch.no_grad():
        answer = pipe.unet(noisy, timestep, encoder_hidden_states=text, return_dict=not as_tuple)
    return answer[0] if as_tuple else answer.sample


def hooks(pipe) -> int:
    return len(pipe.unet._forward_hooks) + len(pipe.unet._forward_pre_hooks)


def test_a_schedule_gives_each_step_its_strength(pipe, manager) -> None:
    manager.set_adapters({"ink": 0.8, "lego": 0.5})
    manager.set_schedule("ink", FADE_IN)
    got = [predict(pipe, step) for step in range(11)]
    manager.set_schedule("ink", None)
    assert hooks(pipe) == ALWAYS
    for step, answer in enumerate(got):
        manager.set_adapters({"ink": 0.8 * min(1.0, step / 10 / 0.3), "lego": 0.5})
        assert_close(answer, predict(pipe, step))
    assert not torch.equal(got[0], predict(pipe, 0))


def test_a_schedule_of_ones_is_none_bit_for_bit_and_strengths_are_plain_between_drawings(pipe, manager) -> None:
    manager.set_adapters({"ink": 0.8})
    plain = predict(pipe, 4)
    manager.set_schedule("ink", [(0.5, 1.0)])
    assert_identical(predict(pipe, 4), plain)
    manager.set_schedule("ink", FADE_IN)
    predict(pipe, 0)
    manager.set_schedule("ink", None)
    assert_identical(predict(pipe, 4), plain)


def test_progress_goes_by_the_timestep_and_not_by_counting() -> None:
    plain = torch.tensor([900.0, 600.0, 300.0, 0.0])
    assert [progress_of(t, plain) for t in plain] == [0, 1 / 3, 2 / 3, 1]
    twice = torch.tensor([900.0, 600.0, 600.0, 300.0, 300.0])  # as Heun's
    assert [progress_of(t, twice) for t in twice] == [0, 0.25, 0.25, 0.75, 0.75]
    assert progress_of(torch.tensor([600.0, 600.0]), plain) == 1 / 3  # one for each half of guidance
    assert progress_of(5, torch.tensor([5])) == 0


@given(st.floats(0, 1))
def test_a_schedule_runs_straight_from_point_to_point(progress: float) -> None:
    schedule = Schedule(((0.2, 1.0), (0.6, -1.0)))
    assert schedule.at(progress) == pytest.approx(max(-1.0, min(1.0, 1 - (progress - 0.2) / 0.2)))


@pytest.mark.parametrize(
    "points, message",
    [
        ([], "at least one"),
        ([(0.5, 1.0), (0.2, 0.0)], "progress falls from 0.5 to 0.2"),
        ([(-0.1, 1.0)], "progress in 0..1"),
        ([(0.0, float("nan"))], "finite factor"),
        ([(float("nan"), 1.0)], "progress in 0..1"),
        ([0.5, 1.0], "expected pairs of numbers"),
        ("fade", "expected pairs of numbers"),
        ([("a", 1)], "expected pairs of numbers"),
    ],
)
def test_bad_points_are_refused_in_one_line(points, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        schedule_of(points)
    assert "\n" not in str(caught.value)


def half(left: float, right: float) -> Tensor:
    return torch.cat([torch.full((16, 8), left), torch.full((16, 8), right)], dim=1)


@pytest.mark.parametrize("as_tuple", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_a_mask_draws_with_the_adapter_inside_and_without_it_outside(pipe, manager, count, as_tuple) -> None:
    seen = {}
    for weights in ({"ink": 1.0, "lego": 0.5}, {"lego": 0.5}):
        manager.set_adapters(weights)
        seen["ink" in weights] = predict(pipe, count=count)
    manager.set_adapters({"ink": 1.0, "lego": 0.5})
    manager.set_mask("ink", half(1, 0))
    got = predict(pipe, count=count, as_tuple=as_tuple)
    assert_close(got[..., :8], seen[True][..., :8])
    assert_identical(got[..., 8:].contiguous(), seen[False][..., 8:].contiguous())
    assert not torch.allclose(seen[True], seen[False], atol=1e-3)
    manager.set_mask("ink", torch.ones(4, 4))
    assert_close(predict(pipe, count=count), seen[True])
    manager.set_mask("ink", torch.zeros(4, 4))
    assert_identical(predict(pipe, count=count), seen[False])
    manager.set_mask("ink", None)
    assert hooks(pipe) == ALWAYS
    assert_identical(predict(pipe, count=count), seen[True])


def test_two_masked_adapters_keep_to_their_places(pipe, manager) -> None:
    alone = {}
    for name in ("ink", "lego"):
        manager.set_adapters({name: 1.0})
        alone[name] = predict(pipe)
    manager.set_adapters({"ink": 1.0, "lego": 1.0})
    manager.set_mask("ink", half(1, 0))
    manager.set_mask("lego", half(0, 1))
    got = predict(pipe)
    assert_close(got[..., :8], alone["ink"][..., :8])
    assert_close(got[..., 8:], alone["lego"][..., 8:])


def test_a_mask_and_a_schedule_together(pipe, manager) -> None:
    manager.set_adapters({"ink": 1.0})
    manager.set_schedule("ink", FADE_IN)
    manager.set_mask("ink", half(1, 0))
    got = predict(pipe, 1)
    manager.set_schedule("ink", None)
    manager.set_mask("ink", None)
    manager.set_adapters({"ink": 1 / 3})
    assert_close(got[..., :8], predict(pipe, 1)[..., :8])
    manager.set_adapters({})
    assert_close(got[..., 8:], predict(pipe, 1)[..., 8:])


def test_masks_come_as_pictures_too() -> None:
    picture = Image.new("RGB", (4, 2))
    picture.putpixel((3, 1), (255, 255, 255))
    expected = torch.zeros(1, 1, 2, 4)
    expected[0, 0, 1, 3] = 1
    assert_identical(mask_of(picture), expected)
    assert_identical(mask_of(expected[0]), expected)


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.ones(3), "expected .height, width."),
        (torch.ones(2, 4, 4), "expected .height, width."),
        (torch.full((4, 4), 1.5), "from 0"),
        (torch.full((4, 4), float("nan")), "from 0"),
        ("left", "expected a PIL image or a tensor, got str"),
    ],
)
def test_bad_masks_are_refused_in_one_line(mask, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        mask_of(mask)
    assert "\n" not in str(caught.value)


def test_unknown_adapters_and_fusing_meanwhile_are_refused(pipe, manager) -> None:
    for call in (lambda: manager.set_schedule("gone", FADE_IN), lambda: manager.set_mask("gone", half(1, 0))):
        with pytest.raises(ValueError, match="no adapter named 'gone' is loaded; loaded: ink, lego"):
            call()
    manager.set_adapters({"ink": 1.0})
    manager.set_schedule("ink", FADE_IN)
    with pytest.raises(ValueError, match="cannot fuse while a schedule or mask is set"):
        manager.fuse()
    manager.set_schedule("ink", None)
    manager.fuse()
    with pytest.raises(ValueError, match="cannot set a mask while fused"):
        manager.set_mask("ink", half(1, 0))
    manager.unfuse()


def test_hooks_go_with_the_adapter_that_needed_them(pipe, manager) -> None:
    manager.set_adapters({"ink": 1.0, "lego": 1.0})
    manager.set_schedule("ink", FADE_IN)
    manager.set_mask("lego", half(1, 0))
    assert hooks(pipe) == ALWAYS + 2
    manager.delete_adapter("ink")
    assert hooks(pipe) == ALWAYS + 2
    manager.delete_adapter("lego")
    assert hooks(pipe) == 0


def test_a_plain_call_of_the_pipeline_draws_with_both(pipe, manager) -> None:
    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        picture = pipe("a cat", num_inference_steps=4, generator=generator, output_type="latent").images
        return picture

    manager.set_adapters({"ink": {"unet": 1.0}})
    plain = draw()
    manager.set_schedule("ink", [(0.0, 0.0)])
    off = draw()
    manager.set_adapters({})
    assert_close(off, draw())
    manager.set_adapters({"ink": {"unet": 1.0}})
    manager.set_schedule("ink", FADE_IN)
    manager.set_mask("ink", half(1, 0))
    both = draw()
    assert bool(torch.isfinite(both).all())
    assert not torch.allclose(both, plain, atol=1e-3)
    assert not torch.allclose(both, off, atol=1e-3)
