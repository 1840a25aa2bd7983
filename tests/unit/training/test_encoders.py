"""Text encoders that nothing is trained in, beside one that is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dora_diffusion.generation.generate import GenerationSettings, generate
from dora_diffusion.pretrain.scenes import background
from dora_diffusion.training.base.encoders import FrozenEncoders
from dora_diffusion.training.base.placement import Placement
from dora_diffusion.training.base.trainable import TrainablePipeline, prepare_trainable
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.batches import BatchSource
from dora_diffusion.training.data.cache import TensorCache
from dora_diffusion.training.data.examples import Example, find_examples
from dora_diffusion.training.run.callbacks import TrainingCallback
from dora_diffusion.training.run.train import train
from tests.families.pipelines import PIPELINES
from tests.tolerances import assert_close

FAMILIES = {"sdxl": ["text_encoder_2"], "sd3": ["text_encoder_2", "text_encoder_3"], "flux-dev": ["text_encoder_2"]}
CAPTIONS = ["a red cat", "a blue cat on the beach"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, caption in zip(("red", "blue"), CAPTIONS, strict=True):
        background(name, 32).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption)
    return folder


def config_of(photos: Path, side: int, **sections: Any) -> TrainConfig:
    base = {
        "output_dir": photos.parent / "run",
        "data": {"instance_dir": photos, "resolution": side},
        "adapter": {"rank": 2, "train_text_encoder": ["text_encoder"], "dropout": 0.1},
        "optim": {"steps": 3, "learning_rate": 1e-2},
        "logging": {"trackers": []},
    }
    return TrainConfig.model_validate(base | sections)


def examples_of(photos: Path, side: int) -> list[Example]:
    return [Example(one.path, one.caption, size=(side, side)) for one in find_examples(photos, instance_prompt=None)]


class Watched:
    """Counts what frozen encoders compute, and how often they are had on the device."""

    def __init__(self, pipe: Any, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, int]] = []
        self.brought = 0
        bring = Placement.bring

        def noted(placement: Placement, *asked: str) -> None:
            self.brought += not set(names).isdisjoint(asked)
            bring(placement, *asked)

        monkeypatch.setattr(Placement, "bring", noted)
        for name in names:
            self._watch(name, getattr(pipe, name))

    def _watch(self, name: str, model: nn.Module) -> None:
        def note(_: object, args: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
            self.asked.append((name, len(args[0] if args else options["input_ids"])))

        model.register_forward_pre_hook(note, with_kwargs=True)


class Steps(TrainingCallback):
    """Notes how much was asked by the end of each step."""

    def __init__(self, watched: Watched) -> None:
        self.watched, self.asked, self.brought = watched, [], []

    def step(self, number: int, loss: float, rate: float) -> None:
        self.asked.append(len(self.watched.asked))
        self.brought.append(self.watched.brought)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trains", [True, False])
def test_a_run_asks_frozen_encoders_once_about_each_text_before_its_first_step(
    photos: Path, monkeypatch: pytest.MonkeyPatch, family: str, trains: bool
) -> None:
    tiny = PIPELINES[family]
    pipe, held_out = tiny.build(), photos.parent / "held-out"
    held_out.mkdir()
    background("green", 32).save(held_out / "green.png")
    (held_out / "green.txt").write_text("a green cat")
    frozen = FAMILIES[family] if trains else ["text_encoder", *FAMILIES[family]]
    config = config_of(
        photos,
        tiny.side,
        data={"instance_dir": photos, "resolution": tiny.side, "validation_dir": held_out},
        adapter={"rank": 2, "train_text_encoder": ["text_encoder"] if trains else False},
        validation={"every": 1, "timesteps": 1},
        preview={"prompts": [{"prompt": "a cat at night", "size": 64}], "every": 2, "steps": 1, "guidance_scale": 1.0},
    )
    watched = Watched(pipe, frozen, monkeypatch)
    steps = Steps(watched)
    train(config, pipeline=pipe, callbacks=[steps])
    texts = 5  # two captions, the empty one, the held-out one, the preview's; its negative is the empty one
    apart = texts if trains else texts + 1  # captions are kept whole where all is frozen, prompts by their rows
    assert len(steps.asked) == 3 and set(steps.asked) == {len(watched.asked)}, "asked after the first step"
    assert sorted(watched.asked) == sorted((name, 1) for name in frozen for _ in range(apart))
    assert set(steps.brought) == {watched.brought} and watched.brought > 0, "come to the device between steps"


def prepared(photos: Path, family: str, **sections: Any) -> tuple[TrainablePipeline, BatchSource]:
    tiny = PIPELINES[family]
    config = config_of(photos, tiny.side, **sections)
    trainable = prepare_trainable(tiny.build(), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for up in (up for injection in trainable.injections.values() for up in injection.ups()):
            up.copy_(0.1 * torch.randn(up.shape, generator=generator))
    trainable.train(False)  # without dropout
    return trainable, BatchSource(trainable, config, instances=examples_of(photos, tiny.side), classes=[])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_recalled_is_what_the_pipeline_says_and_gradients_reach_what_is_trained(
    photos: Path, family: str
) -> None:
    trainable, source = prepared(photos, family)
    texts = [*CAPTIONS, "", "a text that nobody knew"]
    made = source._captions.encode(texts)
    assert_close(dict(made), dict(trainable.family.encode(trainable.pipe, texts)))
    sum(tensor.float().square().sum() for tensor in made.values()).backward()
    ups = trainable.injections["text_encoder"].ups()
    assert any(up.grad is not None and bool(up.grad.any()) for up in ups)
    with trainable.base_alone():
        plain = dict(trainable.family.encode(trainable.pipe, texts))
    assert_close(dict(source._captions.encode_untrained(texts)), plain)
    assert any(not torch.equal(made[name], plain[name]) for name in made), "the adapter says nothing"


def test_an_answer_does_not_depend_on_the_texts_beside_it_nor_on_what_was_kept(photos: Path) -> None:
    trainable, source = prepared(photos, "flux-dev")
    together, alone = (source._captions.encode(texts) for texts in (CAPTIONS, CAPTIONS[1:]))
    _, forgetful = prepared(photos, "flux-dev", data={"instance_dir": photos, "resolution": 32, "cache_memory": 0})
    again = forgetful._captions.encode(CAPTIONS)
    assert torch.equal(together["encoder_hidden_states"][1:], alone["encoder_hidden_states"])  # the T5's
    assert torch.equal(together["encoder_hidden_states"], again["encoder_hidden_states"])
    assert len(forgetful._captions._answers._kept) == 1, "what is kept is bounded"


def test_answers_lie_on_disk_for_the_next_run_unless_its_encoder_is_another(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"instance_dir": photos, "resolution": 32, "cache_dir": photos.parent / "cache"}
    prepared(photos, "flux-dev", data=data)
    tiny, config = PIPELINES["flux-dev"], config_of(photos, 32, data=data)
    for change, expected in ((0.0, 0), (1.0, 3)):
        pipe = tiny.build()
        with torch.no_grad():
            next(pipe.text_encoder_2.parameters()).view(-1)[0] += change
        trainable = prepare_trainable(pipe, config)
        watched = Watched(pipe, ["text_encoder_2"], monkeypatch)
        BatchSource(trainable, config, instances=examples_of(photos, 32), classes=[])
        assert len(watched.asked) == expected


def test_captions_that_steps_make_up_are_asked_ahead_and_draw_no_random_number(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"instance_dir": photos, "resolution": 32, "captions": {"shuffle": True, "separator": " "}}
    trainable, source = prepared(photos, "flux-dev", data=data)
    trainable.train()
    watched = Watched(trainable.pipe, ["text_encoder_2"], monkeypatch)
    torch.manual_seed(1)
    source._look_ahead(0)
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(1)), "a resumed run would differ"
    count = len(watched.asked)
    assert count > 2
    for index in range(20):
        source.batches_at(index)
    assert len(watched.asked) == count
    assert watched.brought == count  # while they were asked


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_every_family_s_pipeline_draws_the_same_with_encoders_that_are_recalled(name: str) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    settings = GenerationSettings("a castle", seed=1, steps=2, guidance_scale=1.0, width=64, height=64)
    plain = generate(pipe, settings)
    names = [part for part in pipe.components if part.startswith("text_encoder") and getattr(pipe, part) is not None]
    frozen = FrozenEncoders(pipe, names, lambda: torch.device("cpu"), lambda: None)
    frozen.remember_in(TensorCache(None, 1e9))
    models = {part: getattr(pipe, part) for part in names}
    for _ in range(2):
        with frozen.recalled():
            drawn = generate(pipe, settings)
            for model in models.values():
                model.forward = None  # from now on nothing is computed
        assert drawn.tobytes() == plain.tobytes()
    assert all(getattr(pipe, part) is model for part, model in models.items())
