"""What is trained and how: parameter groups, learning rates, and what a batch holds."""

import pytest
import torch
from diffusers import EDMEulerScheduler

from dora_diffusion.families import family_of_pipeline
from dora_diffusion.pretrain.scenes import background
from dora_diffusion.training.base.trainable import prepare_trainable
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.batches import BatchSource
from dora_diffusion.training.data.examples import Example
from dora_diffusion.training.run.metadata import adapter_metadata
from dora_diffusion.training.step.objective import objective_of
from dora_diffusion.training.step.optimisers import build_optimizer
from dora_diffusion.training.step.rates import RateSchedule
from dora_diffusion.utils.images import read_image
from tests.families.pipelines import PIPELINES
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
    return [Example(tmp_path / f"{name}.png", f"a {name} cat", size=(32, 32)) for name in ("red", "blue", "green")]


def test_groups_have_their_own_rates_and_magnitudes_no_decay(tmp_path) -> None:
    config = make_config(tmp_path)
    trainable = prepare_trainable(random_pocket_pipeline(), config)
    groups = build_optimizer(trainable, config.optim, config.words).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (1e-3, 0.1),
        (1e-2, 0.1),
        (pytest.approx(3e-3), 0.0),
        (2e-4, 0.1),
        (2e-3, 0.1),
        (pytest.approx(6e-4), 0.0),
    ]
    ups = {id(up) for injection in trainable.injections.values() for up in injection.ups()}
    assert {id(p) for index in (1, 4) for p in groups[index]["params"]} == ups
    magnitudes = {id(m) for injection in trainable.injections.values() for m in injection.magnitudes()}
    assert {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]} == magnitudes
    assert sum(len(group["params"]) for group in groups) == len(trainable.parameters())
    ranks = {name: set(injection.matched.values()) for name, injection in trainable.injections.items()}
    assert ranks == {"unet": {4}, "text_encoder": {2}}
    scales = {m.scale for injection in trainable.injections.values() for m in injection.state().modules.values()}
    assert scales == {2.0}  # a smaller rank keeps the scale


def test_rates_are_a_function_of_the_step(tmp_path) -> None:
    config = make_config(tmp_path)
    optimizer = build_optimizer(prepare_trainable(random_pocket_pipeline(), config), config.optim, config.words)
    schedule = RateSchedule(optimizer, config.optim)
    assert [schedule.set(step) for step in (0, 5, 0, 10)] == pytest.approx([1e-3, 5e-4, 1e-3, 0.0])
    schedule.set(5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-4, 5e-3, 1.5e-3, 1e-4, 1e-3, 3e-4])


def test_batches_pair_latents_with_their_captions_and_weigh_the_prior(tmp_path, examples) -> None:
    config = make_config(tmp_path, prior={"class_prompt": "a cat", "weight": 0.25})
    trainable = prepare_trainable(random_pocket_pipeline(), config)
    source = BatchSource(trainable, config, instances=examples[:2], classes=examples[2:] * 2)
    pipe, family = trainable.pipe, trainable.family
    by_name = {example.path.name: example for example in examples}
    for index in range(4):
        (batch,) = source.batches_at(index)
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
    metadata = adapter_metadata(config, prepare_trainable(random_pocket_pipeline(), config).family, step=3)
    assert metadata["dora_diffusion.base_model"] == "my-base"
    assert str(tmp_path) not in "".join(metadata.values())


def xl_config(folder, *, train: object, rank: object = None, rate: object = None) -> TrainConfig:
    adapter = {"rank": 8, "train_text_encoder": train, "text_encoder_rank": rank}
    return make_config(folder, adapter=adapter, optim={"text_encoder_learning_rate": rate})


