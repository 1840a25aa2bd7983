"""Words that adapter files bundle: read while their adapter has a strength, gone without a trace, never by halves."""

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.families import family_of_pipeline
from dora_diffusion.formats import FORMATS, examine, load_adapter, save_adapter
from dora_diffusion.formats.dialects import PEFT_FILE
from dora_diffusion.inspection.header import summarise_header
from dora_diffusion.inspection.report import describe, inspect_adapter
from dora_diffusion.pipelines.textual_inversion import ExtendedEmbedding, WordState, bundled_words, install_words
from dora_diffusion.state import AdapterState, ModuleState
from tests.families.pipelines import PIPELINES
from tests.pocket_random import random_adapter, random_pocket_pipeline
from tests.tolerances import assert_close, assert_identical

WORD = "<zqx>"


@pytest.fixture
def pipe() -> Any:
    return random_pocket_pipeline()


def vectors(pipe: Any, count: int = 2, seed: int = 0, name: str = "text_encoder") -> Tensor:
    width = getattr(pipe, name).get_input_embeddings().weight.shape[1]
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def bundled(pipe: Any, extra: dict[str, Tensor]) -> AdapterState:
    """An adapter that changes nothing but its words."""
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    out, columns = pipe.unet.get_submodule(path.removeprefix("unet.")).weight.shape
    return AdapterState({path: ModuleState(torch.ones(1, columns), torch.zeros(out, 1), 1.0)}, extra=extra)


def encoded(pipe: Any, caption: str) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(family_of_pipeline(pipe).encode(pipe, [caption]))


@pytest.mark.parametrize("part", ["clip_l", "string_to_param.*", "emb_params", WORD])
def test_a_word_is_read_while_its_adapter_has_a_strength(pipe: Any, part: str) -> None:
    tokenizer, embedding = pipe.tokenizer, pipe.text_encoder.get_input_embeddings()
    before = {caption: encoded(pipe, caption) for caption in (f"a {WORD} red", "a castle")}
    by_hand = install_words(pipe, [WordState(WORD, (vectors(pipe),))])
    wanted = encoded(pipe, f"a {WORD} red")
    by_hand.remove()
    manager = AdapterManager(pipe)
    report = manager.load_adapter(bundled(pipe, {f"bundle_emb.{WORD}.{part}": vectors(pipe)}), name="ink")
    assert (report.words, report.notes, report.extra) == ((WORD,), (), 0)
    assert f"new words {WORD}" in repr(report)
    assert_identical(encoded(pipe, f"a {WORD} red"), before[f"a {WORD} red"])  # at strength 0
    for weight in (1.0, {"unet": 0.5}):
        manager.set_adapters({"ink": weight})
        assert_identical(encoded(pipe, f"a {WORD} red"), wanted)
        assert_identical(encoded(pipe, "a castle"), before["a castle"])
    manager.fuse()
    assert_identical(encoded(pipe, f"a {WORD} red"), wanted)
    manager.unfuse()
    manager.set_adapters({"ink": 1.0}, blend="peft")
    assert_identical(encoded(pipe, f"a {WORD} red"), wanted)
    for leave in (lambda: manager.set_adapters({"ink": 0.0}), lambda: manager.delete_adapter("ink"), manager.unload):
        leave()
        assert pipe.tokenizer is tokenizer and pipe.text_encoder.get_input_embeddings() is embedding
        assert_identical(encoded(pipe, f"a {WORD} red"), before[f"a {WORD} red"])


def test_an_adapter_of_the_embedding_itself_keeps_its_place_under_the_words(pipe: Any) -> None:
    table = pipe.text_encoder.get_input_embeddings()
    rows, width = table.weight.shape
    change = ModuleState(torch.randn(2, rows), torch.randn(width, 2), 2.0)
    path = next(f"text_encoder.{name}" for name, module in pipe.text_encoder.named_modules() if module is table)
    extra = {f"bundle_emb.{WORD}.clip_l": vectors(pipe)}
    manager = AdapterManager(pipe)
    try:
        manager.load_adapter(AdapterState({path: change}, extra=extra), name="ink")
    except ValueError as error:
        assert "embedding" in str(error).lower() or "layer" in str(error)
    else:
        for _ in range(2):
            manager.set_adapters({"ink": 1.0})
            manager.fuse()
            manager.unfuse()
    manager.unload()
    assert pipe.text_encoder.get_input_embeddings() is table


