"""Masks: which file is whose, what of a picture counts, and that nothing outside is learnt."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dora_diffusion.functional.objectives import weighted_squared_error
from dora_diffusion.training.base.trainable import prepare_trainable
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.batches import BatchSource, Shown
from dora_diffusion.training.data.examples import find_examples
from dora_diffusion.training.data.masks import find_masks
from dora_diffusion.training.data.views import View, load_sample
from dora_diffusion.training.run.train import train
from tests.pocket_random import random_pocket_pipeline
from tests.tolerances import assert_close


def picture(path: Path, size: tuple[int, int] = (32, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def left_half(path: Path, size: tuple[int, int] = (32, 32)) -> Path:
    """A mask whose left half counts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.zeros((size[1], size[0]), np.uint8)
    values[:, : size[0] // 2] = 255
    Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize(
    "name", ["3_mask.png", "3-masklabel.png", "3_MASK.PNG", "3_mask.webp", "masks/3.png", "masks/3.jpg.png"]
)
def test_a_mask_is_found_by_each_trainers_name_and_is_no_picture(tmp_path: Path, name: str) -> None:
    """`_mask` pictures train (TRAINER.md)."""
    photo = picture(tmp_path / "3.jpg")
    mask = left_half(tmp_path / name)
    picture(tmp_path / "4.png")
    found = find_examples(tmp_path, instance_prompt="a")
    assert [(one.path.name, one.mask) for one in found] == [("3.jpg", mask), ("4.png", None)]
    assert find_masks([photo, mask] if mask.parent == tmp_path else [photo]).orphans == ()


@pytest.mark.parametrize("name", ["5_mask.png", "5-masklabel.png", "masks/5.png"])
def test_a_mask_of_no_picture_is_an_error(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "3.jpg")
    left_half(tmp_path / name)
    with pytest.raises(ValueError, match="5.*png: by its name a mask, but there is no picture that it is of"):
        find_examples(tmp_path, instance_prompt="a")


def test_masks_are_cropped_and_mirrored_as_their_pictures(tmp_path: Path) -> None:
    picture(tmp_path / "3.png", (64, 32))
    left_half(tmp_path / "3_mask.png", (128, 64))  # of the same shape, larger
    (example,) = find_examples(tmp_path, instance_prompt="a")
    example = replace(example, size=(32, 32))
    columns = torch.arange(32)
    for view, expected in (
        (View(), columns < 16),
        (View(flip=True), columns >= 16),
        (View(offset=(0.0, 0.0)), columns < 32),
        (View(offset=(1.0, 0.0)), columns < 0),
        (View(flip=True, offset=(0.25, 0.0)), columns >= 8),
    ):
        sample = load_sample(example, view, with_mask=True)
        assert sample.mask is not None and sample.mask.shape == (1, 32, 32)
        assert torch.equal(sample.mask[0] > 0.5, expected.expand(32, -1)), view
        assert torch.equal(load_sample(example, view).pixels, sample.pixels)


def test_an_alpha_channel_is_a_mask_where_there_is_no_file(tmp_path: Path) -> None:
    values = np.zeros((32, 32, 4), np.uint8)
    values[:, :8] = (255, 0, 0, 255)
    Image.fromarray(values, "RGBA").save(tmp_path / "1.png")
    picture(tmp_path / "2.png")
    clear, solid = (replace(one, size=(32, 32)) for one in find_examples(tmp_path, instance_prompt="a"))
    mask = load_sample(clear, View(), with_mask=True).mask
    assert mask is not None and torch.equal(mask[0], (torch.arange(32) < 8).float().expand(32, -1))
    assert load_sample(solid, View(), with_mask=True).mask is None
    left_half(tmp_path / "1_mask.png")
    (both, _) = find_examples(tmp_path, instance_prompt="a")
    mask = load_sample(replace(both, size=(32, 32)), View(), with_mask=True).mask
    assert mask is not None and torch.equal(mask[0], (torch.arange(32) < 16).float().expand(32, -1))


def test_a_mask_that_cannot_be_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    Image.new("L", (32, 16), 255).save(tmp_path / "1_mask.png")
    (example,) = find_examples(tmp_path, instance_prompt="a")
    with pytest.raises(
        ValueError, match="1_mask.png: a mask of 32x16 pixels, expected the shape of its picture, 32x32"
    ):
        load_sample(replace(example, size=(32, 32)), View(), with_mask=True)
    Image.new("L", (32, 32), 0).save(tmp_path / "1_mask.png")
    with pytest.raises(ValueError, match="1_mask.png: the mask is black all over"):
        load_sample(replace(example, size=(32, 32)), View(), with_mask=True)


def test_loss_is_normalised_by_area_and_has_no_gradient_outside() -> None:
    generator = torch.Generator().manual_seed(0)
    goal, weights = torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([1.0, 0.5, 2.0])
    predicted = torch.randn(3, 4, 8, 8, generator=generator, requires_grad=True)
    masks = torch.zeros(3, 1, 8, 8)
    masks[0, :, :, :2], masks[1] = 1, 1
    loss = weighted_squared_error(predicted, goal, weights, masks)
    (gradient,) = torch.autograd.grad(loss, predicted)
    assert torch.count_nonzero(gradient * (1 - masks)) == 0
    assert torch.count_nonzero(gradient * masks) == 4 * 8 * 2 + 4 * 64
    squared = (predicted - goal).square()
    expected = (squared[0, :, :, :2].mean() + 0.5 * squared[1].mean()) / 3  # the third has no area, and no loss
    assert_close(loss, expected)
    whole = weighted_squared_error(predicted, goal, weights, torch.ones(3, 1, 8, 8))
    assert_close(whole, weighted_squared_error(predicted, goal, weights))


def config_of(folder: Path, run: Path, outside: float | None, **optim: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": "pocket",
            "output_dir": run,
            "data": {"instance_dir": folder, "instance_prompt": "a cat", "resolution": 32, "mask_outside": outside},
            "adapter": {"rank": 2},
            "optim": {"steps": 2, **optim},
            "validation": {"every": 0, "repeats": 1},
            "checkpoint": {"every": 0},
        }
    )


