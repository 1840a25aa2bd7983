"""Prior preservation: which class pictures are trained, and the base's own prediction as a target."""

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch import nn

from dora_diffusion.formats import save_adapter
from dora_diffusion.pretrain.scenes import background
from dora_diffusion.training.base.below import lay_below
from dora_diffusion.training.base.devices import with_precision
from dora_diffusion.training.base.trainable import TrainablePipeline, prepare_trainable
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.batches import BatchSource
from dora_diffusion.training.data.concepts import opened
from dora_diffusion.training.data.examples import Example
from dora_diffusion.training.processes import Processes
from dora_diffusion.training.step import priors
from dora_diffusion.training.step.guard import Guard
from dora_diffusion.training.step.objective import Objectives, objective_of
from dora_diffusion.training.step.optimisers import build_optimizer
from dora_diffusion.training.step.priors import ensure_class_examples, folder_examples
from dora_diffusion.training.step.training_step import TrainingStep
from dora_diffusion.utils.atomic import sha256_of
from tests.families.pipelines import PIPELINES
from tests.pocket_random import random_adapter, random_pocket_pipeline
from tests.tolerances import assert_close, assert_identical

COLOURS = ("red", "blue", "green")
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in COLOURS:
        background(name, 64).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def classes(images) -> Path:
    """A folder of class pictures, beside those that are learnt."""
    folder = images.parent / "class"
    folder.mkdir()
    for name in COLOURS:
        background(name, 64).save(folder / f"{name}.png")
    return folder


def examples_of(folder: Path) -> list[Example]:
    return [Example(folder / f"{name}.png", f"a {name} cat") for name in COLOURS]


def sized(examples: Sequence[Example]) -> list[Example]:
    return [replace(example, size=(32, 32)) for example in examples]


def config_of(images: Path, prior: dict, adapter: dict | None = None, optim: dict | None = None, **more) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "output_dir": images.parent / "run",
            "data": {"instance_dir": images, "instance_prompt": "a cat", "resolution": 32, **more.pop("data", {})},
            "prior": prior,
            "adapter": {"rank": 2, **(adapter or {})},
            "optim": {"batch_size": 2, "min_snr_gamma": None, "steps": 4, **(optim or {})},
            "preview": {"steps": 1},
            **more,
        }
    )


# Class pictures that the base draws


@pytest.fixture
def drawn_ones(monkeypatch):
    """Prompts that were drawn, in batches; each picture's pixels say its seed."""
    batches: list[list[str]] = []

    def instead(pipe, settings):
        batches.append([one.prompt for one in settings])
        return [Image.new("RGB", (32, 32), (one.seed % 256, len(one.prompt), one.steps)) for one in settings]

    monkeypatch.setattr(priors, "generate_together", instead)
    return batches


@pytest.fixture
def pipe():
    return random_pocket_pipeline()


def names(examples: list[Example]) -> list[str]:
    return [example.path.name for example in examples]


def test_class_images_means_that_many_whatever_is_there(images, pipe, drawn_ones) -> None:
    """TRAINER.md: class_images: 2 with 6 there trains 6."""
    six = config_of(images, {"class_prompts": ["a dog", "a cow"], "class_images": 6})
    assert len(ensure_class_examples(pipe, six)) == 6
    two = config_of(images, {"class_prompts": ["a dog", "a cow"], "class_images": 2})
    assert names(ensure_class_examples(pipe, two)) == ["class-0000.png", "class-0001.png"]
    assert [len(batch) for batch in drawn_ones] == [2, 2, 2]  # in batches, and nothing for the second
    assert [example.caption for example in ensure_class_examples(pipe, six)] == ["a dog", "a cow"] * 3
    assert len(drawn_ones) == 3  # those that a smaller number left out are still known