def test_words_of_several_adapters_and_of_people_stand_together(pipe: Any) -> None:
    mine = install_words(pipe, [WordState("<mine>", (vectors(pipe, seed=1),))])
    mine_alone = encoded(pipe, "a <mine>")
    manager = AdapterManager(pipe)
    manager.load_adapter(random_adapter(pipe), name="plain")
    for number, word in enumerate(("<one>", "<two>")):
        state = bundled(pipe, {f"bundle_emb.{word}.clip_l": vectors(pipe, seed=number)})
        manager.load_adapter(state, name=word)
    manager.set_adapters({"<two>": 1.0})
    assert_identical(encoded(pipe, "a <mine>"), mine_alone)
    two = encoded(pipe, "a <two>")
    manager.set_adapters({"<one>": 1.0, "<two>": 1.0})
    assert_identical(encoded(pipe, "a <two>"), two)
    with pytest.raises(ValueError, match="^<mine>: adapters brought further words after these; unload them first$"):
        mine.remove()
    manager.delete_adapter("<one>")
    assert_identical(encoded(pipe, "a <two>"), two)
    manager.unload()
    assert_identical(encoded(pipe, "a <mine>"), mine_alone)
    mine.remove()
    assert not isinstance(pipe.text_encoder.get_input_embeddings(), ExtendedEmbedding)


def test_two_adapters_with_one_word_are_refused_together(pipe: Any) -> None:
    manager = AdapterManager(pipe)
    for name, word in (("a", WORD), ("b", WORD.upper())):
        manager.load_adapter(bundled(pipe, {f"bundle_emb.{word}.clip_l": vectors(pipe)}), name=name)
    manager.set_adapters({"a": 1.0})
    wanted = encoded(pipe, f"a {WORD}")
    with pytest.raises(ValueError, match="^'a' and 'b' both bring the new word '<ZQX>'; leave one out$"):
        manager.set_adapters({"a": 1.0, "b": 0.5})
    assert manager.weights == {"a": 1.0}
    assert_identical(encoded(pipe, f"a {WORD}"), wanted)
    manager.set_adapters({"b": 1.0})
    manager.unload()


def test_what_is_not_read_is_told(pipe: Any) -> None:
    taken = min(word for word in pipe.tokenizer.get_vocab() if word.isalpha() and word.islower())
    extra = {
        f"bundle_emb.{taken.upper()}.clip_l": vectors(pipe),
        f"bundle_emb.{WORD}.t5": torch.randn(2, 4096),
        "bundle_emb.<good>.clip_l": vectors(pipe),
        "bundle_emb.<good>.clip_l_out": vectors(pipe),
        "odd": torch.zeros(1),
    }
    report = AdapterManager(pipe).load_adapter(bundled(pipe, extra), name="ink")
    assert report.words == ("<good>",) and report.extra == 1
    assert report.notes == (
        f"new word {taken.upper()!r} is kept and not used: prompts have a word of that name already",
        f"new word {WORD!r} is kept and not used: it has no vectors for text_encoder",
        "new word '<good>': its vectors for clip_l_out are kept and not used",
    )
    without_clip = PIPELINES["sd3-t5-alone"].build()
    assert bundled_words(without_clip, {f"bundle_emb.{WORD}.t5": torch.randn(2, 8)}) == (
        (),
        (f"new word {WORD!r} is kept and not used: sd3: this pipeline has no CLIP text encoder, which new words need",),
    )


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux-dev"])
def test_every_encoder_gets_its_own_vectors(name: str) -> None:
    pipe = PIPELINES[name].build()
    encoders = {"sdxl": ("clip_l", "clip_g"), "sd3": ("clip_l", "clip_g"), "flux-dev": ("clip_l",)}[name]
    components = ("text_encoder", "text_encoder_2")[: len(encoders)]
    own = [vectors(pipe, 1, number, part) for number, part in enumerate(components)]
    extra = {f"bundle_emb.{WORD}.{key}": vector for key, vector in zip(encoders, own, strict=True)}
    words, notes = bundled_words(pipe, dict(reversed(extra.items())))
    assert notes == () and [state.word for state in words] == [WORD]
    assert all(torch.equal(found, vector) for found, vector in zip(words[0].vectors, own, strict=True))
    if len(encoders) > 1:
        assert bundled_words(pipe, {f"bundle_emb.{WORD}.clip_l": own[0]})[1] == (
            f"new word {WORD!r} is kept and not used: it has no vectors for text_encoder_2",
        )


