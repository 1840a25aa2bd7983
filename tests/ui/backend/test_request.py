"""What a browser sends is checked again on the server."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dora_diffusion.generation.generate import GenerationSettings
from ui.backend.request import (
    AdapterChoice,
    Block,
    DetailValues,
    DrawRequest,
    Parts,
    SlotValues,
    check_adapters,
    check_canvas,
    check_settings,
    curve_text,
    parse_curve,
)
from ui.backend.tags import resolve_tags

GOOD = {"prompt": " a cat ", "negative": None, "seed": 7, "steps": 20, "guidance": 4}
POCKET = Parts("unet", ("text_encoder",))
SLOT = SlotValues("ink", True, 0.5, False, 1.0, 1.0)


def test_good_settings() -> None:
    assert check_settings(**GOOD) == GenerationSettings("a cat", "", seed=7, steps=20, guidance_scale=4.0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt", 7, "prompt: got 7, expected text"),
        ("prompt", "x" * 2001, "prompt: got 2001 characters, expected at most 2000"),
        ("negative", ["a"], "negative prompt: got ['a'], expected text"),
        ("seed", None, "seed: got nothing, expected a whole number from 0 to 4294967295"),
        ("seed", -1, "seed: got -1, expected a whole number from 0 to 4294967295"),
        ("steps", 101, "steps: got 101, expected a whole number from 1 to 100"),
        ("steps", 2.5, "steps: got 2.5, expected a whole number from 1 to 100"),
        ("steps", math.nan, "steps: got nan, expected a whole number from 1 to 100"),
        ("steps", True, "steps: got True, expected a whole number from 1 to 100"),
        ("guidance", math.inf, "guidance: got inf, expected a number from 0 to 30"),
        ("guidance", "4", "guidance: got '4', expected a number from 0 to 30"),
    ],
)
def test_bad_settings_name_the_field(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_settings(**{**GOOD, field: value})
    assert str(caught.value) == message


def test_slots_that_take_part() -> None:
    slots = [
        SLOT,
        replace(SLOT, file="off", enabled=False, strength=99),
        replace(SLOT, file="", strength=99),
        replace(SLOT, file=None),
        replace(SLOT, file="zero", strength=0),
        replace(SLOT, file="apart", apart=True, denoiser=-2, text_encoders=0),
        replace(SLOT, file="zeros", apart=True, denoiser=0, text_encoders=0),
    ]
    apart, zeros = {"unet": -2.0, "text_encoder": 0.0}, {"unet": 0.0, "text_encoder": 0.0}
    expected = (("ink", 0.5, True), ("zero", 0.0, False), ("apart", apart, True), ("zeros", zeros, False))
    taking_part = check_adapters(slots, POCKET)
    assert tuple((choice.file, choice.weight, choice.draws) for choice in taking_part) == expected


def test_strengths_go_to_the_bases_own_parts() -> None:
    slot = replace(SLOT, apart=True, denoiser=0.5, text_encoders=-1)
    parts = Parts("transformer", ("text_encoder", "text_encoder_2"))
    expected = {"transformer": 0.5, "text_encoder": -1.0, "text_encoder_2": -1.0}
    assert check_adapters([slot], parts) == (AdapterChoice("ink", expected),)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([replace(SLOT, strength=2.05)], "slot 1, strength: got 2.05, expected a number from -2 to 2"),
        (
            [replace(SLOT, apart=True, denoiser=math.nan)],
            "slot 1, unet strength: got nan, expected a number from -2 to 2",
        ),
        ([SLOT, replace(SLOT, strength=1)], "ink: in slots 1 and 2, expected each adapter once"),
    ],
)
def test_bad_slots(slots: list[SlotValues], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_adapters(slots, POCKET)
    assert str(caught.value) == message


PARTS = Parts("unet", ("text_encoder",), (Block("down", ("unet.down_blocks",)), Block("up", ("unet.a", "unet.b"))))
DOT = Image.new("L", (4, 4), 255)


def test_details_of_the_form() -> None:
    details = DetailValues(sampler="euler a", width=512, height=64.0, strength=0.5)
    settings = check_settings(**GOOD, details=details)
    assert (settings.sampler, settings.width, settings.height, settings.strength) == ("euler a", 512, 64, 0.5)
    assert check_settings(**GOOD, details=DetailValues(None, 0, None, None)) == check_settings(**GOOD)


@pytest.mark.parametrize(
    ("details", "message"),
    [
        (DetailValues(sampler="best"), "sampler: got 'best', expected one of default, euler, "),
        (DetailValues(sampler=7), "sampler: got 7, expected one of default, euler, "),
        (DetailValues(width=100), "width: got 100, expected a multiple of 8 from 64 to 2048"),
        (DetailValues(height=4096), "height: got 4096, expected a whole number from 64 to 2048"),
        (DetailValues(height=[]), "height: got [], expected a whole number from 64 to 2048"),
        (DetailValues(strength=0), "denoising strength: got 0, expected a number from 0.01 to 1"),
    ],
)
def test_bad_details_name_the_field(details: DetailValues, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_settings(**GOOD, details=details)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "curve"),
    [
        ("", None),
        (None, None),
        ("Constant", None),
        ("fade in", ((0.0, 0.0), (1.0, 1.0))),
        ("0:0, 0.3:1", ((0.0, 0.0), (0.3, 1.0))),
        (" 0.5 : -2 ,", ((0.5, -2.0),)),
    ],
)
def test_curves(text: str | None, curve: object) -> None:
    assert parse_curve(text) == curve
    assert parse_curve(curve_text(parse_curve(text))) == curve


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("up", "curve: got 'up', expected points such as '0:0, 0.3:1' or one of constant, fade in"),
        ("0.5:1, 0.2:0", "curve: progress falls from 0.5 to 0.2; expected it to rise"),
        ("0:nan", "curve, factor: got nan, expected a number from -2 to 2"),
        ("2:1", "curve, progress: got 2.0, expected a number from 0 to 1"),
        (",", "curve: got 0 points, expected 1 to 32"),
        ("0:1," * 33, "curve: got 33 points, expected 1 to 32"),
        (7, "curve: got 7, expected text such as '0:0, 0.3:1'"),
    ],
)
def test_bad_curves(text: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_curve(text)
    assert str(caught.value).startswith(message)


def test_blocks_are_factors_on_the_denoisers_strength() -> None:
    slot = replace(SLOT, blocks=(1.0, 0.5))
    expected = {"unet": 0.5, "text_encoder": 0.5, "unet.a": 0.25, "unet.b": 0.25}
    assert check_adapters([slot], PARTS) == (AdapterChoice("ink", expected),)
    apart = replace(slot, apart=True, denoiser=-1, text_encoders=2, blocks=(0, 1))
    expected = {"unet": -1.0, "text_encoder": 2.0, "unet.down_blocks": 0.0}
    assert check_adapters([apart], PARTS) == (AdapterChoice("ink", expected),)
    assert check_adapters([replace(SLOT, blocks=(1, 1))], PARTS) == (AdapterChoice("ink", 0.5),)
    with pytest.raises(ValueError, match="^slot 1, blocks: got 1 factors, expected 2$"):
        check_adapters([replace(SLOT, blocks=(1,))], PARTS)
    with pytest.raises(ValueError, match="^slot 1, up: got 3, expected a number from -2 to 2$"):
        check_adapters([replace(SLOT, blocks=(1, 3))], PARTS)


def test_curves_masks_and_solo(tmp_path: Path) -> None:
    DOT.convert("RGB").save(tmp_path / "mask.png")
    slots = [
        SLOT,
        replace(SLOT, file="lego", solo=True, curve="late", mask=DOT),
        replace(SLOT, file="clay", solo=True, mask=tmp_path / "mask.png"),
        replace(SLOT, file="off", solo=True, enabled=False),
    ]
    lego, clay = check_adapters(slots, POCKET)
    assert (lego.file, lego.curve, lego.mask) == ("lego", ((0.4, 0.0), (0.6, 1.0)), DOT)
    assert clay.mask is not None and clay.mask.tobytes() == DOT.tobytes()
    with pytest.raises(ValueError, match=r"^slot 1, mask: not a picture that can be read \(FileNotFoundError\)$"):
        check_adapters([replace(SLOT, mask=str(tmp_path / "none.png"))], POCKET)
    with pytest.raises(ValueError, match="^slot 1, mask: got 7, expected a picture$"):
        check_adapters([replace(SLOT, mask=7)], POCKET)  # type: ignore[arg-type]


def test_canvases(tmp_path: Path) -> None:
    assert check_canvas(None) is None
    canvas = check_canvas(DOT, DOT.convert("RGB"))
    assert canvas is not None and (canvas.image.mode, canvas.mask and canvas.mask.mode) == ("RGB", "L")
    with pytest.raises(ValueError, match="^mask: there is no picture to draw in; give one, or take the mask off$"):
        check_canvas(None, DOT)
    with pytest.raises(ValueError, match="^picture: got 9000 x 1 pixels, expected at most 8192 a side$"):
        check_canvas(Image.new("L", (9000, 1)))
    (tmp_path / "x.png").write_text("no picture")
    with pytest.raises(ValueError, match="^picture: not a picture that can be read"):
        check_canvas(tmp_path / "x.png")


def test_modes_refuse_what_moves() -> None:
    settings = check_settings(**GOOD)
    for choice, thing in (
        (AdapterChoice("ink", 1.0, ((0, 1),)), "a curve"),
        (AdapterChoice("ink", 1.0, None, DOT), "a mask"),
    ):
        assert DrawRequest(settings, (choice,)).blend == "additive"
        with pytest.raises(ValueError, match=f"^ink: has {thing}, and the mode 'peft' is folded into the weights"):
            DrawRequest(settings, (choice,), "peft")
    with pytest.raises(ValueError, match="^blend: got 'mix', expected one of additive, "):
        DrawRequest(settings, (), "mix")
    with pytest.raises(ValueError, match="^count: got 17, expected a whole number from 1 to 16$"):
        DrawRequest(settings, count=17)


def _tagged(prompt: str, *adapters: AdapterChoice) -> DrawRequest:
    return DrawRequest(GenerationSettings(prompt), adapters)


def test_tags_become_adapters() -> None:
    names = ("ink", "Toys/Lego", "a/wool", "b/wool")
    parts = Parts("transformer", ("text_encoder", "text_encoder_2"))
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


def test_of_several_tags_the_first_counts() -> None:
    for prompt, drawn in (("<lora:ink:1><lora:ink:2>", (AdapterChoice("ink", 1.0),)), ("<lora:ink:0><lora:ink:2>", ())):
        assert resolve_tags(_tagged(prompt), ("ink",), POCKET).request.adapters == drawn


def test_what_is_at_strength_0_needs_no_mode() -> None:
    silent = AdapterChoice("ink", {"unet": 0.0}, ((0.0, 1.0),))
    assert DrawRequest(GenerationSettings("a"), (silent,), "peft").adapters == (silent,)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<lora:inc>", "prompt: no adapter named 'inc' for <lora:...>; nearest: ink"),
        ("<lora:zzzzzz>", "prompt: no adapter named 'zzzzzz' for <lora:...>; there are 3 adapters"),
        ("<lora:wool>", "prompt: <lora:wool> may be any of a/wool, b/wool; write one of these"),
        ("<lora:ink:3>", "prompt, <lora:ink>: got 3.0, expected a number from -2 to 2"),
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


def test_a_curve_loses_no_digit() -> None:
    curve = ((0.0, -2.0), (1 / 3, 0.123456789), (1.0, 1.0))
    assert parse_curve(curve_text(curve)) == curve


def test_a_picture_by_path_is_upright_and_on_white(tmp_path: Path) -> None:
    turned, clear = Image.new("RGB", (40, 20), "red"), Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn, as phones write it
    turned.save(tmp_path / "turned.jpg", exif=exif)
    clear.save(tmp_path / "clear.png")
    upright, white = check_canvas(tmp_path / "turned.jpg"), check_canvas(tmp_path / "clear.png")
    assert upright is not None and upright.image.size == (20, 40)
    assert white is not None and white.image.getpixel((0, 0)) == (255, 255, 255)
