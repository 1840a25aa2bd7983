"""Adapters that are DoRA in part: kept layer by layer by every format that can, and refused in one line by the rest."""

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dora_diffusion.formats import FORMATS, load_adapter, save_adapter
from dora_diffusion.state import AdapterState
from tests.families.pipelines import PIPELINES
from tests.formats.adapters import Make, dense, dora, layers_of, lora, place
from tests.tolerances import assert_near

ROUNDED = 1e-6  # of the largest number: a scale folded into B is rounded to fp32, all else is fp64
COMPONENTS = {
    "sd1": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
    "sd3": ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"),
    "flux-dev": ("transformer", "text_encoder", "text_encoder_2"),
}
# Their makers' q, k and v are one layer, which has magnitudes or has none.
HAS_FUSED = ("sd3", "flux-dev")


@cache
def weights_of(name: str) -> Mapping[str, Tensor]:
    return dict(layers_of(PIPELINES[name].build(), COMPONENTS[name]))


def is_text(path: str) -> bool:
    return path.startswith("text_encoder")


def every_other(path: str, number: int) -> Make | None:
    return dora if number % 2 else lora


def every_other_block(path: str, number: int) -> Make | None:
    block = re.search(r"\.(\d+)\.", path)
    return dora if block and int(block[1]) % 2 else lora


def text_alone(path: str, number: int) -> Make | None:
    return dora if is_text(path) else None


def denoiser_alone(path: str, number: int) -> Make | None:
    return None if is_text(path) else dora


def plain_text(path: str, number: int) -> Make | None:
    return lora if is_text(path) else dora


def plain_denoiser(path: str, number: int) -> Make | None:
    return dora if is_text(path) else lora


def blocks_of_the_denoiser(path: str, number: int) -> Make | None:
    return None if is_text(path) else every_other_block(path, number)


CASES: Mapping[str, Callable[[str, int], Make | None]] = {
    "every other layer": every_other,
    "every other block": every_other_block,
    "every other block of the denoiser": blocks_of_the_denoiser,
    "text encoders alone": text_alone,
    "denoiser alone": denoiser_alone,
    "plain text encoders": plain_text,
    "plain denoiser": plain_denoiser,
}


@cache
def adapter(name: str, case: str) -> AdapterState:
    generator = torch.Generator().manual_seed(0)
    made = {
        path: make(weight, generator)
        for number, (path, weight) in enumerate(weights_of(name).items())
        if (make := CASES[case](path, number)) is not None
    }
    return AdapterState(made)


def refusal(name: str, case: str, format: str) -> str | None:
    """How the format says that it cannot hold the adapter; None where it holds it."""
    if format in ("diffusers", "peft") and case.startswith("every other"):
        return r"a plain LoRA among DoRA layers, which PEFT and diffusers cannot hold apart .*to_dora"
    if format == "original" and "denoiser" not in case.removeprefix("plain denoiser"):
        return "the original format has no name for text_encoder"
    if (
        format == "old-diffusers"
        and name not in ("sd1", "sdxl")
        and (name, case) != ("flux-dev", "text encoders alone")
    ):
        return "the old-diffusers format has no name for (transformer|text_encoder_3) of "  # nobody reads these so
    if format == "old-diffusers":
        return "this format holds plain LoRA only, and the layer is a DoRA; make a LoRA first"
    if format == "comfyui" and case == "text encoders alone" and name in ("sd1", "sdxl"):
        return "the comfyui format has no name for text_encoder of an unknown family"
    if format in ("kohya", "comfyui") and case == "every other layer" and name in HAS_FUSED:
        return r"has a magnitude and .* has none"
    return None


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", COMPONENTS)
def test_layers_stay_what_they_are_or_the_format_refuses(tmp_path: Path, name: str, case: str, format: str) -> None:
    original, weights = adapter(name, case), weights_of(name)
    expected = refusal(name, case, format)
    if expected is not None:
        with pytest.raises(ValueError, match=expected) as caught:
            save_adapter(original, place(tmp_path, format), format=format)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())
        return
    read = load_adapter(save_adapter(original, place(tmp_path, format), format=format))
    assert read.modules.keys() == original.modules.keys()
    assert not read.extra and not read.vectors
    for path, module in original.modules.items():
        got, expected_weight = read.modules[path], dense(weights[path], module)
        assert (got.magnitude is None) == (module.magnitude is None), path
        assert_near(dense(weights[path], got), expected_weight, ROUNDED)


@pytest.mark.parametrize("format", ["kohya", "comfyui", "omi"])
def test_a_t5_alone_is_still_the_encoder_that_it_was(tmp_path: Path, format: str) -> None:
    """T5 is FLUX's second text encoder and Stable Diffusion 3's third; the file's keys do not say which."""
    for name, component in {"flux-dev": "text_encoder_2", "sd3": "text_encoder_3"}.items():
        whole = adapter(name, "text encoders alone")
        original = AdapterState(
            {path: module for path, module in whole.modules.items() if path.startswith(f"{component}.")},
            {"dora_diffusion.family": PIPELINES[name].family},
        )
        read = load_adapter(save_adapter(original, place(tmp_path, format, name), format=format))
        assert read.components == (component,)
        assert read.modules.keys() == original.modules.keys()