@pytest.mark.parametrize(
    "change",
    [
        {"prior": {"class_prompt": "a horse", "class_images": 3}},
        {"prior": {"class_prompt": "a dog", "class_images": 3, "guidance_scale": 1.5}},
        {"preview": {"steps": 2}},
        {"optim": {"batch_size": 2, "seed": 1}},
    ],
)
def test_pictures_of_another_prompt_or_setting_are_drawn_anew(images, pipe, drawn_ones, change) -> None:
    """TRAINER.md: class_prompt changed and the old pictures are used."""
    before = config_of(images, {"class_prompt": "a dog", "class_images": 3})
    ensure_class_examples(pipe, before)
    after = TrainConfig.model_validate(
        {**before.model_dump(), **{key: {**before.model_dump()[key], **value} for key, value in change.items()}}
    )
    drawn_ones.clear()
    found = ensure_class_examples(pipe, after)
    assert sum(map(len, drawn_ones)) == 3
    assert {example.caption for example in found} == {after.prior.class_prompt}
    assert (found[0].path.with_suffix(".txt")).read_text() == after.prior.class_prompt
    drawn_ones.clear()
    ensure_class_examples(pipe, after)
    assert drawn_ones == []


def test_pictures_of_another_base_are_drawn_anew(images, pipe, drawn_ones) -> None:
    """TRAINER.md: the model changed and the old pictures are used."""
    config = config_of(images, {"class_prompt": "a dog", "class_images": 3})
    ensure_class_examples(pipe, config)
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[0, 0] += 1
    drawn_ones.clear()
    ensure_class_examples(pipe, config)
    assert sum(map(len, drawn_ones)) == 3


def test_a_changed_a_lost_and_an_unlisted_picture_are_drawn_anew(images, pipe, drawn_ones) -> None:
    config = config_of(images, {"class_prompt": "a dog", "class_images": 4})
    found = ensure_class_examples(pipe, config)
    whole = [sha256_of(example.path) for example in found]
    manifest = found[0].path.with_name("class.json")
    listed = json.loads(manifest.read_text())
    assert [entry["sha256"] for entry in listed.values()] == whole
    background("red", 32).save(found[0].path)
    found[1].path.unlink()
    del listed["class-0002.png"]
    manifest.write_text(json.dumps(listed))
    drawn_ones.clear()
    ensure_class_examples(pipe, config)
    assert sum(map(len, drawn_ones)) == 3
    assert [sha256_of(example.path) for example in found] == whole
    manifest.write_text("[{")
    drawn_ones.clear()
    ensure_class_examples(pipe, config)
    assert sum(map(len, drawn_ones)) == 4


def test_hidden_files_are_no_class_pictures(images, pipe, drawn_ones) -> None:
    """TRAINER.md: `._class-0000.png` counts."""
    folder = images.parent / "class"
    folder.mkdir()
    for index in range(3):
        (folder / f"._class-{index:04d}.png").write_bytes(b"what macOS leaves on a foreign disk")
    config = config_of(images, {"class_prompt": "a dog", "class_images": 2, "class_dir": folder})
    assert names(ensure_class_examples(pipe, config)) == ["class-0000.png", "class-0001.png"]
    assert sum(map(len, drawn_ones)) == 2


def test_a_users_own_pictures_count_and_are_never_touched(images, classes, pipe, drawn_ones) -> None:
    before = {path.name: path.read_bytes() for path in classes.iterdir()}
    prior = {"class_prompt": "a dog", "class_dir": classes}
    found = ensure_class_examples(pipe, config_of(images, {**prior, "class_images": 5}))
    assert [example.caption for example in found] == ["a dog"] * 5
    assert sorted(names(found)) == ["blue.png", "class-0000.png", "class-0001.png", "green.png", "red.png"]
    two = ensure_class_examples(pipe, config_of(images, {**prior, "class_images": 2}))
    assert len(two) == 2 and set(names(two)) < set(before)
    assert ensure_class_examples(pipe, config_of(images, {**prior, "class_images": 2})) == two
    ensure_class_examples(pipe, config_of(images, {**prior, "class_images": 5, "class_prompt": "a horse"}))
    assert {name: (classes / name).read_bytes() for name in before} == before


