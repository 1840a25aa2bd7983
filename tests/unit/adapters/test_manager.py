"""AdapterManager: exact at 0 and 1, additive, order-free, fused and unfused alike, and leaving nothing behind."""

from dataclasses import replace
from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.adapters.matching import kind_in_words
from dora_diffusion.formats import save_adapter
from dora_diffusion.layers.blended import BlendedLayer
from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.injection import inject
from dora_diffusion.state import AdapterState, FactoredState, Module, ModuleState
from tests.pocket_random import random_adapter, random_pocket_pipeline
from tests.tolerances import assert_close, assert_identical


@pytest.fixture
def pipe():
    return random_pocket_pipeline()


def predict(pipe) -> torch.Tensor:
    """The denoiser's answer to a fixed input through the text encoder: every adapted layer takes part."""
    tokens = pipe.tokenizer(["a cat"], padding="max_length", max_length=32, return_tensors="pt").input_ids
    noisy = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return pipe.unet(noisy, torch.tensor([500]), pipe.text_encoder(tokens)[0]).sample


def modules_of(pipe) -> list[int]:
    return [id(module) for part in (pipe.unet, pipe.text_encoder) for module in part.modules()]


def test_zero_is_the_base_bit_for_bit_and_unload_leaves_nothing(pipe) -> None:
    before, modules = predict(pipe), modules_of(pipe)
    manager = AdapterManager(pipe)
    manager.load_adapter(random_adapter(pipe), name="a")
    assert_identical(predict(pipe), before)
    manager.set_adapters({"a": 0.0})
    assert_identical(predict(pipe), before)
    manager.set_adapters({"a": 1.0})
    assert (predict(pipe) - before).abs().max() > 1e-3
    manager.set_adapters({"a": 0})
    assert_identical(predict(pipe), before)
    blended = [module for module in pipe.unet.modules() if isinstance(module, BlendedLayer)]
    assert blended
    assert all(layer.left is None for layer in blended)  # at 0 it costs nothing either
    manager.unload()
    assert modules_of(pipe) == modules
    assert_identical(predict(pipe), before)


@pytest.mark.parametrize("use_dora", [True, False])
def test_one_is_what_was_trained(pipe, use_dora: bool) -> None:
    adapter = random_adapter(pipe, use_dora=use_dora)
    injections = []
    for part in ("unet", "text_encoder"):
        config = DoRAConfig(rank=4, alpha=4, use_dora=use_dora)
        injections.append(inject(getattr(pipe, part), config))
        inner = {p.split(".", 1)[1]: m for p, m in adapter.modules.items() if p.startswith(part)}
        injections[-1].load(AdapterState(inner))
    trained = predict(pipe)
    for injection in injections:
        injection.eject()
    manager = AdapterManager(pipe)
    manager.load_adapter(adapter, name="a")
    manager.set_adapters({"a": 1.0})
    assert_close(predict(pipe), trained)


def test_order_of_loading_and_naming_is_nothing(pipe) -> None:
    adapters = {
        "a": random_adapter(pipe, 1),
        "b": random_adapter(pipe, 2, use_dora=False),
        "c": random_adapter(pipe, 3),
    }
    weights = {"a": 0.7, "b": -0.4, "c": 1.2}
    drawn = []
    for order in permutations(adapters):
        manager = AdapterManager(pipe)
        for name in order:
            manager.load_adapter(adapters[name], name=name)
        manager.set_adapters({name: weights[name] for name in reversed(order)})
        drawn.append(predict(pipe))
        manager.unload()
    for other in drawn[1:]:
        assert_identical(other, drawn[0])


def test_blend_is_the_sum_of_weight_changes(pipe) -> None:
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    base = pipe.unet.get_submodule(path).weight.clone()
    adapters = {"a": random_adapter(pipe, 1), "b": random_adapter(pipe, 2)}
    changes = {}
    manager = AdapterManager(pipe)
    for name, adapter in adapters.items():
        manager.load_adapter(adapter, name=name)
    for name in adapters:
        manager.set_adapters({name: 1.0})
        manager.fuse()
        changes[name] = pipe.unet.get_submodule(path).weight.clone() - base
        manager.unfuse()
    manager.set_adapters({"a": 0.5, "b": -2.0})
    manager.fuse()
    assert_close(pipe.unet.get_submodule(path).weight, base + 0.5 * changes["a"] - 2 * changes["b"])


