"""Prompts taken apart as A1111 takes them apart, and words weighed by its rule."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from dora_diffusion.families import family_of_pipeline
from dora_diffusion.generation.generate import GenerationSettings, generate
from dora_diffusion.generation.prompts import (
    LoraTag,
    parse_prompt,
    prompt_arguments,
    token_weights,
    without_foreign_tags,
    written_name,
)
from tests.families.pipelines import PIPELINES
from tests.pocket_random import random_pocket_pipeline
from tests.tolerances import assert_close, assert_identical

SMALL = GenerationSettings("a cat", seed=5, steps=2, guidance_scale=2.0, width=64, height=64)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return random_pocket_pipeline()


@pytest.mark.parametrize(
    ("text", "fragments"),
    [  # the first eight are the examples of A1111's own parser
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("(((house:1.3)) [on] a (hill:0.5), sun", [
            ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun", 1.1),
        ]),
        ("a (b:0.0)", [("a ", 1.0), ("b", 0.0)]),
        ("time 12:30", [("time 12:30", 1.0)]),
        ("[[a]] ] )", [("a", 1 / 1.21), (" ] )", 1.0)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1)]),
        ("", []),
    ],
)  # fmt: skip
def test_fragments(text: str, fragments: list[tuple[str, float]]) -> None:
    parsed = parse_prompt(text).fragments
    assert [said for said, _ in parsed] == [said for said, _ in fragments]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in fragments])


def test_tags() -> None:
    prompt = parse_prompt("a cat <lora:ink:0.8> at sea <lora:my/lego><lora:x:-0.5:1> <lora:y:unet=1/text_encoder=.5>")
    assert prompt.text == prompt.plain == "a cat at sea"
    assert prompt.tags == (
        LoraTag("ink", 0.8),
        LoraTag("my/lego", 1.0),
        LoraTag("x", {"text_encoders": -0.5, "denoiser": 1.0}),
        LoraTag("y", {"unet": 1.0, "text_encoder": 0.5}),
    )
    with pytest.raises(ValueError, match="^prompt: <lora:ink:much> has no number for strength; write <lora:ink:0.8>$"):
        parse_prompt("<lora:ink:much>")
    with pytest.raises(ValueError, match="^prompt: 'cat' has weight 11, expected -10..10$"):
        parse_prompt("(cat:11)")


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("<LORA:ink:1>", LoraTag("ink", 1.0)),
        ("<Lyco: Ink : .5 >", LoraTag("Ink", 0.5)),
        ("< lora :ink>", LoraTag("ink", 1.0)),
        (r"<lora:sd\:ink:0.5>", LoraTag("sd:ink", 0.5)),
        (r"<lora:a\<b\>c:0.5:1>", LoraTag("a<b>c", {"text_encoders": 0.5, "denoiser": 1.0})),
        (r"<lora:folder\ink:0.5>", LoraTag(r"folder\ink", 0.5)),
    ],
)
def test_tags_in_whatever_case_and_with_whatever_name(text: str, tag: LoraTag) -> None:
    prompt = parse_prompt(f"a cat {text}")
    assert (prompt.tags, prompt.text) == ((tag,), "a cat")
    assert parse_prompt(f"<lora:{written_name(tag.name)}>").tags == (LoraTag(tag.name),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<lora:a<b:1>",
            "'<lora:a<b:1>' is no whole tag; expected <lora:NAME:STRENGTH>, where a :, < or > of the name",
        ),
        ("<lora:ink:1", "'<lora:ink:1' is no whole tag; expected"),
        ("<LORA:ink <lora:lego:1>", "'<LORA:ink' is no whole tag; expected"),
        (
            "<lora:ink:1:2:3>",
            "<lora:ink:1:2:3> has 3 strengths, expected one, or two: of text encoders and denoiser; a :",
        ),
        ("<lora:>", "<lora:> names no adapter; expected <lora:NAME:STRENGTH>"),
        ("<lora: :1>", "<lora: :1> names no adapter; expected <lora:NAME:STRENGTH>"),
        ("<lora:sd:ink:1>", "<lora:sd:ink> has no number for strength; write <lora:sd:0.8>"),
        (
            "<lora:ink:unet=1/unet=2>",
            "<lora:ink:unet=1/unet=2> names 'unet' twice; expected one strength for each part",
        ),
        ("<lora:ink:unet=1:2>", "<lora:ink:unet=1> has no number for strength"),
        ("<lora:ink:>", "<lora:ink:> has no number for strength"),
        ("<lora:" + "\\:" * 5000, "'<lora:"),
    ],
)
def test_what_is_nearly_a_tag_is_refused_and_never_said(text: str, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse_prompt(f"a cat {text}")
    assert str(refused.value).startswith(f"prompt: {message}") and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("tag", "kind"),
    [
        ("<hypernet:ink:1>", "hypernet"),
        ("<HYPERNET:ink>", "HYPERNET"),
        ("<segment:face,0.5>", "segment"),
        ("<lora2:x:1>", "lora2"),
    ],
)
def test_tags_for_what_is_not_done_here_are_refused_and_never_said(tag: str, kind: str) -> None:
    for text in (f"a cat {tag}", f"{tag}<lora:ink:1> a cat"):
        with pytest.raises(ValueError) as refused:
            parse_prompt(text)
        assert str(refused.value) == (
            f"prompt: {tag} is a tag for {kind!r}, which is not done here: <lora:NAME:STRENGTH> alone is; leave it out"
        )
    assert without_foreign_tags(f"a cat {tag} <lora:ink:1>") == (
        "a cat <lora:ink:1>",
        (f"{tag} is a tag for {kind!r}, which is not done here: <lora:NAME:STRENGTH> alone is",),
    )


def test_other_angle_brackets_are_words() -> None:
    for text in ("a <zqx> cat", "a < b : c >", "<3 lora: yes>", "a <lo cat", "<: a>", "<3:2>", "a<b: c"):
        assert without_foreign_tags(text) == (text, ())
        assert parse_prompt(text).text == text and not parse_prompt(text).tags


def _a1111(pipe: Any, fragments: list[tuple[str, float]]) -> torch.Tensor:
    """A1111's account: each fragment's own tokens, z *= w, z *= mean before / mean after; for each encoder apart."""
    parts = []
    for suffix in ("", "_2"):
        encoder, tokenizer = getattr(pipe, f"text_encoder{suffix}", None), getattr(pipe, f"tokenizer{suffix}", None)
        if encoder is None:
            continue
        ids, weights = [tokenizer.bos_token_id], [1.0]
        for text, weight in fragments:
            own = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += own
            weights += [weight] * len(own)
        room = tokenizer.model_max_length - len(ids)
        ids += [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (room - 1)
        weights += [1.0] * room
        with torch.no_grad():
            output = encoder(torch.tensor([ids]), output_hidden_states=True)
            z = output.hidden_states[-2] if hasattr(pipe, "text_encoder_2") else output.last_hidden_state
        before = z.mean()
        z = z * torch.tensor(weights)[None, :, None]
        parts.append(z * (before / z.mean()))
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_words_are_weighed_by_the_rule(name: str) -> None:
    tiny_pipe = PIPELINES[name].build()
    family = family_of_pipeline(tiny_pipe)
    _, _, ours = prompt_arguments(tiny_pipe, family, "a cat (on a red:1.4) background [cat]", "")
    fragments = [("a cat ", 1.0), ("on a red", 1.4), (" background ", 1.0), ("cat", 1 / 1.1)]
    assert_close(ours["prompt_embeds"], _a1111(tiny_pipe, fragments))
    plain = family.encode(tiny_pipe, ["a cat on a red background cat"])
    if "text_embeds" in plain:
        assert_identical(ours["pooled_prompt_embeds"], plain["text_embeds"])
    assert not torch.equal(ours["prompt_embeds"], plain["encoder_hidden_states"])
    assert_identical(ours["negative_prompt_embeds"], family.encode(tiny_pipe, [""])["encoder_hidden_states"])


def test_plain_prompts_take_the_pipelines_own_path(pipe: StableDiffusionPipeline) -> None:
    family = family_of_pipeline(pipe)
    assert prompt_arguments(pipe, family, "a cat", "dog") == ("a cat", "dog", {})
    assert prompt_arguments(pipe, family, r"a cat \(grey\)", "(a:1)") == ("a cat (grey)", "a", {})


def test_weights_of_one_draw_the_plain_picture(pipe: StableDiffusionPipeline) -> None:
    plain = generate(pipe, replace(SMALL, prompt="a cat on red"))
    assert generate(pipe, replace(SMALL, prompt="a (cat:1.0) on red")).tobytes() == plain.tobytes()
    weighted = generate(pipe, replace(SMALL, prompt="a (cat:1.5) on red"))
    assert weighted.tobytes() != plain.tobytes()
    assert (
        generate(pipe, replace(SMALL, prompt="a cat on red", negative_prompt="(dog:1.5)")).tobytes() != plain.tobytes()
    )


def test_a_weight_in_the_negative_prompt_alone_leaves_the_prompt(pipe: StableDiffusionPipeline) -> None:
    family = family_of_pipeline(pipe)
    _, _, ours = prompt_arguments(pipe, family, "a cat", "a (dog:1.3)")
    assert_identical(ours["prompt_embeds"], family.encode(pipe, ["a cat"])["encoder_hidden_states"])


def test_tokens_beyond_the_window_are_cut(pipe: StableDiffusionPipeline) -> None:
    weights = token_weights(pipe, pipe.tokenizer, parse_prompt("a " * 200 + "(cat:1.3)"))
    assert weights.shape == (pipe.tokenizer.model_max_length,)
    assert set(weights.tolist()) == {1.0}


def test_families_without_weights_say_so() -> None:
    flux = PIPELINES["flux-dev"].build()
    family = family_of_pipeline(flux)
    assert prompt_arguments(flux, family, "a cat (grey)", "") == ("a cat (grey)", "", {})
    with pytest.raises(
        ValueError, match=r"^prompt: flux cannot weigh words, got \(grey:1.2\); say it in words instead$"
    ):
        prompt_arguments(flux, family, "a cat (grey:1.2)", "")


def test_drawing_loads_no_adapters(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="^prompt: <lora:ink> names an adapter, which drawing does not load"):
        generate(pipe, replace(SMALL, prompt="a cat <lora:ink:0.8>"))