@pytest.mark.parametrize("outside", [None, 0.0, 0.25, 1.0])
def test_batches_say_what_of_each_picture_counts(tmp_path: Path, outside: float | None) -> None:
    picture(tmp_path / "set" / "1.png")
    left_half(tmp_path / "set" / "1_mask.png")
    picture(tmp_path / "set" / "2.png")
    config = config_of(tmp_path / "set", tmp_path / "run", outside)
    examples = [replace(one, size=(32, 32)) for one in find_examples(tmp_path / "set", instance_prompt="a")]
    source = BatchSource(prepare_trainable(random_pocket_pipeline(), config), config, instances=examples, classes=[])
    masks = source.batch_of([Shown(one, "a", View()) for one in examples]).masks
    if outside is None:
        assert masks is None
        return
    assert masks is not None
    assert masks[0, 0].tolist() == [[1, 1, outside, outside]] * 4  # 8 pixels a latent
    assert masks[1].tolist() == [[[1] * 4] * 4]
    assert source.batch_of([Shown(examples[1], "a", View())]).masks is None


def test_what_lies_outside_a_mask_is_not_learnt(tmp_path: Path) -> None:
    """Two sets that differ outside their masks alone, beyond what the VAE sees of it inside, train the same loss."""
    picture(tmp_path / "set" / "1.png")
    left_half(tmp_path / "set" / "1_mask.png")
    masked = train(config_of(tmp_path / "set", tmp_path / "masked", 0.0))
    ignored = train(config_of(tmp_path / "set", tmp_path / "ignored", None))
    everywhere = train(config_of(tmp_path / "set", tmp_path / "everywhere", 1.0))
    assert everywhere.validation[0][1] == pytest.approx(ignored.validation[0][1], rel=1e-5)
    assert masked.validation[0][1] != pytest.approx(ignored.validation[0][1], rel=1e-3)