def test_fused_draws_the_same_and_unfuse_restores_every_byte(pipe) -> None:
    weights = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    manager = AdapterManager(pipe)
    manager.load_adapter(random_adapter(pipe), name="a")
    manager.set_adapters({"a": 0.8})
    unfused = predict(pipe)
    manager.fuse()
    assert pipe.unet.state_dict().keys() == weights.keys()
    assert_close(predict(pipe), unfused)
    with pytest.raises(ValueError, match="while fused"):
        manager.set_adapters({"a": 0.1})
    manager.unfuse()
    assert_identical(predict(pipe), unfused)
    manager.unload()
    assert_identical(pipe.unet.state_dict(), weights)


def test_strength_by_component_and_block(pipe) -> None:
    before = predict(pipe)
    manager = AdapterManager(pipe)
    manager.load_adapter(random_adapter(pipe), name="a")
    manager.set_adapters({"a": {"unet": 0.0, "text_encoder": 0.0}})
    assert_identical(predict(pipe), before)
    manager.set_adapters({"a": {"unet": 1.0, "unet.up_blocks": 1.0, "text_encoder": 1.0}})
    by_parts = predict(pipe)
    manager.set_adapters({"a": 1.0})
    assert_identical(predict(pipe), by_parts)


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"b": 1.0}, "no adapter named 'b' is loaded; loaded: a"),
        ({"a": float("nan")}, "finite number"),
        ({"a": {"unet.nowhere": 1.0}}, "'unet.nowhere' holds none of its layers"),
    ],
)
def test_bad_strengths_are_refused_and_change_nothing(pipe, weights, message: str) -> None:
    manager = AdapterManager(pipe)
    manager.load_adapter(random_adapter(pipe), name="a")
    manager.set_adapters({"a": 0.5})
    before = predict(pipe)
    with pytest.raises(ValueError, match=message):
        manager.set_adapters(weights)
    assert_identical(predict(pipe), before)


def test_names_and_strengths_beside_a_mapping(pipe) -> None:
    adapters = [random_adapter(pipe, seed) for seed in range(2)]
    manager = AdapterManager(pipe)
    for adapter, name in zip(adapters, "ab", strict=True):
        manager.load_adapter(adapter, name=name)
    manager.set_adapters({"a": 0.5, "b": 1.0})
    wanted = predict(pipe)
    for weights in (0.0, [0.5, None]):
        manager.set_adapters(["a", "b"], weights)
    assert_identical(predict(pipe), wanted)
    manager.set_adapters("b")
    assert manager.weights == {"b": 1.0}
    with pytest.raises(ValueError, match="^set_adapters: 2 adapters and 1 weights; expected one each$"):
        manager.set_adapters(["a", "b"], adapter_weights=[0.5])
    assert manager.weights == {"b": 1.0} and manager.blend == "additive"
    manager.set_adapters({"b": 0.5}, "peft")  # a mode, as ever
    assert (manager.weights, manager.blend) == ({"b": 0.5}, "peft")
    manager.unload()


def test_adapter_of_another_base_is_refused_in_one_line(pipe, tmp_path) -> None:
    before = modules_of(pipe)
    wrong_layer = AdapterState({"unet.nowhere.to_q": ModuleState(torch.ones(1, 4), torch.ones(4, 1), 1.0)})
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    wrong_shape = AdapterState({path: ModuleState(torch.ones(1, 4), torch.ones(4, 1), 1.0)})
    manager = AdapterManager(pipe)
    for adapter in (wrong_layer, wrong_shape):
        file = save_adapter(adapter, tmp_path / "wrong.safetensors")
        with pytest.raises(ValueError, match="another base") as caught:
            manager.load_adapter(file, name="wrong")
        assert "\n" not in str(caught.value)
        assert str(file) in str(caught.value)
    assert manager.names == ()
    assert modules_of(pipe) == before


