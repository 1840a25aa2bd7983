"""Vectors on biases and normalisations: added at their strength, and gone again to the last bit."""

import pytest
import torch
from torch import Tensor, nn

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.state import AdapterState, ModuleState
from tests.pocket_random import random_adapter, random_pocket_pipeline
from tests.tolerances import assert_close, assert_identical

NORM = "unet.mid_block.attentions.0.norm.weight"
BLOCK = "unet.mid_block.attentions.0.transformer_blocks.0"
TO_OUT = f"{BLOCK}.attn1.to_out.0"  # an attention layer with a bias, adapted by `random_adapter`
TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj.bias"


@pytest.fixture(scope="module")
def pipe():
    return random_pocket_pipeline()


@pytest.fixture
def manager(pipe):
    manager = AdapterManager(pipe)
    yield manager
    manager.unload()


def parameters(pipe) -> dict[str, Tensor]:
    """Every parameter of the UNet and the text encoder, by its path without the layers around it, copied."""
    found = {}
    for part in ("unet", "text_encoder"):
        for name, parameter in getattr(pipe, part).named_parameters():
            found[f"{part}.{name}".replace(".base.", ".").replace("text_model.", "")] = parameter.detach().clone()
    return found


def vectors(pipe, *paths: str, seed: int = 0) -> dict[str, Tensor]:
    generator, have = torch.Generator().manual_seed(seed), parameters(pipe)
    return {path: torch.randn(have[path].shape, generator=generator) for path in paths}


def predict(pipe, timestep: int = 500) -> Tensor:
    tokens = pipe.tokenizer(["a cat"], padding="max_length", max_length=32, return_tensors="pt").input_ids
    noisy = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return pipe.unet(noisy, torch.tensor(timestep), pipe.text_encoder(tokens)[0]).sample


def test_a_parameter_is_its_own_value_and_the_sum_of_vectors(pipe, manager) -> None:
    before, memory = parameters(pipe), pipe.unet.mid_block.attentions[0].norm.weight.data_ptr()
    a, b = vectors(pipe, NORM, TEXT, seed=1), vectors(pipe, NORM, f"{TO_OUT}.bias", seed=2)
    report = manager.load_adapter(AdapterState({}, vectors=a), name="a")
    assert (report.kind, report.matched, report.vectors) == ("vectors", 0, 2)
    manager.load_adapter(AdapterState({}, vectors=b), name="b")
    assert_identical(parameters(pipe), before)
    manager.set_adapters({"a": 0.5, "b": {"unet.mid_block": -2.0}})
    now = parameters(pipe)
    assert_close(now[NORM], before[NORM] + 0.5 * a[NORM] - 2 * b[NORM])
    assert_close(now[TEXT], before[TEXT] + 0.5 * a[TEXT])
    assert_close(now[f"{TO_OUT}.bias"], before[f"{TO_OUT}.bias"] - 2 * b[f"{TO_OUT}.bias"])
    untouched = before.keys() - {NORM, TEXT, f"{TO_OUT}.bias"}
    assert_identical({path: now[path] for path in untouched}, {path: before[path] for path in untouched})
    manager.set_adapters({"a": {"unet.mid_block.attentions.0.norm.weight": 1.0}})  # one parameter is a part, too
    assert_close(parameters(pipe)[NORM], before[NORM] + a[NORM])
    assert_identical(parameters(pipe)[TEXT], before[TEXT])
    manager.set_adapters({"a": 0.0})
    assert_identical(parameters(pipe), before)
    manager.set_adapters({"a": 1.0, "b": 1.0})
    manager.delete_adapter("a")
    assert_close(parameters(pipe)[NORM], before[NORM] + b[NORM])
    assert_identical(parameters(pipe)[TEXT], before[TEXT])
    manager.unload()
    assert_identical(parameters(pipe), before)
    assert pipe.unet.mid_block.attentions[0].norm.weight.data_ptr() == memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_taken_in_fp32_and_rounded_once(dtype) -> None:
    pipe = random_pocket_pipeline()
    pipe.unet.to(dtype)
    own = pipe.unet.mid_block.attentions[0].norm.weight
    before = own.detach().clone()
    small = {NORM: torch.full(own.shape, 0.4 * float(torch.finfo(dtype).eps))}  # each alone rounds away beside a 1
    manager = AdapterManager(pipe)
    for name in ("a", "b", "c"):
        manager.load_adapter(AdapterState({}, vectors=small), name=name)
    manager.set_adapters(dict.fromkeys(manager.names, 1.0))
    assert_identical(own.detach(), (before.float() + 3 * small[NORM]).to(dtype))
    assert not torch.equal(own, before)
    manager.unload()
    assert_identical(own.detach(), before)


