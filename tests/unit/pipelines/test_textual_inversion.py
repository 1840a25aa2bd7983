"""New words: they change prompts that hold them and nothing else, reload everywhere, and leave without a trace."""

from typing import Any

import pytest
import torch

from dora_diffusion.families import family_of_pipeline
from dora_diffusion.pipelines.textual_inversion import (
    ExtendedEmbedding,
    WordState,
    add_words,
    install_words,
    load_word,
    save_words,
)
from tests.families.pipelines import PIPELINES
from tests.tolerances import assert_close, assert_identical

WITH_CLIP = ("sd1", "sdxl", "sd3-without-t5")  # T5 reads any word by its letters


def encoded(pipe: Any, caption: str) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return dict(family_of_pipeline(pipe).encode(pipe, [caption]))


def random_vectors(words: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in words.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", WITH_CLIP)
def test_a_word_starts_as_its_start_text_changes_its_captions_alone_and_leaves_no_trace(name) -> None:
    pipe = PIPELINES[name].build()
    tokenizer, start = pipe.tokenizer, "cat"
    if len(tokenizer(start, add_special_tokens=False).input_ids) > 1:
        pytest.fail("the start text must be one token for this test")
    before = {caption: encoded(pipe, caption) for caption in ("a cat", "a castle", "a <zqx>")}
    models = [getattr(pipe, n) for n in ("text_encoder", "text_encoder_2") if hasattr(pipe, n)]
    embeddings = [model.get_input_embeddings() for model in models]
    words = add_words(pipe, {"<zqx>": start})
    assert_close(encoded(pipe, "a <zqx>"), before["a cat"])
    random_vectors(words)
    assert_identical(encoded(pipe, "a castle"), before["a castle"])
    changed = encoded(pipe, "a <zqx>")
    assert all((changed[key] - before["a cat"][key]).abs().max() > 1e-3 for key in changed)
    words.remove()
    assert pipe.tokenizer is tokenizer
    assert all(model.get_input_embeddings() is old for model, old in zip(models, embeddings, strict=True))
    for caption, tensors in before.items():
        assert_identical(encoded(pipe, caption), tensors)


def test_pooled_text_ends_where_it_ends_under_configs_that_take_the_highest_id() -> None:
    pipe = PIPELINES["sdxl"].build()
    legacy = [m for m in pipe.text_encoder_2.modules() if hasattr(m, "eos_token_id")]
    for module in legacy:
        module.eos_token_id = 2
    expected = encoded(pipe, "a cat on a red")
    words = add_words(pipe, {"<zqx>": "cat"})
    assert_close(encoded(pipe, "a <zqx> on a red"), expected)
    words.remove()
    assert all(module.eos_token_id == 2 for module in legacy)


@pytest.mark.parametrize("name", ("sd1", "sdxl"))
def test_plain_diffusers_encodes_the_same_from_the_file(name, tmp_path) -> None:
    pipe, plain = PIPELINES[name].build(), PIPELINES[name].build()
    words = add_words(pipe, {"<zqx>": "cat castle red"}, vectors=3)
    random_vectors(words)
    (path,) = save_words(words.state(), tmp_path)
    assert path.name == "zqx.safetensors"
    if name == "sd1":
        plain.load_textual_inversion(str(path))
    else:
        from safetensors.torch import load_file

        file = load_file(path)
        plain.load_textual_inversion(file["clip_l"], token="<zqx>")
        plain.load_textual_inversion(
            file["clip_g"], token="<zqx>", text_encoder=plain.text_encoder_2, tokenizer=plain.tokenizer_2
        )
    assert_close(encoded(plain, "a <zqx> on red"), encoded(pipe, "a <zqx> on red"))


def test_a_saved_word_reloads_bit_for_bit_under_any_name(tmp_path) -> None:
    pipe = PIPELINES["sdxl"].build()
    words = add_words(pipe, {"<zqx>": "cat", "<ink>": "red"}, vectors=2)
    random_vectors(words)
    expected = encoded(pipe, "a <zqx> in <ink>")
    files = save_words(words.state(), tmp_path)
    words.remove()
    again = install_words(pipe, [load_word(path) for path in files])
    assert again.names == ("<zqx>", "<ink>")
    assert_identical(encoded(pipe, "a <zqx> in <ink>"), expected)
    again.remove()
    renamed = install_words(pipe, [load_word(files[0], word="robo"), load_word(files[1])])
    assert_identical(encoded(pipe, "a robo in <ink>"), expected)
    renamed.remove()


def test_gradients_reach_the_vectors_and_nothing_else() -> None:
    pipe = PIPELINES["sdxl"].build()
    words = add_words(pipe, {"<zqx>": "cat"})
    sum(tensor.square().sum() for tensor in family_of_pipeline(pipe).encode(pipe, ["a <zqx>"]).values()).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in words.parameters())
    assert all(parameter.grad is None for parameter in pipe.text_encoder.get_input_embeddings().base.parameters())


