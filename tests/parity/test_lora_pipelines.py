"""Every pipeline of diffusers that loads LoRAs: our manager in each, and PEFT's LoRA beside it on the same model.

A pipeline is built of its denoiser alone, without its __init__: layers ask for nothing else.
"""

import inspect
import re
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ModularPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.state import ModuleState, cast
from tests.denoisers import DENOISERS, prediction
from tests.pipelines.adapters import trained
from tests.tolerances import assert_identical, assert_near

ROUNDED = 1e-5  # of the largest number; judged in fp64, where the models themselves allow it
FP32_ONLY = ("Kandinsky5Transformer3DModel", "CosmosTransformer3DModel")  # they make fp32 of some numbers inside
pytestmark = [  # of diffusers' own models
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),  # a slower kernel
]


@cache
def loaders() -> dict[str, type]:
    """The classes of pipelines that mix in a LoRA loader, by name."""
    found = {name: getattr(diffusers, name) for name in dir(diffusers) if "Pipeline" in name}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, LoraBaseMixin)}


def models_of(kind: type) -> dict[str, str]:
    """The models beside text encoders that a pipeline's LoRAs are for: component -> the first class it may be."""
    if issubclass(kind, ModularPipeline):
        specs = kind().blocks.expected_components
        hints = {spec.name: spec.type_hint for spec in specs}
    else:
        hints = {name: parameter.annotation for name, parameter in inspect.signature(kind.__init__).parameters.items()}
    loaders_of = ("transformer", *kind._lora_loadable_modules)  # PRX has a transformer, and the loader of a UNet
    wanted = [name for name in dict.fromkeys(loaders_of) if not name.startswith("text_encoder")]
    return {name: _class_name(hints[name]) for name in wanted if name in hints}


def _class_name(hint: Any) -> str:
    """Of an annotation: a class, a union's first, or its name."""
    kinds = getattr(hint, "__args__", (hint,))
    return kinds[0] if isinstance(kinds[0], str) else kinds[0].__name__


WALKED = [name for name, kind in loaders().items() if set(models_of(kind).values()) & DENOISERS.keys()]


def pipeline(name: str) -> tuple[Any, dict[str, nn.Module]]:
    """A pipeline with nothing but tiny models for its LoRAs."""
    kind = loaders()[name]
    models = {part: DENOISERS[model].make() for part, model in models_of(kind).items()}
    if issubclass(kind, ModularPipeline):
        pipe = kind()
        pipe.update_components(**models)
    else:
        pipe = kind.__new__(kind)
        for part, model in models.items():
            object.__setattr__(pipe, part, model)
    return pipe, models


def predict(models: dict[str, nn.Module]) -> Tensor:
    """What all of them answer, each in its own dtype."""
    with torch.no_grad():
        return torch.cat([prediction(model(**_inputs(model))) for model in models.values()])


def _inputs(model: nn.Module) -> dict[str, Any]:
    dtype = next(model.parameters()).dtype
    given = DENOISERS[type(model).__name__].inputs()
    inputs: dict[str, Any] = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, given)
    return inputs


def test_none_is_left_out() -> None:
    assert len(WALKED) > 200  # of diffusers 0.42
    assert list(loaders()) == WALKED
    assert {model for name in WALKED for model in models_of(loaders()[name]).values()} <= DENOISERS.keys()


@pytest.mark.parametrize("name", WALKED)
def test_load_blend_fuse_and_unload(name: str) -> None:
    pipe, models = pipeline(name)
    for model in models.values():
        if type(model).__name__ not in FP32_ONLY:
            model.double()
    before = predict(models)
    adapter = cast(trained(pipe, size=1.0, use_dora=False), torch.float32)  # the same numbers for both
    manager = AdapterManager(pipe)
    report = manager.load_adapter(adapter, name="a")
    assert set(report.components) == set(models)
    assert_identical(predict(models), before)
    manager.set_adapters({"a": 1.0})
    ours = predict(models)
    manager.fuse()
    assert_near(predict(models), ours, ROUNDED)
    manager.unfuse()
    manager.unload()
    assert_identical(predict(models), before)
    assert float((ours - before).abs().max()) > 10 * ROUNDED * float(ours.abs().max())
    for part, model in models.items():
        _inject_peft(
            model, {path.partition(".")[2]: m for path, m in adapter.modules.items() if path.startswith(part + ".")}
        )
    assert_near(predict(models), ours, ROUNDED)


def _inject_peft(model: nn.Module, modules: dict[str, ModuleState]) -> None:
    """The same adapter by PEFT."""
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules="|".join(map(re.escape, modules))), model)
    for path, module in modules.items():
        layer = model.get_submodule(path)
        layer.lora_A["default"].weight.data.copy_(module.down)
        layer.lora_B["default"].weight.data.copy_(module.up)