@pytest.mark.parametrize("order", [("modules", "vectors"), ("vectors", "modules")])
def test_a_bias_under_a_blended_layer_is_added_and_never_scaled(pipe, manager, order) -> None:
    """Whichever comes first. A DoRA scales rows and leaves the bias alone, the new bias too."""
    layer = pipe.unet.get_submodule(TO_OUT.removeprefix("unet."))
    weight, bias = layer.weight.clone(), layer.bias.detach().clone()
    parts = {
        "modules": AdapterState({TO_OUT: random_adapter(pipe).modules[TO_OUT]}),
        "vectors": AdapterState({}, vectors=vectors(pipe, f"{TO_OUT}.bias")),
    }
    for name in order:
        manager.load_adapter(parts[name], name=name)
        manager.set_adapters(dict.fromkeys(manager.names, 0.7))
    manager.fuse()
    folded = layer.weight.clone()
    manager.unfuse()
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1))
    expected = nn.functional.linear(x, folded, bias + 0.7 * parts["vectors"].vectors[f"{TO_OUT}.bias"])
    blended = pipe.unet.get_submodule(TO_OUT.removeprefix("unet."))
    assert blended is not layer
    with torch.no_grad():
        assert_close(blended(x), expected)
        manager.delete_adapter("modules")
        assert_identical(layer.weight.detach(), weight)
        assert pipe.unet.get_submodule(TO_OUT.removeprefix("unet.")) is layer
        assert_close(layer.bias, bias + 0.7 * parts["vectors"].vectors[f"{TO_OUT}.bias"])


def whole_adapter(pipe) -> AdapterState:
    """Layers and vectors of both parts, under one name."""
    return AdapterState(
        random_adapter(pipe).modules, vectors=vectors(pipe, NORM, TEXT, f"{TO_OUT}.bias", "unet.conv_in.bias")
    )


def test_fuse_and_unfuse_leave_vectors_right(pipe, manager) -> None:
    before = parameters(pipe)
    manager.load_adapter(whole_adapter(pipe), name="a")
    manager.set_adapters({"a": 0.6})
    unfused, held = predict(pipe), parameters(pipe)[NORM]
    manager.fuse()
    assert_close(predict(pipe), unfused)
    assert_identical(parameters(pipe)[NORM], held)
    manager.unfuse()
    assert_identical(predict(pipe), unfused)
    manager.fuse()
    manager.unload()
    assert_identical(parameters(pipe), before)


def test_vectors_follow_a_schedule_as_layers_do(pipe, manager) -> None:
    manager.load_adapter(whole_adapter(pipe), name="a")
    manager.set_adapters({"a": 0.8})
    pipe.scheduler.set_timesteps(11)
    manager.set_schedule("a", [(0.0, 0.0), (1.0, 1.0)])
    steps = pipe.scheduler.timesteps.tolist()
    got = [predict(pipe, step) for step in steps]
    manager.set_schedule("a", None)
    for number, (step, answer) in enumerate(zip(steps, got, strict=True)):
        # text encoders run before the first step, at the plain strength
        manager.set_adapters({"a": {"unet": 0.8 * number / 10, "text_encoder": 0.8}})
        assert_close(answer, predict(pipe, step))


