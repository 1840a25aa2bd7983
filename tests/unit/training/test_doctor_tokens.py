"""What the doctor says is cut, no family's own encoding can tell; the word before it, it can."""

from typing import Any

import pytest
import torch

from dora_diffusion.families import family_of_pipeline
from dora_diffusion.training.config import WordsConfig
from dora_diffusion.training.data.doctor.tokens import Cut, TokenCounter
from tests.families.pipelines import PIPELINES
from tests.pocket_random import random_pocket_pipeline

LONG = " ".join(["cat", "forest"] * 600)


def counter(name: str) -> TokenCounter:
    return TokenCounter(PIPELINES[name].build(), WordsConfig())


def conditioning(pipe: Any, caption: str) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return dict(family_of_pipeline(pipe).encode(pipe, [caption]))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(one[name].shape == other[name].shape and torch.equal(one[name], other[name]) for name in one)


def tokens_of(pipe: Any, text: str) -> int:
    return len(pipe.tokenizer(text, add_special_tokens=False).input_ids)


def spoilt(caption: str, start: int) -> str:
    """The caption with every letter from a place on exchanged for another."""
    return caption[:start] + "".join("z" if letter != " " else letter for letter in caption[start:])


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_words_that_are_cut_change_nothing_and_the_one_before_does(name: str) -> None:
    (cuts,) = counter(name).cuts([LONG])
    pipe = PIPELINES[name].build()
    furthest = min(cuts, key=lambda cut: len(cut.words))
    assert LONG.endswith(furthest.words)
    first = len(LONG) - len(furthest.words)
    whole = conditioning(pipe, LONG)
    # of the word in which it is cut some letters may be read
    behind = first + len(furthest.words.split(" ")[0])
    assert same(conditioning(pipe, spoilt(LONG, behind)), whole)
    before = LONG.rindex(" ", 0, first - 1)
    assert not same(conditioning(pipe, spoilt(LONG, before)), whole)


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_every_encoder_is_asked_and_a_short_caption_is_read_by_all(name: str) -> None:
    counting = counter(name)
    (long, short) = counting.cuts([LONG, "a cat"])
    assert [cut.encoder for cut in long] == list(counting.encoders) != []
    assert all(cut.read < cut.of for cut in long)
    assert short == []


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux-dev", "hunyuan-dit-1.2", "qwen-image", "sana", "lumina2"])
def test_a_quick_look_misses_no_caption_that_is_cut(name: str) -> None:
    counting = counter(name)
    captions = [LONG[:length] for length in range(1, 1000, 37)]
    may = counting.may_be_cut(captions)
    cut = [bool(cuts) for cuts in counting.cuts(captions)]
    assert any(cut) and not all(may)
    assert [index for index, is_cut in enumerate(cut) if is_cut and not may[index]] == []
    assert counting.may_be_cut([]) == []


def test_what_one_encoder_reads_and_another_does_not() -> None:
    (cuts,) = counter("flux-dev").cuts(["cat " * 60])
    assert [(cut.encoder, cut.read) for cut in cuts] == [("text_encoder", 32)]


def test_a_new_word_counts_with_all_its_vectors() -> None:
    pipe = random_pocket_pipeline()
    counting = TokenCounter(pipe, WordsConfig(starts={"<zqx>": "red"}, vectors=4))
    (whole, cut) = counting.cuts(["red " * 26 + "<zqx>", "red " * 27 + "<zqx> dog"])
    assert whole == []
    assert cut[0].of == 27 + 4 + tokens_of(pipe, "dog") + 2
    assert cut[0].words.endswith("dog")


def test_weights_are_no_words_and_escapes_one_sign() -> None:
    pipe = random_pocket_pipeline()
    counting, total = TokenCounter(pipe, WordsConfig()), 30 + tokens_of(pipe, "dog") + 2
    assert counting.said(r"(red:1.2) \(dog\)") == "red (dog)"
    assert list(counting.cuts(["(red:1.2) " * 15 + "dog"])) == [[]]
    assert list(counting.cuts(["(red:1.2) " * 30 + "dog"])) == [[Cut("text_encoder", 32, total, "dog")]]
