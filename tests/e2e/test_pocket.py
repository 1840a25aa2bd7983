"""The embedded bases themselves: they load plainly, draw what captions say, and an adapter trained on them learns."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

import dora_diffusion as dd
from dora_diffusion.evaluate.recognition import nearest_background
from dora_diffusion.pipelines.loading import POCKET, POCKET_DIT
from dora_diffusion.pretrain.scenes import Scene, caption, vocabulary

EXAMPLES = Path(__file__).parents[2] / "examples"
MEBIBYTE = 1024 * 1024


BASES = pytest.mark.parametrize("base", ["pocket", "pocket-dit"])


def test_plain_diffusers_loads_the_dit_and_draws_the_same() -> None:
    ours = dd.load_pipeline("pocket-dit")
    theirs = StableDiffusion3Pipeline.from_pretrained(POCKET_DIT, text_encoder_3=None, tokenizer_3=None)
    assert {theirs.transformer.dtype, theirs.text_encoder.dtype, theirs.vae.dtype} == {torch.float32}
    settings = dd.GenerationSettings("a noto style rocket on the beach", steps=4)
    assert dd.generate(ours, settings).tobytes() == dd.generate(theirs, settings).tobytes()


def test_plain_diffusers_loads_the_folder_and_draws_the_same() -> None:
    ours = dd.load_pipeline("pocket")
    theirs = StableDiffusionPipeline.from_pretrained(POCKET)
    assert {theirs.unet.dtype, theirs.text_encoder.dtype, theirs.vae.dtype} == {torch.float32}
    settings = dd.GenerationSettings("a noto style rocket on the beach", steps=4)
    assert dd.generate(ours, settings).tobytes() == dd.generate(theirs, settings).tobytes()


@pytest.mark.parametrize(("folder", "bytes_at_most"), [(POCKET, 40 * MEBIBYTE), (POCKET_DIT, 25_000_000)])
def test_it_is_small_and_its_card_is_there(folder: Path, bytes_at_most: int) -> None:
    weights = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in weights) < bytes_at_most
    assert not [path for path in weights if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert "Recognition" in (folder / "README.md").read_text()


@BASES
def test_backgrounds_are_those_that_captions_name(base: str) -> None:
    pipe = dd.load_pipeline(base)
    wanted = ["blue", "yellow", "purple", "meadow", "night", "beach"]
    drawn = [
        dd.generate(pipe, dd.GenerationSettings(caption(Scene("crown", "noto", place)), steps=8)) for place in wanted
    ]
    assert [nearest_background(picture) for picture in drawn] == wanted


@BASES
def test_unseen_words_do_not_break_it(base: str) -> None:
    pipe = dd.load_pipeline(base)
    picture = dd.generate(pipe, dd.GenerationSettings("ein Zebra, zqx! \N{ROCKET} " + "very " * 60, steps=1))
    assert picture.size == (128, 128)


def test_vocabulary_keeps_unseen_objects_out() -> None:
    words = vocabulary()
    assert not set(words.objects) & set(words.unseen_objects)
    assert len(words.objects) == 120
    assert len(words.backgrounds) == 18


@pytest.mark.slow
@pytest.mark.parametrize("config", ["subject.yaml", "subject-dit.yaml"])
def test_training_on_the_pocket_lowers_the_validation_loss(config: str, tmp_path) -> None:
    overrides = {
        "output_dir": str(tmp_path / "run"),
        "optim.steps": "40",
        "optim.warmup_steps": "0",
        "optim.learning_rate": "1.0e-3",  # the example's own is for 300 steps
        "prior.class_prompts": "[]",
        "preview.prompts": "[]",
        "validation.every": "20",
    }
    result = dd.train(dd.TrainConfig.from_yaml(EXAMPLES / "subject-robot" / config, overrides))
    losses = [loss for _, loss in result.validation]
    assert [step for step, _ in result.validation] == [0, 20, 40]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 0.8 * losses[0]


@pytest.mark.parametrize("folder", [POCKET, POCKET_DIT])
def test_no_path_of_a_machine_is_inside(folder: Path) -> None:
    texts = {path.name: path.read_text() for path in folder.rglob("*.json")}
    assert [name for name, text in texts.items() if "_name_or_path" in text or "/run/" in text] == []
