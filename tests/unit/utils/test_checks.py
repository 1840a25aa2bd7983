"""Records that people build by hand say which field is wrong, in one line."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dora_diffusion as dd
from dora_diffusion.generation.img2img import Canvas
from dora_diffusion.generation.png_metadata import AdapterUse, WordUse
from dora_diffusion.state import FactoredState
from tests.pocket_random import random_adapter, random_pocket_pipeline

PAIR = torch.ones(2, 4)


def line_of(make: Any) -> str:
    with pytest.raises(ValueError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "record, fields, line",
    [
        (dd.DoRAConfig, {"rank": "8"}, "DoRAConfig.rank: got '8' (str), expected a whole number"),
        (dd.DoRAConfig, {"rank": 8.0}, "DoRAConfig.rank: got 8.0 (float), expected a whole number"),
        (dd.DoRAConfig, {"rank": True}, "DoRAConfig.rank: got True (bool), expected a whole number"),
        (dd.DoRAConfig, {"alpha": "x"}, "DoRAConfig.alpha: got 'x' (str), expected a number"),
        (dd.DoRAConfig, {"dropout": None}, "DoRAConfig.dropout: got None, expected a number"),
        (
            dd.DoRAConfig,
            {"target_modules": 5},
            "DoRAConfig.target_modules: got 5 (int), expected text or a list of text or None",
        ),
        (
            dd.DoRAConfig,
            {"target_modules": ("to_q",)},
            "DoRAConfig.target_modules: got ('to_q',) (tuple), expected text or a list of text or None",
        ),
        (dd.DoRAConfig, {"use_dora": "yes"}, "DoRAConfig.use_dora: got 'yes' (str), expected True or False"),
        (
            dd.DoRAConfig,
            {"rank_pattern": {"to_q": "4"}},
            "DoRAConfig.rank_pattern: got {'to_q': '4'} (dict), expected a mapping of text to a whole number",
        ),
        (dd.DoRAConfig, {"init": 3}, "DoRAConfig.init: got 3 (int), expected"),
        (
            dd.GenerationSettings,
            {"prompt": ["a cat"]},
            "GenerationSettings.prompt: got ['a cat'] (list), expected text",
        ),
        (dd.GenerationSettings, {"prompt": "a", "steps": "20"}, "GenerationSettings.steps: got '20' (str), expected"),
        (dd.GenerationSettings, {"prompt": "a", "width": 64.0}, "GenerationSettings.width: got 64.0 (float), expected"),
        (dd.GenerationSettings, {"prompt": "a", "seed": None}, "GenerationSettings.seed: got None, expected a whole"),
        (dd.BlendOptions, {"density": "0.5"}, "BlendOptions.density: got '0.5' (str), expected a number"),
        (dd.BlendOptions, {"as_dora": 1}, "BlendOptions.as_dora: got 1 (int), expected True or False or None"),
        (dd.BlendOptions, {"extra": False}, "BlendOptions.extra: got False (bool), expected 'refuse' or 'drop'"),
        (dd.Extraction, {"use_dora": None}, "Extraction.use_dora: got None, expected True or False"),
        (dd.Extraction, {"dtype": "bf16"}, "Extraction.dtype: got 'bf16' (str), expected a dtype"),
        (Canvas, {"image": "a.png"}, "Canvas.image: got 'a.png' (str), expected an Image"),
        (AdapterUse, {"name": "a", "sha256": None, "weight": "1"}, "AdapterUse.weight: got '1' (str), expected a num"),
        (WordUse, {"word": "a", "sha256": 5}, "WordUse.sha256: got 5 (int), expected text"),
        (dd.AdapterState, {"modules": []}, "AdapterState.modules: got [] (list), expected a mapping of text to a"),
        (
            dd.ModuleState,
            {"down": PAIR, "up": [1.0], "alpha": 2},
            "ModuleState.up: got [1.0] (list), expected a Tensor",
        ),
        (dd.WordState, {"word": "<z>", "vectors": PAIR}, "WordState.vectors: got tensor"),
        (FactoredState, {"algorithm": "loha", "factors": PAIR}, "FactoredState.factors: got tensor"),
    ],
)
def test_a_wrong_type_names_the_field(record: Any, fields: dict[str, Any], line: str) -> None:
    assert line_of(lambda: record(**fields)).startswith(line)


def test_right_types_pass_numpys_numbers_too() -> None:
    config = dd.DoRAConfig(rank=np.int64(4), alpha=np.float32(2), target_modules=["to_q"], dropout=0, rank_pattern={})
    pipe = random_pocket_pipeline()
    injection = dd.inject(pipe.unet, config)
    assert set(injection.matched.values()) == {4}
    dd.GenerationSettings("a cat", guidance_scale=4, steps=np.int32(3), width=None)
    dd.BlendOptions(density=1, elect="frequency")
    Canvas(Image.new("RGB", (8, 8)))
    AdapterUse("ink", None, {"unet": 1}, schedule=((0.0, 1.0), (1, 0)))
    dd.Extraction(target_modules=("to_q",))


def test_arguments_name_themselves(tmp_path) -> None:
    pipe = random_pocket_pipeline()
    adapter, manager = random_adapter(pipe), dd.AdapterManager(pipe)
    manager.load_adapter(adapter, name="ink")
    for call, line in (
        (lambda: manager.set_adapters(5), 'set_adapters: got 5 (int), expected {"ink": 0.8}, or ["ink"] and [0.8]'),
        (lambda: manager.set_adapters([5]), 'set_adapters: got [5] (list), expected {"ink": 0.8}, or ["ink"] and'),
        (lambda: manager.set_adapters({"ink": "0.8"}), "strength of 'ink' must be a finite number, got '0.8'"),
        (lambda: manager.set_adapters({"ink": None}), "strength of 'ink' must be a finite number, got None"),
        (lambda: manager.set_schedule("ink", 5), "schedule 5: expected pairs of numbers"),
        (lambda: manager.set_schedule("ink", [0.0, 1.0]), "schedule [0.0, 1.0]: expected pairs of numbers"),
        (lambda: manager.load_adapter(adapter, name=5), "load_adapter: name: got 5 (int), expected text"),
        (lambda: manager.load_adapter(5, name="b"), "load_adapter: source: got 5 (int), expected text or a Path or"),
        (lambda: manager.enable_hotswap(max_rank="8"), "enable_hotswap must come before"),
        (lambda: dd.AdapterManager("pocket"), "str has no denoiser, text encoder or ControlNet that adapters"),
        (lambda: dd.load_adapter(None), "adapter: got None, expected text or a Path"),
        (lambda: dd.save_adapter("ink", tmp_path / "a"), "save_adapter: adapter: got 'ink' (str), expected an Adapter"),
        (lambda: dd.save_adapter(adapter, None), "save_adapter: path: got None, expected text or a Path"),
        (
            lambda: dd.save_adapter(adapter, tmp_path / "a.safetensors", dtype="fp16"),
            "save_adapter: dtype: got 'fp16' (str), expected a dtype or None",
        ),
    ):
        assert line_of(call).startswith(line)
    manager.set_adapters({"ink": np.float32(0.5)})
    assert manager.weights == {"ink": 0.5}
    manager.unload()
    assert line_of(lambda: manager.enable_hotswap(max_rank="8")).startswith("enable_hotswap: max_rank: got '8' (str)")
    injection = dd.inject(pipe.unet, dd.DoRAConfig())
    assert "Injection" in line_of(lambda: dd.save_adapter(injection, tmp_path / "a.safetensors"))