def test_each_text_encoder_has_its_own_rank_and_rate(tmp_path) -> None:
    config = xl_config(tmp_path, train=True, rank={"text_encoder_2": 2}, rate={"text_encoder": 3e-5})
    trainable = prepare_trainable(PIPELINES["sdxl"].build(), config)
    ranks = {name: set(injection.matched.values()) for name, injection in trainable.injections.items()}
    assert ranks == {"unet": {8}, "text_encoder": {8}, "text_encoder_2": {2}}
    rates = [group["lr"] for group in build_optimizer(trainable, config.optim, config.words).param_groups[::3]]
    assert rates == [1e-4, 3e-5, 1e-4]
    second = prepare_trainable(PIPELINES["sdxl"].build(), xl_config(tmp_path, train=["text_encoder_2"]))
    assert set(second.injections) == {"unet", "text_encoder_2"}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"train": ["text_encoder_3"]}, "adapter.train_text_encoder: got 'text_encoder_3', expected one of "),
        ({"train": True, "rank": {"unet": 4}}, "adapter.text_encoder_rank: got 'unet', expected one of text_encoder"),
        (
            {"train": ["text_encoder"], "rate": {"text_encoder_2": 1e-5}},
            "optim.text_encoder_learning_rate: got 'text_encoder_2', expected one of text_encoder",
        ),
    ],
)
def test_a_text_encoder_that_is_not_there_or_not_trained_is_named(tmp_path, settings, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        prepare_trainable(PIPELINES["sdxl"].build(), xl_config(tmp_path, **settings))


def test_micro_conditioning_says_where_each_picture_comes_from(tmp_path) -> None:
    config = xl_config(tmp_path, train=False)
    trainable = prepare_trainable(PIPELINES["sdxl"].build(), config)
    background("red", 64).resize((96, 48)).save(tmp_path / "wide.png")
    examples = [Example(tmp_path / "wide.png", "a cat", size=(32, 32))]
    source = BatchSource(trainable, config, instances=examples, classes=[])
    (batch,) = source.batches_at(0)
    assert batch.frames.tolist() == [[48, 96, 0, 16, 32, 32]]
    seen = {}
    unet = trainable.denoiser
    unet.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs["added_cond_kwargs"]), with_kwargs=True)
    with torch.no_grad():
        trainable.family.predict(unet, batch.latents, torch.tensor([10]), batch.conditioning, batch.frames)
    assert seen["time_ids"].tolist() == batch.frames.tolist()


def test_untrained_text_encoders_rest_and_captions_are_encoded_once(tmp_path, examples, monkeypatch) -> None:
    config = make_config(tmp_path, adapter={"rank": 2}, optim={"steps": 4, "batch_size": 2})
    trainable = prepare_trainable(random_pocket_pipeline(), config)
    moves: list[tuple[str, ...]] = []
    calls: list[int] = []
    encoder = trainable.pipe.text_encoder
    encoder.register_forward_pre_hook(lambda *_: calls.append(len(moves)))
    monkeypatch.setattr(trainable.placement, "bring", lambda *names: moves.append(names))
    source = BatchSource(trainable, config, instances=examples, classes=[])
    assert moves == [("text_encoder",)] and set(calls) == {1}
    count = len(calls)
    for index in range(4):
        source.batches_at(index)
    assert len(calls) == count and moves.count(("text_encoder",)) == 1


def test_words_past_their_share_have_no_say_in_clipping(tmp_path) -> None:
    config = make_config(tmp_path, words={"starts": {"zqx": "cat"}, "share": 0.01}, optim={"steps": 10})
    trainable = prepare_trainable(random_pocket_pipeline(), config)
    optimizer = build_optimizer(trainable, config.optim, config.words)
    rates = RateSchedule(optimizer, config.optim)
    (vectors,) = trainable.words.parameters()
    for step, expected in ((0, True), (1, False)):  # a share of less than a step is one step
        vectors.grad = torch.ones_like(vectors)
        rates.set(step)
        rates.drop_ended_gradients(step)
        assert (vectors.grad is not None) is expected
        assert (optimizer.param_groups[-1]["lr"] > 0) is expected


def test_a_scheduler_of_another_noise_is_refused_in_a_line(tmp_path) -> None:
    pipe = PIPELINES["sdxl"].build()
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(
        ValueError, match="the base's EDMEulerScheduler predicts 'epsilon'; epsilon and v_prediction of a"
    ):
        objective_of(pipe, make_config(tmp_path).optim, make_config(tmp_path).flow, tokens=1)


def test_an_autoencoder_that_overflows_in_fp16_works_in_fp32() -> None:
    pipe = PIPELINES["sdxl"].build()
    pipe.vae.register_to_config(force_upcast=True)
    pipe.vae.to(torch.float16)
    seen: list[torch.dtype] = []
    pipe.vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    family = family_of_pipeline(pipe)
    latents = family.codec.encode(pipe, torch.zeros(1, 3, 32, 32))
    pixels = family.codec.decode(pipe, latents)
    assert seen == [torch.float32] and latents.dtype == pixels.dtype == torch.float32
    assert pipe.vae.dtype == torch.float16
