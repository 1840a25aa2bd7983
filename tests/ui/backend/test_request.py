"""What a browser sends is checked again on the server."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dora_diffusion.generation.generate import GenerationSettings
from ui.backend.request import (
    AdapterChoice,
    BaseParts,
    Block,
    DetailValues,
    DrawRequest,
    SlotValues,
    check_adapters,
    check_settings,
)

GOOD = {"prompt": " a cat ", "negative": None, "seed": 7, "steps": 20, "guidance": 4}
POCKET = BaseParts("unet", ("text_encoder",))
SLOT = SlotValues.of("ink", 0.5)


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
    parts = BaseParts("transformer", ("text_encoder", "text_encoder_2"))
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


PARTS = BaseParts("unet", ("text_encoder",), (Block("down", ("unet.down_blocks",)), Block("up", ("unet.a", "unet.b"))))
DOT = Image.new("L", (4, 4), 255)


def test_details_of_the_form() -> None:
    details = DetailValues(sampler="euler a", width=512, height=64.0, strength=0.5)
    settings = check_settings(**GOOD, details=details)
    assert (settings.sampler, settings.width, settings.height, settings.strength) == ("euler a", 512, 64, 0.5)
    assert check_settings(**GOOD, details=DetailValues(sampler=None, width=0)) == check_settings(**GOOD)


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


def test_what_is_at_strength_0_needs_no_mode() -> None:
    silent = AdapterChoice("ink", {"unet": 0.0}, ((0.0, 1.0),))
    assert DrawRequest(GenerationSettings("a"), (silent,), "peft").adapters == (silent,)
