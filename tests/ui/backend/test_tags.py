"""Tags of the prompt become adapters beside those of the rack."""

from dataclasses import replace

import pytest

from dora_diffusion.generation.generate import GenerationSettings
from ui.backend.request import AdapterChoice, BaseParts, DrawRequest, SlotValues, check_adapters
from ui.backend.tags import resolve_tags

POCKET = BaseParts("unet", ("text_encoder",))
SLOT = SlotValues.of("ink", 0.5)


def _tagged(prompt: str, *adapters: AdapterChoice) -> DrawRequest:
    return DrawRequest(GenerationSettings(prompt), adapters)


def test_tags_become_adapters() -> None:
    names = ("ink", "Toys/Lego", "a/wool", "b/wool")
    parts = BaseParts("transformer", ("text_encoder", "text_encoder_2"))
    resolved = resolve_tags(_tagged("a <lora:lego:-0.5> cat <lora:INK:0.25:1> <lora:a/wool:0>"), names, parts)
    assert resolved.request.settings.prompt == "a cat"
    apart = {"text_encoder": 0.25, "text_encoder_2": 0.25, "transformer": 1.0}
    assert resolved.request.adapters == (AdapterChoice("Toys/Lego", -0.5), AdapterChoice("ink", apart))
    rack = AdapterChoice("ink", 0.125)
    assert resolve_tags(_tagged("<lora:ink:2>", rack), names, parts).request.adapters == (rack,)
    plain = _tagged("a  cat ")
    assert resolve_tags(plain, names, parts).request == plain


@pytest.mark.parametrize(
    ("slots", "drawn"),
    [
        ((SLOT,), {"ink": 0.5}),
        ((replace(SLOT, strength=0),), {}),
        ((replace(SLOT, apart=True, denoiser=0, text_encoders=0),), {}),
        ((replace(SLOT, enabled=False),), {"ink": 2.0}),
        ((SLOT, replace(SLOT, file="lego", solo=True)), {"lego": 0.5, "ink": 2.0}),
        ((replace(SLOT, strength=0, solo=True), replace(SLOT, file="lego")), {}),
    ],
    ids=["on", "at 0", "apart at 0", "off", "silenced by solo", "solo at 0"],
)
def test_a_slot_that_takes_part_counts_before_a_tag(slots: tuple[SlotValues, ...], drawn: dict[str, float]) -> None:
    request = _tagged("<lora:ink:2>", *check_adapters(slots, POCKET))
    resolved = resolve_tags(request, ("ink", "lego"), POCKET)
    assert {choice.file: choice.weight for choice in resolved.request.adapters} == drawn
    assert resolved.tagged == (AdapterChoice("ink", 2.0),)


@pytest.mark.parametrize(
    ("prompt", "weight"),
    [
        ("<lora:ink:1><lora:ink:.5>", 1.5),
        ("<lora:ink:0><LORA:Ink:2>", 2.0),
        ("<lora:ink:0.5><lora:ink:0.25:1>", {"unet": 1.5, "text_encoder": 0.75}),
        ("<lora:ink:0.25:1><lora:ink:0.5:-1>", {"unet": 0.0, "text_encoder": 0.75}),
        ("<lora:ink:unet=1/unet.mid_block=0.5><lora:ink:denoiser=0.5>", {"unet": 1.5, "unet.mid_block": 1.0}),
        ("<lora:ink:unet=1><lora:ink:text_encoder=0.5>", {"unet": 1.0, "text_encoder": 0.5}),
    ],
)
def test_the_strengths_of_several_tags_are_added(prompt: str, weight: float | dict[str, float]) -> None:
    resolved = resolve_tags(_tagged(prompt), ("ink",), POCKET)
    assert resolved.request.adapters == resolved.tagged == (AdapterChoice("ink", weight),)
    rack = AdapterChoice("ink", 0.125)
    assert resolve_tags(_tagged(prompt, rack), ("ink",), POCKET).request.adapters == (rack,)


def test_two_tags_that_end_each_other_draw_nothing() -> None:
    resolved = resolve_tags(_tagged("<lora:ink:1><lora:ink:-1>"), ("ink",), POCKET)
    assert resolved.request.adapters == () and resolved.tagged == (AdapterChoice("ink", 0.0),)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<lora:inc>", "prompt: no adapter named 'inc' for <lora:...>; nearest: ink"),
        ("<lora:zzzzzz>", "prompt: no adapter named 'zzzzzz' for <lora:...>; there are 3 adapters"),
        ("<lora:wool>", "prompt: <lora:wool> may be any of a/wool, b/wool; write one of these"),
        ("<lora:ink:3>", "prompt, <lora:ink>: got 3.0, expected a number from -2 to 2"),
        (
            "<lora:ink:2><lora:INK:1>",
            "prompt, the 2 tags of ink together: got 3.0, expected a number from -2 to 2",
        ),
        (
            "<lora:ink:unet=1/denoiser=.5>",
            "prompt, <lora:ink>: 'denoiser' is 'unet' again; expected each part once",
        ),
        (r"<lora:a\:b>", "prompt: no adapter named 'a:b' for <lora:...>; there are 3 adapters"),
        ("<lora:ink:nan>", "prompt, <lora:ink>: got nan, expected a number from -2 to 2"),
    ],
)
def test_bad_tags(prompt: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        resolve_tags(_tagged(prompt), ("ink", "a/wool", "b/wool"), POCKET)
    assert str(caught.value) == message


def test_tags_in_the_negative_prompt_are_refused() -> None:
    with pytest.raises(ValueError, match="^negative prompt: holds a <lora:...> tag"):
        resolve_tags(DrawRequest(GenerationSettings("a", "<lora:ink:1>")), ("ink",), POCKET)