def test_plain_diffusers_draws_the_same_picture_from_our_file(pipe, tmp_path) -> None:
    def draw() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipe("a cat", num_inference_steps=3, generator=generator, output_type="np").images[0]

    before = draw()
    file = save_adapter(random_adapter(pipe), tmp_path / "a.safetensors")
    manager = AdapterManager(pipe)
    manager.load_adapter(file, name="a")
    manager.set_adapters({"a": 1.0})
    ours = draw()
    manager.unload()
    pipe.load_lora_weights(str(file))
    theirs = draw()
    found = sum("lora_magnitude_vector" in name for name, _ in pipe.text_encoder.named_parameters())
    assert found == 16  # every q, k, v and out projection of four layers
    assert np.abs(ours - before).max() > 0.05
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


QUERY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONVOLUTION = "unet.down_blocks.0.resnets.0.conv1"


def test_a_misfit_is_counted_and_the_first_is_named(pipe) -> None:
    good = random_adapter(pipe).modules
    bad = {
        "unet.nowhere.to_q": ModuleState(torch.ones(1, 4), torch.ones(4, 1), 1.0),
        "unet.conv_norm_out": ModuleState(torch.ones(1, 4), torch.ones(4, 1), 1.0),
    }
    manager = AdapterManager(pipe)
    with pytest.raises(ValueError) as caught:
        manager.load_adapter(AdapterState({**bad, **good}), name="a")
    assert str(caught.value) == (
        f"a: {len(good)} of {len(good) + 2} layers fit this pipeline; first misfit: layer unet.nowhere.to_q is not in "
        "this pipeline; is the adapter for another base model?"
    )


def test_the_same_layer_under_two_spellings_is_refused(pipe) -> None:
    modules = random_adapter(pipe).modules
    path = next(path for path in modules if path.startswith("text_encoder."))
    inner = path.removeprefix("text_encoder.").removeprefix("text_model.")
    twice = {f"text_encoder.{prefix}{inner}": modules[path] for prefix in ("", "text_model.")}
    with pytest.raises(ValueError, match="1 of 2 layers fit this pipeline; first misfit: .* comes twice"):
        AdapterManager(pipe).load_adapter(AdapterState(twice), name="a")