def test_processes_draw_a_share_each_and_wait_for_one_another(images, pipe, drawn_ones) -> None:
    config = config_of(
        images, {"class_prompts": ["a dog", "a cow", "a hen"], "class_images": 7}, optim={"batch_size": 1}
    )
    found: dict[int, list[Example]] = {}

    def draw(process: int) -> None:
        found[process] = ensure_class_examples(pipe, config, processes=Processes(process, 3))

    late, *others = [threading.Thread(target=draw, args=(process,)) for process in range(3)]
    for thread in others:
        thread.start()
    while sum(map(len, drawn_ones)) < 4:
        time.sleep(0.01)
    assert not found  # they have drawn their shares, and wait for process 0's
    late.start()
    for thread in (late, *others):
        thread.join()
    assert names(found[0]) == [f"class-{index:04d}.png" for index in range(7)]
    assert found[0] == found[1] == found[2]
    assert sum(map(len, drawn_ones)) == 7
    folder = found[0][0].path.parent
    assert set(json.loads((folder / "class.json").read_text())) == set(names(found[0]))
    assert list(folder.glob(".class-*")) == []
    drawn_ones.clear()
    assert ensure_class_examples(pipe, config) == found[0] and drawn_ones == []


def test_what_a_killed_run_of_several_had_drawn_is_kept(images, pipe, drawn_ones, monkeypatch) -> None:
    config = config_of(images, {"class_prompt": "a dog", "class_images": 4})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(priors.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
        ensure_class_examples(pipe, config, processes=Processes(1, 2))
    assert sum(map(len, drawn_ones)) == 2
    assert len(ensure_class_examples(pipe, config)) == 4
    assert sum(map(len, drawn_ones)) == 4


def test_a_folder_is_taken_as_it_is_and_class_images_caps_it(images, classes) -> None:
    prior = config_of(images, {"mode": "folder", "class_dir": classes, "class_prompt": "a dog"}).prior
    assert names(folder_examples(prior, seed=0)) == ["blue.png", "green.png", "red.png"]
    two = prior.model_copy(update={"class_images": 2})
    chosen = folder_examples(two, seed=0)
    assert len(chosen) == 2 and folder_examples(two, seed=0) == chosen
    assert any(folder_examples(two, seed=seed) != chosen for seed in range(1, 9))
    (classes / "red.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="red.png: not a picture"):
        opened(folder_examples(prior, seed=0))


# What is trained of them


class Trained:
    """A pipeline under training, its batches and its step."""

    def __init__(self, pipe, config: TrainConfig, instances, classes=()) -> None:
        AcceleratorState._reset_state()
        config = with_precision(config, torch.device("cpu"))
        self.accelerator = Accelerator(cpu=True, mixed_precision=config.optim.mixed_precision)
        self.trainable: TrainablePipeline = prepare_trainable(pipe, config)
        self.source = BatchSource(self.trainable, config, instances=sized(instances), classes=sized(classes))
        optimizer = build_optimizer(self.trainable, config.optim, config.words)
        for injection in self.trainable.injections.values():
            injection.keep_norms()
        self.step = TrainingStep(
            config.optim,
            self.accelerator,
            self.trainable,
            Objectives(pipe, config.optim, config.flow, config.loss).of,
            batches_at=self.source.batches_at,
            optimizer=optimizer,
            guard=Guard(config.guard, self.trainable.named_tensors(), optimizer),
        )

    def disturb(self) -> None:
        """Away from the start."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for injection in self.trainable.injections.values():
                for up in injection.ups():
                    up.copy_(0.1 * torch.randn(up.shape, generator=generator))


OFF = {"mode": "adapter_off", "class_prompts": ["a dog", "a cow on the beach"]}


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_prior_preservation_is_right_for_every_batch_size(images, batch: int) -> None:
    """diffusers #12292: wrong for a batch of more than one."""
    config = config_of(images, {"class_prompt": "a dog", "weight": 0.25}, optim={"batch_size": batch})
    trained = Trained(random_pocket_pipeline(), config, examples_of(images)[:2], examples_of(images)[2:])
    (whole,) = trained.source.batches_at(1)
    assert [name == "green.png" for name in whole.names] == [False] * batch + [True] * batch
    seen = {}
    for rows in (range(batch), range(batch, 2 * batch)):
        losses = []
        for row in rows:
            weights = torch.zeros(2 * batch)
            weights[row] = 2 * batch  # the mean over the batch is then this row's error
            losses.append(trained.step.loss(replace(whole, weights=weights), seed=7))
        seen[rows[0]] = torch.stack(losses).mean()
    assert_close(trained.step.loss(whole, seed=7), seen[0] + 0.25 * seen[batch])


def test_all_class_pictures_are_seen_however_few_the_instances(images) -> None:
    """diffusers: only as many class images are seen as there are instance images."""
    config = config_of(images, {"class_prompt": "a dog"}, optim={"batch_size": 1})
    one, classes = (
        examples_of(images)[:1],
        [Example(images / f"{name}.png", f"{name} {turn}") for turn in "ab" for name in COLOURS],
    )
    trained = Trained(random_pocket_pipeline(), config, one, classes)
    chosen = [trained.source._chosen_at(index)[1][0].caption for index in range(6)]
    assert sorted(chosen) == sorted(example.caption for example in classes)


NOISY = {"noise_offset": 0.1, "noise_offset_random": True, "input_perturbation": 0.1}
HUBERS = [
    {"kind": "huber", "huber_c": c, "huber_schedule": schedule, **NOISY}
    for c in (1e-4, 0.1)
    for schedule in ("constant", "exponential", "snr")
]


@pytest.mark.parametrize("loss", [NOISY, *HUBERS])
@pytest.mark.parametrize("kind", ["pocket", "sd3"])
def test_adapter_off_costs_exactly_nothing_at_first_by_any_loss(images, kind: str, loss: dict) -> None:
    pipe = random_pocket_pipeline() if kind == "pocket" else PIPELINES[kind].build()
    trained = Trained(pipe, config_of(images, OFF, {"dropout": 0.2}, loss=loss), examples_of(images))
    learnt, kept = trained.source.batches_at(0)
    assert trained.step.loss(learnt, seed=1) > 0
    nothing = trained.step.loss(kept, seed=1)
    assert nothing.item() == 0.0
    nothing.backward()
    assert all(torch.count_nonzero(p.grad) == 0 for p in trained.trainable.parameters() if p.grad is not None)
    trained.disturb()
    assert trained.step.loss(kept, seed=1) > 0


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    ("kind", "text"), [("pocket", False), ("pocket", True), ("sd3", True), ("hunyuan-dit-1.2", True)]
)
def test_adapter_off_costs_exactly_nothing_at_first(images, kind: str, text: bool, precision: str, batch: int) -> None:
    """Whatever the batch, with dropout, and with text encoders that are trained (T5 would drop by itself)."""
    pipe = random_pocket_pipeline() if kind == "pocket" else PIPELINES[kind].build()
    pipe.to(PRECISIONS[precision])
    adapter = {"target_modules": "all", "train_text_encoder": text, "dropout": 0.2}
    optim = {"batch_size": batch, "mixed_precision": precision}
    trained = Trained(pipe, config_of(images, OFF, adapter, optim), examples_of(images))
    torch.manual_seed(0)
    learnt, kept = trained.source.batches_at(0)
    assert learnt.untrained is None and kept.untrained is not None
    assert trained.step.loss(learnt, seed=1) > 0
    assert trained.step.loss(kept, seed=1).item() == 0.0
    trained.disturb()
    learnt, kept = trained.source.batches_at(0)
    assert trained.step.loss(kept, seed=1) > 0


def test_adapter_off_with_new_words_reads_them_nowhere(images) -> None:
    config = config_of(
        images,
        OFF,
        {"train_text_encoder": True},
        words={"starts": {"<zqx>": "cat"}, "vectors": 2},
        data={"instance_prompt": "a <zqx>"},
    )
    instances = [Example(images / "red.png", "a <zqx> on the beach")]
    trained = Trained(random_pocket_pipeline(), config, instances)
    _, kept = trained.source.batches_at(0)
    assert trained.step.loss(kept, seed=1).item() == 0.0
    tokenizer = trained.trainable.pipe.tokenizer
    with trained.trainable.base_alone():
        assert trained.trainable.pipe.tokenizer is not tokenizer
    assert trained.trainable.pipe.tokenizer is tokenizer


@pytest.mark.parametrize("adapter", [{}, {"train_text_encoder": True}, {"use_dora": False}])
def test_the_target_is_the_bases_own_prediction_however_far_the_adapter_is(images, adapter: dict) -> None:
    trained = Trained(random_pocket_pipeline(), config_of(images, {**OFF, "weight": 0.5}, adapter), examples_of(images))
    trained.disturb()
    _, kept = trained.source.batches_at(3)
    got = trained.step.loss(kept, seed=5)
    family, pipe = trained.trainable.family, trained.trainable.pipe
    captions = [one.caption for one in trained.source._chosen_at(3)[1]]
    assert sorted(captions) == sorted(OFF["class_prompts"])
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(kept.latents.shape, generator=generator)
    objective = objective_of(pipe, config_of(images, {}).optim, config_of(images, {}).flow, tokens=16)
    timesteps = objective.timesteps(2, generator)
    noisy = objective.add_noise(kept.latents, noise, timesteps)

    def predicted():
        return family.predict(pipe.unet, noisy, timesteps, family.encode(pipe, captions), kept.frames)

    on = predicted()
    trained.trainable.eject()
    with torch.no_grad():
        off = predicted()
    # half of the micro-batch, so weighed twice with a share of a half
    assert_close(got, 2 * 0.5 * (on - off).square().mean())
    assert kept.share == 0.5


def test_gradients_flow_through_the_adapter_alone(images) -> None:
    trained = Trained(
        random_pocket_pipeline(), config_of(images, OFF, {"train_text_encoder": True}), examples_of(images)
    )
    trained.disturb()
    _, kept = trained.source.batches_at(0)
    assert not any(tensor.requires_grad for tensor in kept.untrained.values())
    loss = trained.step.loss(kept, seed=1)
    loss.backward()
    found = {name: injection.ups()[-1].grad for name, injection in trained.trainable.injections.items()}
    assert all(grad is not None and float(grad.abs().max()) > 0 for grad in [found["unet"]])
    assert any(
        up.grad is not None and float(up.grad.abs().max()) > 0
        for up in trained.trainable.injections["text_encoder"].ups()
    )


def test_off_and_on_again_is_as_if_nothing_had_been(images) -> None:
    trained = Trained(
        random_pocket_pipeline(),
        config_of(images, OFF, {"train_text_encoder": True, "dropout": 0.5}),
        examples_of(images),
    )
    trained.disturb()
    learnt, _ = trained.source.batches_at(0)
    torch.manual_seed(0)
    before = trained.step.loss(learnt, seed=1)
    layers = [layer for injection in trained.trainable.injections.values() for layer in injection._layers.values()]
    norms, modes = [layer._kept for layer in layers], [layer.training for layer in layers]
    assert all(modes) and all(norm is not None for norm in norms)
    with pytest.raises(RuntimeError), trained.trainable.base_alone():
        assert not torch.is_grad_enabled()
        raise RuntimeError
    assert all(now is then for now, then in zip((layer._kept for layer in layers), norms, strict=True))
    assert [layer.training for layer in layers] == modes and not any(layer.is_off for layer in layers)
    torch.manual_seed(0)
    assert_identical(trained.step.loss(learnt, seed=1), before)


def test_what_is_frozen_drops_nothing_of_its_own(images) -> None:
    """TRAINER.md: T5's dropout is live in train mode."""
    pipe = PIPELINES["sd3"].build()
    adapter, optim = {"train_text_encoder": True, "dropout": 0.2}, {"gradient_checkpointing": True}
    trainable = prepare_trainable(pipe, config_of(images, {}, adapter, optim))
    live = [
        module
        for part in ("transformer", "text_encoder", "text_encoder_3")
        for module in getattr(pipe, part).modules()
        if module.training
    ]
    assert not any(isinstance(module, nn.Dropout) or "Attention" in type(module).__name__ for module in live)
    layers = [layer for injection in trainable.injections.values() for layer in injection._layers.values()]
    assert all(layer.training for layer in layers)
    assert pipe.text_encoder_3.encoder.block[0].training  # or transformers would not recompute
    with trainable.drawing():
        assert not any(module.training for module in pipe.text_encoder_3.modules())


@pytest.mark.parametrize(
    ("prior", "expected"),
    [
        ({"caption": "blank"}, [""] * 6),
        ({"caption": "instance"}, ["a blue cat", "a green cat", "a red cat"] * 2),
        ({}, ["a dog", "a cow on the beach"] * 3),
    ],
)
def test_adapter_off_asks_with_class_blank_or_own_captions(images, prior: dict, expected: list[str]) -> None:
    config = config_of(images, {**OFF, **prior}, optim={"batch_size": 3})
    trained = Trained(random_pocket_pipeline(), config, examples_of(images))
    captions = [one.caption for index in range(2) for one in trained.source._chosen_at(index)[1]]
    assert sorted(captions) == sorted(expected) and (prior.get("caption") or captions == expected)
    learnt, kept = trained.source.batches_at(0)
    assert learnt.names == kept.names  # of the same pictures


def test_adapter_off_takes_class_pictures_where_there_are_some(images, classes) -> None:
    config = config_of(images, {"mode": "adapter_off", "class_dir": classes, "class_prompt": "a cow"})
    classes = ensure_class_examples(None, config)
    assert len(classes) == 3  # nothing was drawn: there is no base to draw with
    trained = Trained(random_pocket_pipeline(), config, examples_of(images)[:1], classes)
    learnt, kept = trained.source.batches_at(0)
    assert set(learnt.names) == {"red.png"} and len(set(kept.names)) == 2
    assert [one.caption for one in trained.source._chosen_at(0)[1]] == ["a cow", "a cow"]
    assert trained.step.loss(kept, seed=1).item() == 0.0
    blank = config.model_copy(update={"prior": config.prior.model_copy(update={"caption": "blank"})})
    source = BatchSource(trained.trainable, blank, instances=sized(examples_of(images)[:1]), classes=sized(classes))
    assert [one.caption for one in source._chosen_at(0)[1]] == ["", ""]


def test_masks_say_where_to_learn_and_what_is_kept_is_kept_everywhere(images) -> None:
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    mask.save(images / "red_mask.png")
    masked = [replace(examples_of(images)[0], mask=images / "red_mask.png")]
    trained = Trained(random_pocket_pipeline(), config_of(images, OFF, data={"mask_outside": 0.0}), masked)
    trained.disturb()
    learnt, kept = trained.source.batches_at(0)
    plain = BatchSource(trained.trainable, config_of(images, OFF), instances=sized(masked), classes=[])
    all_of_it, the_same = plain.batches_at(0)
    assert trained.step.loss(learnt, seed=1) != trained.step.loss(all_of_it, seed=1)
    assert_identical(trained.step.loss(kept, seed=1), trained.step.loss(the_same, seed=1))


def test_pictures_are_read_once_for_both_halves(images, monkeypatch) -> None:
    trained = Trained(random_pocket_pipeline(), config_of(images, OFF, data={"crop": "random"}), examples_of(images))
    encoded: list[int] = []
    encode = TrainablePipeline.encode_pictures
    monkeypatch.setattr(
        TrainablePipeline, "encode_pictures", lambda self, pixels: encoded.append(len(pixels)) or encode(self, pixels)
    )
    learnt, kept = trained.source.batches_at(0)
    assert sum(encoded) == 2
    assert_identical(kept.latents, learnt.latents)
    assert (learnt.share, kept.share) == (0.5, 0.5)


def test_adapters_below_are_part_of_the_base_that_is_kept(images, tmp_path) -> None:
    file = save_adapter(random_adapter(random_pocket_pipeline()), tmp_path / "below.safetensors")
    pipe = random_pocket_pipeline()
    before = pipe.unet.state_dict()["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"].clone()
    lay_below(pipe, {file: 1.0})
    after = pipe.unet.state_dict()["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
    assert not torch.equal(before, after)
    trained = Trained(pipe, config_of(images, OFF, {"train_text_encoder": True}), examples_of(images))
    _, kept = trained.source.batches_at(0)
    assert trained.step.loss(kept, seed=1).item() == 0.0


def test_an_adapter_that_starts_elsewhere_is_measured_from_the_base(images, tmp_path) -> None:
    """PiSSA's start is subtracted from itself: nothing but rounding is left."""
    trained = Trained(random_pocket_pipeline(), config_of(images, OFF, {"init": "pissa"}), examples_of(images))
    learnt, kept = trained.source.batches_at(0)
    assert trained.step.loss(kept, seed=1) < 1e-6 * trained.step.loss(learnt, seed=1)
