"""What a browser sends is checked again on the server."""

import math
from dataclasses import replace

import pytest

from dora_diffusion.generation import GenerationSettings
from ui.request import AdapterChoice, Parts, SlotValues, check_adapters, check_settings

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
    expected = (AdapterChoice("ink", 0.5), AdapterChoice("apart", {"unet": -2.0, "text_encoder": 0.0}))
    assert check_adapters(slots, POCKET) == expected


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
