"""What is made once and kept: latents of views, conditioning of captions; on disk, known by what it was made of."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dora_diffusion.training.base.trainable import prepare_trainable
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.batches import BatchSource
from dora_diffusion.training.data.cache import TensorCache, made_of, read_entry, write_entry
from dora_diffusion.training.data.examples import Example, find_examples
from dora_diffusion.training.data.latents import LatentSource
from dora_diffusion.training.data.views import View, variant
from dora_diffusion.training.run.train import train
from tests.families.pipelines import PIPELINES
from tests.pocket_random import random_pocket_pipeline
from tests.tolerances import assert_identical

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True, False])}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    for index, size in enumerate([(48, 32), (32, 48), (40, 40)]):
        values = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a cat, number {index}")
    return folder


def config_of(folder: Path, **data: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": "pocket",
            "output_dir": folder.parent / "run",
            "data": {"instance_dir": folder, "resolution": 32, **data},
            "adapter": {"rank": 2},
            "optim": {"steps": 6, "batch_size": 2},
            "validation": {"every": 0, "repeats": 1},
            "checkpoint": {"every": 0},
        }
    )


def examples_of(folder: Path) -> list[Example]:
    return [replace(example, size=(32, 24)) for example in find_examples(folder, instance_prompt=None)]


class Counted:
    """A trainable whose VAE and text encoders count what they are given."""

    def __init__(self, config: TrainConfig, pipe: object = None) -> None:
        self.trainable = prepare_trainable(pipe or random_pocket_pipeline(), config)
        family, self.pictures, self.captions = self.trainable.family, 0, 0

        def encode_pictures(pipe: object, pixels: torch.Tensor) -> torch.Tensor:
            self.pictures += 1
            return family.codec.encode(pipe, pixels)

        def encode_captions(pipe: object, captions: list[str]) -> object:
            self.captions += 1
            return family.encode(pipe, captions)

        codec = SimpleNamespace(encode=encode_pictures, decode=family.codec.decode)
        counted = SimpleNamespace(**{**vars(family), "codec": codec, "encode": encode_captions})
        object.__setattr__(self.trainable, "family", counted)


def test_an_entry_comes_back_from_disk(tmp_path: Path) -> None:
    key = made_of(picture="x", size=(1, 2))
    TensorCache(tmp_path, 1e9).add(key, TENSORS)
    assert_identical(dict(TensorCache(tmp_path, 1e9).find(key)), TENSORS)
    assert TensorCache(tmp_path, 1e9).find(made_of(picture="x", size=(2, 1))) is None
    assert TensorCache(None, 1e9).find(key) is None


def damaged(path: Path) -> Iterator[bytes]:
    raw = path.read_bytes()
    yield b""
    yield raw[:20]
    yield raw[:-1]
    yield raw[:-1] + bytes([raw[-1] ^ 1])
    yield b"\xff" * 8 + raw[8:]
    yield raw.replace(b'"dora_diffusion.made_of"', b'"dora_diffusion.made_if"')
    yield json.dumps([1]).encode()


def test_a_damaged_or_foreign_entry_is_made_again(tmp_path: Path) -> None:
    path, key = tmp_path / "1.safetensors", made_of(picture="x")
    write_entry(path, key, TENSORS)
    assert_identical(read_entry(path, key), TENSORS)
    assert read_entry(path, made_of(picture="y")) is None  # of a hash that happens to be the same, or renamed
    for bad in damaged(path):
        path.write_bytes(bad)
        assert read_entry(path, key) is None
        write_entry(path, key, TENSORS)
        assert_identical(read_entry(path, key), TENSORS)


def test_memory_is_bounded_and_what_is_used_stays(tmp_path: Path) -> None:
    one = {"a": torch.zeros(100)}  # 400 bytes
    for folder, found in ((None, None), (tmp_path, one)):
        cache = TensorCache(folder, limit=1000)
        for name in "abc":
            cache.add(name, one)
            cache.find("a")
        assert cache.find("a") is not None and cache.find("c") is not None
        assert (cache.find("b") is None) == (found is None)
        assert cache._bytes <= 1000
    assert TensorCache(None, 0).add("a", one) is not None  # one alone may be larger


def test_a_cache_that_cannot_be_written_to_is_said_once_and_done_without(tmp_path: Path, capsys) -> None:
    (tmp_path / "cache").write_text("a file in its way")
    cache = TensorCache(tmp_path / "cache", 1e9)
    assert_identical(dict(cache.add("a", TENSORS)), TENSORS)
    cache.add("b", TENSORS)
    assert capsys.readouterr().err.count("cannot be written to") == 1
    assert_identical(dict(cache.find("a")), TENSORS)


def test_every_view_is_encoded_once_and_the_next_run_encodes_none(photos: Path, tmp_path: Path) -> None:
    config = config_of(photos, cache_dir=tmp_path / "cache", cache_variants=3, crop="random", flip=True)
    examples = examples_of(photos)
    first = Counted(config)
    source = BatchSource(first.trainable, config, instances=examples, classes=[])
    source.prepare(range(30))
    prepared = first.pictures
    assert 3 < prepared <= 9
    batches = [source.batches_at(index)[0] for index in range(30)]
    assert first.pictures == prepared and first.captions == 4  # three and the empty one
    again = Counted(config)
    source = BatchSource(again.trainable, config, instances=examples, classes=[])
    for index, batch in enumerate(batches):
        (same,) = source.batches_at(index)
        assert torch.equal(same.latents, batch.latents) and torch.equal(same.frames, batch.frames)
        assert_identical(dict(same.conditioning), dict(batch.conditioning))
    assert again.pictures == again.captions == 0
    assert len({batch.latents[0].numpy().tobytes() for batch in batches}) > 3, "views differ"


@pytest.mark.parametrize("what", ["picture", "caption", "vae", "encoder", "view", "precision"])
def test_a_changed_picture_caption_view_model_or_precision_is_made_anew(
    photos: Path, tmp_path: Path, what: str
) -> None:
    config = config_of(photos, cache_dir=tmp_path / "cache")
    first = Counted(config)
    BatchSource(first.trainable, config, instances=examples_of(photos), classes=[]).prepare(range(9))
    assert (first.pictures, first.captions) == (3, 4)
    pipe, examples = random_pocket_pipeline(), examples_of(photos)
    if what == "picture":
        Image.open(photos / "0.png").rotate(180).save(photos / "0.png")
    elif what == "caption":
        examples[0] = replace(examples[0], caption="another")
    elif what == "view":
        examples[0] = replace(examples[0], size=(24, 32))
    elif what == "precision":
        pipe.to(torch.bfloat16)
    else:
        model = pipe.vae if what == "vae" else pipe.text_encoder
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1
    second = Counted(config, pipe)
    BatchSource(second.trainable, config, instances=examples, classes=[]).prepare(range(9))
    expected = {"picture": (1, 0), "view": (1, 0), "caption": (0, 1), "vae": (3, 0), "encoder": (0, 4)}
    assert (second.pictures, second.captions) == expected.get(what, (3, 4))


def test_variants_are_few_mirrored_by_turns_and_a_function_of_the_seed(tmp_path: Path) -> None:
    data = config_of(tmp_path, flip=True, crop="random", cache_variants=4).data
    example = Example(tmp_path / "1.png", "a")
    views = [variant(data, example, number, seed=0) for number in range(4)]
    assert len(set(views)) == 4 and [view.flip for view in views] == [False, True, False, True]
    assert views == [variant(data, example, number, seed=0) for number in range(4)]
    assert views != [variant(data, example, number, seed=1) for number in range(4)]
    assert variant(data.model_copy(update={"flip": False, "crop": "center"}), example, 1, seed=0) == View()


def test_pictures_are_encoded_in_fp32_whatever_is_trained_in(photos: Path) -> None:
    """SDXL's fp16 VAE overflows; a latent is kept, so it is worth its time."""
    config = config_of(photos)
    pipe = random_pocket_pipeline()
    pipe.to(torch.bfloat16)
    trainable = prepare_trainable(pipe, config)
    example = examples_of(photos)[0]
    latent = LatentSource(trainable, config.data).latent(example, View()).values
    assert latent.dtype == torch.float32 and pipe.vae.dtype == torch.bfloat16
    pipe.vae.to(torch.float32)
    assert torch.equal(latent, LatentSource(trainable, config.data).latent(example, View()).values)