@pytest.mark.parametrize(
    ("tensor", "complaint"),
    [
        (torch.zeros(2, 3), r"<zqx>: vectors of width \[3\], expected \[\d+\]; is it for another base model\?"),
        (torch.zeros(2, 3, 4), r"new word '<zqx>': expected vectors \(count, width\), got \(2, 3, 4\)"),
        (torch.zeros(2, 3, dtype=torch.int64), r"new word '<zqx>': expected vectors"),
    ],
)
def test_vectors_that_are_none_are_refused_as_the_adapter_is_loaded(pipe: Any, tensor: Tensor, complaint: str) -> None:
    manager = AdapterManager(pipe)
    with pytest.raises(ValueError, match=f"^ink: {complaint}"):
        manager.load_adapter(bundled(pipe, {f"bundle_emb.{WORD}.clip_l": tensor}), name="ink")
    assert manager.names == ()


def test_an_encoder_that_was_replaced_is_left_alone(pipe: Any) -> None:
    manager = AdapterManager(pipe)
    manager.load_adapter(bundled(pipe, {f"bundle_emb.{WORD}.clip_l": vectors(pipe)}), name="ink")
    manager.set_adapters({"ink": 1.0})
    wanted = encoded(pipe, f"a {WORD}")
    other = random_pocket_pipeline()
    old, tokenizer = pipe.text_encoder, other.tokenizer
    pipe.text_encoder, pipe.tokenizer = other.text_encoder, other.tokenizer
    manager.set_adapters({"ink": 1.0})
    assert not isinstance(old.get_input_embeddings(), ExtendedEmbedding)
    assert_close(encoded(pipe, f"a {WORD}"), wanted)  # the same weights
    manager.unload()
    assert pipe.tokenizer is tokenizer


@pytest.mark.parametrize("format", [name for name, dialect in FORMATS.items() if name not in ("original",)])
def test_words_are_told_and_written_in_every_format(pipe: Any, format: str, tmp_path: Any) -> None:
    extra = {f"bundle_emb.{WORD}.clip_l": vectors(pipe)}
    state = bundled(pipe, extra)
    if format in ("comfyui", "omi"):
        pytest.skip("a tiny model has no original names")
    path = tmp_path / ("ink" if FORMATS[format] is PEFT_FILE else "ink.safetensors")
    save_adapter(state, path, format=format)
    assert_identical(dict(load_adapter(path).extra), extra)
    facts = inspect_adapter(path)
    assert facts["words"] == [WORD] and facts["unknown"] == [] and facts["keys_matched"] == facts["keys"]
    assert f"new words        {WORD}" in describe(facts)


def test_a_header_tells_the_words(tmp_path: Any) -> None:
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    keys = {f"{layer}.lora_down.weight": torch.ones(2, 8), f"{layer}.lora_up.weight": torch.ones(8, 2)}
    save_file({**keys, f"bundle_emb.{WORD}.clip_l": torch.ones(2, 8)}, tmp_path / "a.safetensors")
    examined = examine(tmp_path / "a.safetensors")
    assert (examined.words, examined.unknown, examined.matched) == ((WORD,), (), 3)
    found = summarise_header(tmp_path / "a.safetensors")
    assert found.structure.words == (WORD,) and found.declared.triggers == (WORD,)