def test_vectors_stay_inside_a_mask_as_layers_do(pipe, manager) -> None:
    manager.load_adapter(AdapterState({}, vectors=vectors(pipe, NORM, "unet.conv_in.bias")), name="a")
    without = predict(pipe)
    manager.set_adapters({"a": 1.0})
    inside = predict(pipe)
    manager.set_mask("a", torch.cat([torch.ones(16, 8), torch.zeros(16, 8)], dim=1))
    got = predict(pipe)
    assert_close(got[..., :8], inside[..., :8])
    assert_close(got[..., 8:], without[..., 8:])
    assert (inside - without).abs().max() > 1e-3
    manager.set_mask("a", None)
    assert_identical(predict(pipe), inside)


def test_hot_swap_takes_vectors_without_recompiling() -> None:
    pipe = random_pocket_pipeline()
    before = predict(pipe)
    plain = random_pocket_pipeline()
    expected = AdapterManager(plain)
    manager = AdapterManager(pipe)
    manager.enable_hotswap(max_rank=8)
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    torch._dynamo.reset()
    predict(pipe)
    torch.compiler.set_stance("fail_on_recompile")
    try:
        for each in (manager, expected):
            each.load_adapter(whole_adapter(plain if each is expected else random_pocket_pipeline()), name="a")
            each.set_adapters({"a": 0.7})
        assert_close(predict(pipe), predict(plain))
        manager.set_adapters({"a": -0.3})
        expected.set_adapters({"a": -0.3})
        assert_close(predict(pipe), predict(plain))
        manager.delete_adapter("a")
        assert_identical(predict(pipe), before)
    finally:
        torch.compiler.set_stance("default")
        torch._dynamo.reset()


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        (NORM, (3,), r"a vector of \(3,\) does not fit a parameter of \(192,\); is this another base"),
        ("unet.mid_block.attentions.0.norm.scale", (192,), "parameter .*norm.scale is not in this pipeline"),
        ("unet.nowhere.bias", (4,), "layer unet.nowhere is not in this pipeline"),
        ("bias", (4,), "is not in this pipeline"),
        (f"{BLOCK}.attn1.to_q.bias", (192,), "this Linear has no bias to add to"),
        (f"{BLOCK}.attn1.to_q.weight", (192, 192), "the whole weight of a Linear is no vector"),
    ],
)
def test_a_vector_that_does_not_fit_is_refused_in_one_line_and_changes_nothing(
    pipe, manager, path, shape, message
) -> None:
    before = parameters(pipe)
    adapter = AdapterState({}, vectors={**vectors(pipe, NORM), path: torch.ones(shape)})
    with pytest.raises(
        ValueError, match=f"a: . of . parameters fit this pipeline; first misfit: .*{message}"
    ) as caught:
        manager.load_adapter(adapter, name="a")
    assert "\n" not in str(caught.value)
    assert manager.names == ()
    assert_identical(parameters(pipe), before)


def test_strength_by_part_knows_where_vectors_are(pipe, manager) -> None:
    manager.load_adapter(AdapterState({}, vectors=vectors(pipe, NORM)), name="a")
    with pytest.raises(ValueError, match=r"'unet.up_blocks' holds none of its layers"):
        manager.set_adapters({"a": {"unet.up_blocks": 1.0}})
    manager.set_adapters({"a": {"unet.mid_block": 1.0}})


def test_a_model_that_was_cast_meanwhile_gets_its_own_values_back_in_its_new_dtype() -> None:
    pipe = random_pocket_pipeline()
    before = pipe.unet.mid_block.attentions[0].norm.weight.detach().clone()
    manager = AdapterManager(pipe)
    adapter = AdapterState(
        {TO_OUT: ModuleState(torch.ones(1, 192), torch.ones(192, 1), 1.0)}, vectors=vectors(pipe, NORM)
    )
    manager.load_adapter(adapter, name="a")
    manager.set_adapters({"a": 1.0})
    pipe.unet.to(torch.bfloat16)
    manager.set_adapters({"a": 0.5})
    now = pipe.unet.mid_block.attentions[0].norm.weight.detach()
    assert_identical(now, (before + 0.5 * adapter.vectors[NORM]).bfloat16())
    manager.unload()
    assert_identical(pipe.unet.mid_block.attentions[0].norm.weight.detach(), before.bfloat16())