def test_runs_with_a_cache_and_without_are_one_and_the_same(photos: Path, tmp_path: Path) -> None:
    adapters = []
    for name, cache in (("none", None), ("new", tmp_path / "cache"), ("old", tmp_path / "cache")):
        config = config_of(photos, cache_dir=cache, cache_variants=2, crop="random", flip=True)
        adapters.append(train(config.model_copy(update={"output_dir": tmp_path / name})).adapter)
    plain, new, old = map(load_file, adapters)
    assert_identical(new, plain)
    assert_identical(old, plain)
    assert list((tmp_path / "cache").rglob("*.safetensors"))
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_instances_and_classes_of_other_shapes_are_batches_of_their_own(photos: Path, tmp_path: Path) -> None:
    config = config_of(photos).model_copy(update={"prior": config_of(photos).prior.model_copy(update={"weight": 0.5})})
    examples = examples_of(photos)
    classes = [replace(example, size=(32, 32)) for example in examples]
    source = BatchSource(
        prepare_trainable(random_pocket_pipeline(), config), config, instances=examples, classes=classes
    )
    instance, drawn = source.batches_at(0)
    assert (instance.size, drawn.size) == ((32, 24), (32, 32))
    assert instance.latents.shape[-2:] == (3, 4) and drawn.latents.shape[-2:] == (4, 4)
    assert instance.share == drawn.share == 0.5
    assert instance.weights.tolist() == [2.0, 2.0] and drawn.weights.tolist() == [1.0, 1.0]
    together = BatchSource(
        prepare_trainable(random_pocket_pipeline(), config), config, instances=classes, classes=classes
    ).batches_at(0)
    assert len(together) == 1 and together[0].share == 1 and len(together[0].names) == 4


def test_sdxl_is_told_the_size_and_crop_of_each_bucket(photos: Path) -> None:
    config = config_of(photos)
    trainable = prepare_trainable(PIPELINES["sdxl"].build(), config)
    shapes = {"0.png": (48, 32), "1.png": (24, 40), "2.png": (32, 32)}
    examples = [replace(one, size=shapes[one.path.name]) for one in examples_of(photos)]
    source = BatchSource(trainable, config, instances=examples, classes=[])
    seen = {}
    for index in range(9):
        (batch,) = source.batches_at(index)
        seen.update(zip(batch.names, batch.frames.tolist(), strict=True))
    assert seen == {"0.png": [32, 48, 0, 0, 32, 48], "1.png": [48, 32, 0, 1, 40, 24], "2.png": [40, 40, 0, 0, 32, 32]}
