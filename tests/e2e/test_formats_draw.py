"""The same adapter through every format draws the same picture; two blended in both orders draw the same picture."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dora_diffusion as dd
from dora_diffusion.formats import FORMATS
from dora_diffusion.pipelines.base_weights import weights_of
from dora_diffusion.state import AdapterState
from tests.formats.adapters import adapter_of, dora, lora

SETTINGS = dd.GenerationSettings("a noto style rocket on the beach", steps=3)
BASES = ("pocket", "pocket-dit")
# What cannot name the pocket's layers or hold its text encoder, and says so: its UNet has one resnet a block where
# Stable Diffusion's makers count two, `original` is the denoiser alone, and diffusers had no transformers of old.
REFUSED = {
    ("pocket-dit", "old-diffusers"),
    ("pocket", "comfyui"),
    ("pocket", "omi"),
    ("pocket", "original"),
    ("pocket-dit", "original"),
}


@pytest.fixture(scope="module", params=BASES)
def base(request):
    pipe = dd.load_pipeline(request.param)
    return request.param, pipe


def adapter_for(pipe, kind, seed: int) -> AdapterState:
    """On attention and the text encoders' projections, strong enough to change the picture; alpha is not the rank."""
    weight_of = weights_of(pipe)
    layers = [path for path in weight_of.paths() if ".to_" in path or (path.startswith("text") and "_proj" in path)]
    return adapter_of([(path, weight_of(path).float()) for path in layers], kind, seed=seed)


def drawn(pipe, *sources: AdapterState | Path, strengths: tuple[float, ...] = (0.5,)) -> Image.Image:
    manager = dd.AdapterManager(pipe)
    try:
        for index, source in enumerate(sources):
            manager.load_adapter(source, name=f"a{index}")
        manager.set_adapters({f"a{index}": strength for index, strength in enumerate(strengths)})
        return dd.generate(pipe, SETTINGS)
    finally:
        manager.unload()


def apart(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of a pixel."""
    return int(np.abs(np.asarray(one, dtype=np.int16) - np.asarray(other, dtype=np.int16)).max())


def scaled(adapter: AdapterState, factor: float) -> AdapterState:
    """Weaker pairs, so that the picture stays one."""
    return replace(adapter, modules={p: replace(m, up=factor * m.up) for p, m in adapter.modules.items()})


def test_every_format_draws_the_same(base, tmp_path) -> None:
    name, pipe = base
    for kind, formats in ((dora, set(FORMATS) - {"old-diffusers"}), (lora, {"old-diffusers"})):
        adapter = scaled(adapter_for(pipe, kind, 1), 0.3)
        expected = drawn(pipe, adapter)
        assert apart(expected, dd.generate(pipe, SETTINGS)) > 20
        for format in sorted(formats):
            path = tmp_path / (format if format == "peft" else f"{format}.safetensors")
            if (name, format) in REFUSED:
                with pytest.raises(ValueError, match="format"):
                    dd.save_adapter(adapter, path, format=format)
                continue
            dd.save_adapter(adapter, path, format=format)
            assert apart(drawn(pipe, path), expected) <= 1, format


def test_two_blended_in_both_orders_draw_the_same(base, tmp_path) -> None:
    _, pipe = base
    one, two = scaled(adapter_for(pipe, dora, 1), 0.3), scaled(adapter_for(pipe, lora, 2), 0.3)
    weights = {"one": 0.5, "two": 0.4}
    for mode in ("additive", "compose", "direction-magnitude"):
        pictures = []
        for adapters in ({"one": one, "two": two}, {"two": two, "one": one}):
            blended = dd.blend(adapters, weights, base=pipe, mode=mode)
            path = dd.save_adapter(blended, tmp_path / f"{mode}.safetensors", format="kohya")
            pictures.append(drawn(pipe, path, strengths=(1.0,)))
        assert apart(*pictures) == 0, mode
        if mode == "additive":
            live = drawn(pipe, one, two, strengths=(0.5, 0.4))
            assert apart(drawn(pipe, two, one, strengths=(0.4, 0.5)), live) <= 1
            assert apart(pictures[0], live) <= 1


def test_live_modes_draw_what_their_saved_blend_draws(base) -> None:
    _, pipe = base
    adapters = {"one": scaled(adapter_for(pipe, dora, 1), 0.3), "two": scaled(adapter_for(pipe, dora, 2), 0.3)}
    weights = {"one": 0.5, "two": 0.4}
    for mode in ("compose", "peft", "lycoris", "comfyui"):
        manager = dd.AdapterManager(pipe)
        for name, adapter in adapters.items():
            manager.load_adapter(adapter, name=name)
        manager.set_adapters(weights, blend=mode)
        live = dd.generate(pipe, SETTINGS)
        manager.unload()
        saved = dd.blend(adapters, weights, base=pipe, mode=mode)
        assert apart(drawn(pipe, saved, strengths=(1.0,)), live) <= 1, mode