@pytest.mark.parametrize(
    ("starts", "vectors", "complaint"),
    [
        ({"cat": "cat"}, 1, "has it already"),
        ({"two words": "cat"}, 1, "no spaces"),
        ({"<zqx>": ""}, 1, "to start from"),
    ],
)
def test_words_that_cannot_be_are_refused_and_change_nothing(starts, vectors, complaint) -> None:
    pipe = PIPELINES["sd1"].build()
    tokenizer = pipe.tokenizer
    vocabulary = pipe.tokenizer.get_vocab()
    if complaint == "has it already":
        starts = {min(word for word in vocabulary if word.isalpha() and word.islower()): "cat"}
    with pytest.raises(ValueError, match=complaint):
        add_words(pipe, starts, vectors=vectors)
    assert pipe.tokenizer is tokenizer and not isinstance(pipe.text_encoder.get_input_embeddings(), ExtendedEmbedding)


def test_other_refusals_are_one_line(tmp_path) -> None:
    pipe = PIPELINES["sd3"].build()
    with pytest.raises(ValueError, match="one vector only"):
        add_words(pipe, {"<zqx>": "cat"}, vectors=2)
    words = add_words(pipe, {"<zqx>": "cat"})
    with pytest.raises(ValueError, match="holds new words already"):
        add_words(pipe, {"<ink>": "cat"})
    (path,) = save_words(words.state(), tmp_path)
    with pytest.raises(ValueError, match="another base model"):
        install_words(PIPELINES["sd1"].build(), [load_word(path)])
    with pytest.raises(ValueError, match="no CLIP text encoder"):
        add_words(PIPELINES["sd3-t5-alone"].build(), {"<zqx>": "cat"})
    words.remove()
    bare = WordState("<a>", (torch.zeros(1, 16), torch.zeros(2, 24)))
    from dora_diffusion.utils.atomic import save_tensors

    save_tensors({"clip_l": bare.vectors[0], "clip_g": bare.vectors[1]}, tmp_path / "a.safetensors", {})
    with pytest.raises(ValueError, match="as many vectors"):
        load_word(tmp_path / "a.safetensors")


def test_words_that_would_share_a_file_or_a_spelling_are_kept_apart(tmp_path) -> None:
    vectors = (torch.zeros(1, 16),)
    files = save_words([WordState(word, vectors) for word in ("<a.b>", "<a-b>", "<кот>", "<пёс>")], tmp_path)
    assert [path.name for path in files] == [
        "a-b.safetensors",
        "a-b-2.safetensors",
        "word.safetensors",
        "word-2.safetensors",
    ]
    assert [load_word(path).word for path in files] == ["<a.b>", "<a-b>", "<кот>", "<пёс>"]
    pipe = PIPELINES["sd1"].build()
    twice = [WordState("<a>", vectors), WordState("<a>", vectors)]
    with pytest.raises(ValueError, match="'<a>': two words are spelt so"):
        install_words(pipe, twice)
    with pytest.raises(ValueError, match="'<a>_1': two words are spelt so"):
        install_words(pipe, [WordState("<a>", (torch.zeros(2, 16),)), WordState("<a>_1", vectors)])
    with pytest.raises(ValueError, match="no capitals"):
        add_words(pipe, {"<Zqx>": "cat"})
    with pytest.raises(ValueError, match="one vector only"):
        install_words(PIPELINES["sd3"].build(), [WordState("<a>", (torch.zeros(2, 16), torch.zeros(2, 24)))])


def test_known_vectors_are_not_lost_to_weights_that_are_away() -> None:
    pipe = PIPELINES["sd1"].build()
    pipe.text_encoder.to("meta")
    with pytest.raises(ValueError, match="sequential CPU offload"):
        install_words(pipe, [WordState("<a>", (torch.zeros(1, 16),))])
