"""What is trained and how: parameter groups, learning rates, and what a batch holds."""

import pytest
import torch

from dora_diffusion.pretrain.scenes import background
from dora_diffusion.training.batches import BatchSource
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.dataset import Example
from dora_diffusion.training.images import read_image
from dora_diffusion.training.subject import RateSchedule, adapter_metadata, build_optimizer, prepare_subject
from tests.pocket_random import random_pocket_pipeline
from tests.tolerances import assert_close


def make_config(folder, **sections) -> TrainConfig:
    base = {
        "output_dir": folder / "run",
        "data": {"instance_dir": folder, "instance_prompt": "a cat", "resolution": 32},
        "adapter": {"rank": 4, "alpha": 8, "train_text_encoder": True, "text_encoder_rank": 2},
        "optim": {
            "steps": 10,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "text_encoder_learning_rate": 2e-4,
            "loraplus_lr_ratio": 10.0,
            "magnitude_lr_multiplier": 3.0,
            "weight_decay": 0.1,
            "lr_scheduler": "linear",
        },
    }
    return TrainConfig.model_validate(base | sections)


@pytest.fixture
def examples(tmp_path) -> list[Example]:
    for name in ("red", "blue", "green"):
        background(name, 32).save(tmp_path / f"{name}.png")
    return [Example(tmp_path / f"{name}.png", f"a {name} cat") for name in ("red", "blue", "green")]


def test_groups_have_their_own_rates_and_magnitudes_no_decay(tmp_path) -> None:
    config = make_config(tmp_path)
    subject = prepare_subject(random_pocket_pipeline(), config)
    groups = build_optimizer(subject, config).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (1e-3, 0.1),
        (1e-2, 0.1),
        (pytest.approx(3e-3), 0.0),
        (2e-4, 0.1),
        (2e-3, 0.1),
        (pytest.approx(6e-4), 0.0),
    ]
    ups = {id(up) for injection in subject.injections.values() for up in injection.ups()}
    assert {id(p) for index in (1, 4) for p in groups[index]["params"]} == ups
    magnitudes = {id(m) for injection in subject.injections.values() for m in injection.magnitudes()}
    assert {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]} == magnitudes
    assert sum(len(group["params"]) for group in groups) == len(subject.parameters())
    ranks = {name: set(injection.matched.values()) for name, injection in subject.injections.items()}
    assert ranks == {"unet": {4}, "text_encoder": {2}}
    scales = {m.scale for injection in subject.injections.values() for m in injection.state().modules.values()}
    assert scales == {2.0}  # a smaller rank keeps the scale


def test_rates_are_a_function_of_the_step(tmp_path) -> None:
    config = make_config(tmp_path)
    optimizer = build_optimizer(prepare_subject(random_pocket_pipeline(), config), config)
    schedule = RateSchedule(optimizer, config)
    assert [schedule.set(step) for step in (0, 5, 0, 10)] == pytest.approx([1e-3, 5e-4, 1e-3, 0.0])
    schedule.set(5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-4, 5e-3, 1.5e-3, 1e-4, 1e-3, 3e-4])


def test_batches_pair_latents_with_their_captions_and_weigh_the_prior(tmp_path, examples) -> None:
    config = make_config(tmp_path, prior={"class_prompt": "a cat", "weight": 0.25})
    subject = prepare_subject(random_pocket_pipeline(), config)
    source = BatchSource(subject, config, (32, 32), instances=examples[:2], classes=examples[2:] * 2)
    pipe, family = subject.pipe, subject.family
    by_name = {example.path.name: example for example in examples}
    for index in range(4):
        batch = source.batch_at(index)
        assert batch.names[2:] == ("green.png", "green.png")
        assert batch.weights.tolist() == [2.0, 2.0, 0.5, 0.5]  # mean over 4 = mean(instances) + 0.25 mean(classes)
        captions = [by_name[name].caption for name in batch.names]
        assert_close(dict(batch.conditioning), dict(family.encode(pipe, captions)))
        for latent, name in zip(batch.latents, batch.names, strict=True):
            pixels = torch.tensor(list(read_image(by_name[name].path).get_flattened_data()), dtype=torch.float32)
            pixels = pixels.reshape(32, 32, 3).permute(2, 0, 1) / 127.5 - 1
            assert_close(latent, family.codec.encode(pipe, pixels[None])[0])


def test_metadata_tells_no_path_of_the_machine(tmp_path) -> None:
    config = make_config(tmp_path, model=str(tmp_path / "my-base"))
    metadata = adapter_metadata(config, prepare_subject(random_pocket_pipeline(), config).family, step=3)
    assert metadata["dora_diffusion.base_model"] == "my-base"
    assert str(tmp_path) not in "".join(metadata.values())