def other_ways(pipe) -> dict[str, Module]:
    """A layer of every way to write a difference; paths of the pocket UNet, linear and 3x3."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    out, columns = pipe.unet.get_submodule(QUERY.removeprefix("unet.")).weight.shape
    wide, narrow, *kernel = pipe.unet.get_submodule(CONVOLUTION.removeprefix("unet.")).weight.shape
    linears = [path for path in random_adapter(pipe).modules if path.endswith("attn1.to_q") and path != QUERY]
    loha = {f"hada_w{half}_{side}": 0.3 * draw(*shape) for half in (1, 2) for side, shape in (("a", (out, 2)),)}
    loha |= {f"hada_w{half}_b": 0.3 * draw(2, columns) for half in (1, 2)}
    lokr = {"lokr_w1": draw(4, 2), "lokr_w2_a": draw(wide // 4, 2), "lokr_w2_b": 0.1 * draw(2, narrow // 2 * 9)}
    tucker = ModuleState(
        draw(3, narrow, 1, 1), 0.1 * draw(wide, 3, 1, 1), 3.0, 2 * torch.rand(wide), mid=draw(3, 3, *kernel)
    )
    whole = pipe.unet.get_submodule(linears[0].removeprefix("unet.")).weight.shape
    return {
        QUERY: FactoredState("loha", loha, scale=0.5, magnitude=torch.rand(out)),
        CONVOLUTION: FactoredState("lokr", lokr),
        CONVOLUTION.replace("conv1", "conv2"): tucker if wide == narrow else replace(tucker, down=draw(3, wide, 1, 1)),
        linears[0]: FactoredState("full", {"diff": 0.1 * draw(*whole)}),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_to_write_a_difference_is_folded_as_its_dense_weight(pipe, dtype) -> None:
    """Also from bf16 files: factors are multiplied out in fp32, as `delta` of a cast module is."""
    modules = {path: module.to(dtype=dtype) for path, module in other_ways(pipe).items()}
    layers = {path: pipe.unet.get_submodule(path.removeprefix("unet.")) for path in modules}
    expected = {}
    for path, module in modules.items():
        exact = module.to(dtype=torch.float64)
        weight = layers[path].weight.double() + exact.delta().reshape(layers[path].weight.shape)
        if exact.magnitude is not None:
            flat = weight.flatten(1)
            weight = (flat * (exact.magnitude / flat.norm(dim=1))[:, None]).reshape(weight.shape)
        expected[path] = weight.float()
    manager = AdapterManager(pipe)
    report = manager.load_adapter(AdapterState(modules, extra={"bundle_emb": torch.zeros(2)}), name="a")
    assert (report.matched, report.vectors, report.extra) == (4, 0, 1)
    manager.set_adapters({"a": 1.0})
    blended = predict(pipe)
    manager.fuse()
    assert_close({path: layer.weight for path, layer in layers.items()}, expected)
    assert_close(predict(pipe), blended)


def test_factors_that_do_not_fit_each_other_or_the_layer_are_refused(pipe) -> None:
    loha = {f"hada_w{half}_a": torch.ones(8, 2) for half in (1, 2)}
    loha |= {f"hada_w{half}_b": torch.ones(2, 8) for half in (1, 2)}
    manager = AdapterManager(pipe)
    for factors, message in (
        (loha, "do not fit a weight of"),
        ({**loha, "hada_w2_b": torch.ones(3, 8)}, "its factors do not fit each other: hada_w1_a"),
        ({key: loha[key] for key in list(loha)[:3]}, "its factors do not fit each other: hada_w1_a"),
    ):
        with pytest.raises(ValueError, match=f"0 of 1 layers fit.*{message}") as caught:
            manager.load_adapter(AdapterState({QUERY: FactoredState("loha", factors)}), name="a")
        assert "\n" not in str(caught.value)


def test_the_kind_says_what_is_mixed(pipe) -> None:
    ways, pairs = other_ways(pipe), random_adapter(pipe, use_dora=False).modules
    vectors = {"unet.conv_norm_out.bias": torch.ones(8)}
    for modules, kind in (
        (random_adapter(pipe).modules, "DoRA"),
        (pairs, "LoRA"),
        ({QUERY: ways[QUERY]}, "LoHa with magnitudes"),
        ({**pairs, CONVOLUTION: ways[CONVOLUTION]}, f"LoRA in {len(pairs)} layers, LoKr in 1"),
        ({}, "vectors"),
    ):
        assert kind_in_words(AdapterState(modules, vectors=vectors)) == kind


def test_the_pipeline_tells_the_axis_of_a_flat_magnitude(tmp_path) -> None:
    from safetensors.torch import save_file

    pipe = random_pocket_pipeline()
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = pipe.unet.get_submodule(path).weight
    assert weight.shape[0] == weight.shape[1]
    name = "lora_unet_" + path.replace(".", "_")
    tensors = {
        f"{name}.lora_down.weight": torch.zeros(1, weight.shape[1]),
        f"{name}.lora_up.weight": torch.zeros(weight.shape[0], 1),
    }
    before = weight.detach().clone()
    for norms in (weight.norm(dim=1), weight.norm(dim=0)):
        save_file({**tensors, f"{name}.dora_scale": 1.1 * norms.detach()}, tmp_path / "a.safetensors")
        manager = AdapterManager(pipe)
        manager.load_adapter(tmp_path / "a.safetensors", name="a")
        manager.set_adapters({"a": 1.0})
        manager.fuse()
        assert_close(pipe.unet.get_submodule(path).weight.detach(), 1.1 * before)
        manager.unfuse()
        manager.unload()
